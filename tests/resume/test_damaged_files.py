"""Files that a stage reads are what an earlier one wrote, or they are made again, or the run stops and names them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ropo import stages
from ropo.config import ROPOConfig
from ropo.provenance import DamagedFileError, hash_file, read_json, write_json
from ropo.run.align import run_audit, run_rounds
from ropo.stages import Stages

MADE_AGAIN = (
    "reference/reference_logps.safetensors", "reference/manifest.json",
    "audit/features/margins.safetensors", "audit/features/scorers.json", "audit/features/manifest.json",
    "audit/margins.safetensors", "audit/judgement.json", "audit/scorers.json", "audit/manifest.json",
    "rounds/00/model/model.safetensors", "rounds/00/model/config.json", "rounds/00/first_margins.safetensors",
    "rounds/00/training_log.json", "rounds/00/scores.safetensors", "rounds/00/flips.safetensors",
    "rounds/00/decisions.json", "rounds/00/flip_estimate.json", "rounds/00/manifest.json",
    "rounds/00/resampled.jsonl", "rounds/00/resampled_reference.safetensors", "rounds/00/resampling.json",
    "rounds/01/scores.safetensors", "evaluation/round_01.safetensors",
)  # fmt: skip


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 10, "max_length": 64,
        "max_new_tokens": 12, "num_candidates": 4, "use_cpu": True, "disable_tqdm": True, "rho": "0.3", "rounds": 2,
        "num_folds": 2, "decision_rule": "lowest_loss", "max_repetition": 1.0, "max_resampled_share": 1.0,
        "max_length_ratio": 30.0,
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file but those that name times and places."""
    skip = ("manifest.json", "README.md", "ropo_config.json", "summary.json")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "reference_cache" not in path.parts)
    return {
        str(path.relative_to(folder)): hash_file(path)
        for path in files
        if path.name not in skip and path.stem != "report"
    }


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path):
    """One bit of the last digit or number; the file can still be read, and says something else."""
    content = bytearray(path.read_bytes())
    place = max((i for i, byte in enumerate(content) if chr(byte).isdigit()), default=len(content) - 2)
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def tiny(tokenizer, tmp_path_factory):
    """A model folder for the whole module."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_rounds(tiny, pairs[:16], config(folder), eval_dataset=pairs[16:])
    return folder


@pytest.mark.parametrize("name", ["fold_1.safetensors", "manifest.json"])
def test_a_damaged_file_of_a_fold_is_made_again(name, tiny, pairs, tmp_path, caplog):
    folder = tmp_path / "run"
    run_audit(tiny, pairs[:16], config(folder, scorer="models"))
    before, damage = contents(folder), cut if "manifest" in name else flip
    damage(folder / "audit" / "models" / name)
    run_audit(tiny, pairs[:16], config(folder, scorer="models"))
    assert contents(folder) == before
    assert f"{folder / 'audit' / 'models' / name} is damaged" in caplog.text


@pytest.mark.parametrize("name", MADE_AGAIN)
def test_a_damaged_file_is_made_again(name, tiny, pairs, finished, caplog):
    before, damage = (
        contents(finished),
        cut if "manifest" in name else flip,
    )  # a flip may be in its seconds, which count for nothing
    damage(finished / name)
    run_rounds(tiny, pairs[:16], config(finished), eval_dataset=pairs[16:])
    assert contents(finished) == before
    assert f"{finished / name} is damaged" in caplog.text


def test_a_damaged_sample_is_made_again_with_the_model_half_way(tiny, pairs, tmp_path, caplog):
    """That model was removed when the samples were finished, so its training is repeated."""
    folder = tmp_path / "run"

    def run():
        run_rounds(tiny, pairs[:16], config(folder, selection_rule="uncertainty_aware"))

    run()
    before = contents(folder)
    flip(folder / "rounds" / "00" / "resampling.json")
    run()
    assert contents(folder) == before
    assert "00/train is made" in caplog.text


def test_every_file_of_a_run_is_watched(finished):
    """What stands beside these is shards under names that are digests, and what is written anew at every start."""
    sums = [set(made["files"]) for made in read_json(finished / "rounds" / "00" / "manifest.json").values()]
    watched = set().union(*sums) | {"manifest.json"}
    there = {str(path.relative_to(finished / "rounds" / "00")) for path in (finished / "rounds" / "00").rglob("*")}
    assert {name for name in there if "samples" not in name} - {"model"} == watched


def test_a_damaged_identity_stops_the_run(tiny, pairs, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    cut(folder / "ropo_config.json")
    with pytest.raises(DamagedFileError, match=r"run/ropo_config\.json .*damaged .*output_dir"):
        run_rounds(tiny, pairs[:16], config(folder))


def test_a_damaged_audit_is_not_taken_from(tiny, pairs, finished, tmp_path):
    source = tmp_path / "audit"
    run_audit(tiny, pairs, config(source))
    flip(source / "audit" / "margins.safetensors")
    with pytest.raises(DamagedFileError, match=r"margins\.safetensors .*damaged: .*Run"):
        run_audit(tiny, pairs, config(tmp_path / "run", audit_from=str(source)))
    cut(source / "ropo_config.json")
    with pytest.raises(DamagedFileError, match=r"audit/ropo_config\.json .*damaged .*audit_from"):
        run_audit(tiny, pairs, config(tmp_path / "another", audit_from=str(source)))


def test_what_is_made_again_otherwise_is_made_from_again(tmp_path):
    """Two stages; the first one's file is damaged and comes out otherwise: on another machine, say."""
    made = []

    def run(value):
        these = Stages(tmp_path)
        digest = these.run(
            "one", 1, ["one.json"], lambda: write_json(tmp_path / "one.json", value) or made.append("one")
        )
        return these.run("two", digest, ["two"], lambda: (tmp_path / "two").touch() or made.append("two"))

    first = run("a")
    for value, expected in (("a", ["one"]), ("b", ["one", "two"]), ("b", ["one"])):
        made.clear()
        cut(tmp_path / "one.json")
        last = run(value)
        assert made == expected
        assert (last == first) == (value == "a")
        made.clear()
        assert run(value) == last
        assert made == []


def test_all_of_a_folder_is_watched(tmp_path, caplog):
    def make():
        (tmp_path / "model" / "deep").mkdir(parents=True, exist_ok=True)
        save_file({}, tmp_path / "model" / "deep" / "a.safetensors")

    Stages(tmp_path).run("train", 1, ["model"], make)
    (tmp_path / "model" / "deep" / "a.safetensors").unlink()
    Stages(tmp_path).run("train", 1, ["model"], make)
    assert "model/deep/a.safetensors is missing. " in caplog.text
    assert stages.Stages(tmp_path).seconds.keys() == {"train"}
