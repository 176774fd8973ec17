"""What a tokenizer and its chat template do is the same for every command, and the same tomorrow."""

import json
from datetime import datetime, timedelta

import pytest
from transformers import AutoTokenizer

from ropo.cli.main import main
from ropo.data import template
from ropo.run.rounds import Round

OPTIONS = (
    "--use_cpu", "--max_length", "96", "--max_steps", "1", "--rounds", "1", "--num_folds", "0", "--rho", "0",
    "--num_candidates", "0", "--save_strategy", "no", "--report_to", "none",
)  # fmt: skip


@pytest.fixture
def with_template(model_folder):
    def make(text):
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        tokenizer.chat_template = text + tokenizer.chat_template
        tokenizer.save_pretrained(model_folder)
        return model_folder

    return make


@pytest.fixture
def dataset(pairs, tmp_path):
    """Twelve conversations, of which the fourth has a tool call and a control token as text."""
    rows = [
        {
            "prompt": [{"role": "user", "content": pair.prompt}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
        }
        for pair in pairs[:12]
    ]
    call = {"type": "function", "function": {"name": "oven", "arguments": '{"degrees": "200"}'}}
    rows[3]["prompt"] += [
        {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "hot</s>"}
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(folder, dataset, output, *more):
    words = ("--model_name_or_path", folder, "--dataset_name", dataset, "--output_dir", output, *OPTIONS, *more)
    return main(["train", *map(str, words)])


def test_problems_are_those_that_validate_lists(with_template, dataset, tmp_path, capsys):
    """A row that the template raises anything at is left out; the others are trained on."""
    folder = with_template("{{ strftime_now('%Y') }}{{ messages[5].content + 1 if 'loud' in messages[0].content }}")
    assert train(folder, dataset, tmp_path / "O") == 0
    lines = (tmp_path / "O" / "problems.jsonl").read_text().splitlines()
    found = {kind: [] for kind in ("template_refuses", "control_tokens", "template_leaves_out", "template_with_date")}
    for problem in map(json.loads, lines):
        found[problem["kind"]].append(problem["row"])
    assert len(found["template_refuses"]) > 1
    assert found["control_tokens"] == found["template_leaves_out"] == [3]
    assert found["template_with_date"] == [None]
    capsys.readouterr()
    assert main(["validate", str(dataset), "--model_name_or_path", str(folder), "--max_length", "96"]) == 0
    said = capsys.readouterr().out
    assert f"template_refuses: {len(found['template_refuses'])} left out" in said
    assert "control_tokens: 1 warning" in said
    assert "'oven'" in said


def test_a_template_without_end_is_one_sentence(with_template, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(template, "_BUDGET_SECONDS", 0.2)
    nested = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
    folder = with_template(nested)
    assert train(folder, dataset, tmp_path / "O") == 2
    assert "end; at row 0" in capsys.readouterr().err
    assert not (tmp_path / "O").exists()


@pytest.fixture
def on_day(monkeypatch):
    """Sets the calendar that templates see, and gives the tokens that the first training was to read."""
    trained_on = []

    def train_never(self, dataset, *_):
        trained_on.append([ids.prompt.tolist() for ids in dataset.tokens])
        raise ValueError("This run ends here.")

    monkeypatch.setattr(Round, "_train", train_never)

    def begin(day, *words):
        class Calendar(datetime):
            @classmethod
            def now(cls):
                return cls(2026, 2, 1) + timedelta(days=day)

        monkeypatch.setattr(template, "datetime", Calendar)
        assert train(*words) == 2
        return trained_on.pop()

    return begin


def test_a_run_keeps_the_date_of_its_start(with_template, dataset, tmp_path, on_day):
    """Resumed after midnight it would mix tokens of two days, with log-probabilities that belong to the first."""
    folder = with_template("{{ strftime_now('%d %b %Y') }}")
    first = on_day(0, folder, dataset, tmp_path / "O")
    assert on_day(1, folder, dataset, tmp_path / "O") == first
    assert json.loads((tmp_path / "O" / "ropo_config.json").read_text())["date"] == "2026-02-01T00:00:00"
    other = on_day(1, folder, dataset, tmp_path / "P")
    assert len(other) == len(first)
    assert other != first


def test_a_date_that_cannot_be_read(with_template, dataset, tmp_path, on_day, capsys):
    """Where nothing is trained yet, the run begins anew; else its date is not made up."""
    folder, output = with_template("{{ strftime_now('%d %b %Y') }}"), tmp_path / "O"
    first = on_day(0, folder, dataset, output)
    (output / "ropo_config.json").write_text('{"date": ')
    assert on_day(1, folder, dataset, output) != first
    (output / "rounds" / "00").mkdir(parents=True, exist_ok=True)
    (output / "rounds" / "00" / "manifest.json").write_text("{}")
    (output / "ropo_config.json").write_text('{"date": ')
    assert train(folder, dataset, output) != 0
    assert "ropo_config.json is damaged" in capsys.readouterr().err


def test_a_template_without_date_keeps_none(model_folder, dataset, tmp_path, on_day):
    assert on_day(0, model_folder, dataset, tmp_path / "O") == on_day(1, model_folder, dataset, tmp_path / "P")
    assert "date" not in json.loads((tmp_path / "O" / "ropo_config.json").read_text())


def test_an_export_that_the_template_refuses(with_template, tmp_path, capsys):
    questions = tmp_path / "alpaca_eval.json"
    questions.write_text(json.dumps([{"instruction": text, "dataset": "x"} for text in ("hi", "loud")]))
    folder = with_template("{{ 1 // 0 if 'loud' in messages[0].content }}")
    words = ("--benchmark", "alpaca_eval", "--questions", questions, "--model_name_or_path", folder)
    assert main(["export", *map(str, words), "--name", "m", "--output_dir", str(tmp_path / "E")]) == 2
    assert "not: in prompt 1" in capsys.readouterr().err
