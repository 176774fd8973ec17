"""A judge in a whole run: a dead endpoint costs no round, a live one and a function settle what the rules cannot."""

import json
import logging
import socket
from functools import partial

import pytest

from ropo import run_rounds
from ropo.cli.main import main
from ropo.config import ROPOConfig
from ropo.endpoint.client import EndpointError
from ropo.judge.endpoint import EndpointJudge
from ropo.train.trainer import ROPOTrainer

OPTIONS = {
    "learning_rate": 3e-3, "per_device_train_batch_size": 4, "save_strategy": "no", "max_length": 64,
    "max_new_tokens": 24, "use_cpu": True, "disable_tqdm": True, "rounds": 2, "num_folds": 0, "rho": "0.3",
    "num_candidates": 8, "sample_from": "policy", "max_repetition": 1.0, "max_length_ratio": 30.0,
    "max_resampled_share": 1.0, "max_abs_margin": 1e-9,  # nothing is believed, so all is left to the judge
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("ropo.judge.options.EndpointJudge", partial(EndpointJudge, sleep=lambda _: None))


def config(folder, url=None, **options):
    judge = {"judge": "endpoint", "judge_url": url, "judge_model": "j"} if url else {}
    return ROPOConfig(output_dir=str(folder), **{**OPTIONS, **judge, **options})


@pytest.fixture
def dead_url():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens, and nobody else gets the port
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


@pytest.fixture
def live_url(serve):
    """Says A, then B: whatever stands first in the first order is better."""
    answers = {}

    def reply(request):
        said = answers.setdefault(json.dumps(request.body, sort_keys=True), "AB"[len(answers) % 2])
        return 200, {"choices": [{"message": {"content": said}}]}

    return f"{serve(reply).url}/v1"


def test_a_dead_endpoint_is_gone_on_without(model_folder, pairs, tmp_path, dead_url, caplog):
    with caplog.at_level(logging.WARNING):
        summary = run_rounds(model_folder, pairs, config(tmp_path / "o", dead_url)).summary
    assert (tmp_path / "o" / "model.safetensors").exists()
    assert summary["num_resampled"] == 0
    assert summary["rounds"][0]["refused"]["prompt without a candidate that the rule takes"] > 0
    assert any(dead_url in record.getMessage() for record in caplog.records)


def test_a_dead_endpoint_stops_with_everything_kept(model_folder, pairs, tmp_path, dead_url, live_url, monkeypatch):
    folder = tmp_path / "o"
    with pytest.raises(EndpointError, match="refused"):
        run_rounds(model_folder, pairs, config(folder, dead_url, judge_on_failure="stop"))
    trained, step = [], ROPOTrainer.training_step

    def counting(self, *args, **kwargs):
        trained.append(self.args.output_dir)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ROPOTrainer, "training_step", counting)
    summary = run_rounds(model_folder, pairs, config(folder, live_url, judge_on_failure="stop")).summary
    assert all("01" in place for place in trained)  # the first round was kept, the same command went on
    assert trained
    assert summary["rounds"][0]["round"] == 0


def test_a_function_settles_what_the_rule_leaves(model_folder, pairs, tmp_path):
    asked = []

    def first_is_worse(pairs):
        asked.extend(pairs)
        return [0.0] * len(pairs)

    summary = run_rounds(model_folder, pairs, config(tmp_path / "o"), judge=first_is_worse).summary
    lines = (tmp_path / "o" / "rounds" / "00" / "resampled.jsonl").read_text().splitlines()
    new = [json.loads(line) for line in lines]
    assert new
    assert summary["rounds"][0]["num_judged"] == len(new) == len(asked)
    assert [(one["chosen"], one["rejected"]) for one in new] == [(one.rejected, one.chosen) for one in asked]
    assert {one["parent_id"] for one in new} <= {pair.id for pair in pairs}


def test_the_command_line_says_it_in_one_line(model_folder, pairs, tmp_path, dead_url, capsys, monkeypatch):
    """Exit code 1 and no traceback: the data and the command are fine, the endpoint is not."""

    def failing(*_, **__):
        raise EndpointError(f"{dead_url} refused the connection. Start it.")

    monkeypatch.setattr("ropo.cli.train.run_rounds", failing)
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "p", "chosen": " a", "rejected": " b"}\n')
    words = ["train", "--model_name_or_path", str(model_folder), "--dataset_name", str(data), "--output_dir", "o"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"ropo train: {dead_url} refused ")
    assert said.count("\n") == 1
