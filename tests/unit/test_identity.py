"""Whose an output folder is."""

import copy
import json
import shutil

import pytest
import torch

from ropo.config import ROPOConfig
from ropo.models.source import Model
from ropo.run.identity import claim, identity_of


def identity(model, tmp_path, **options):
    usual = {"output_dir": str(tmp_path / "O"), "use_cpu": True, "rounds": 2, "num_candidates": 2}
    return identity_of(ROPOConfig(**usual, **options), model, digests={}, date=None)


def test_a_judge_is_known_by_its_weights(model_folder, tmp_path):
    judge = tmp_path / "judge"
    shutil.copytree(model_folder, judge)
    found = []
    for number in range(2):
        (judge / "config.json").write_text(json.dumps({"number": number}))
        found.append(identity(Model(model_folder), tmp_path, judge="reward_model", judge_model=str(judge)))
    assert found[0]["options"] == found[1]["options"]
    assert found[0]["judge"] != found[1]["judge"]


def test_a_model_is_the_same_however_its_options_are_written(model_folder, tmp_path):
    ways = ({}, {"dtype": torch.float32}, {"dtype": "float32", "revision": None, "trust_remote_code": False})
    assert len({json.dumps(identity(Model(model_folder, load_options=one), tmp_path)) for one in ways}) == 1
    assert identity(Model(model_folder, load_options={"dtype": "bfloat16"}), tmp_path) != identity(
        Model(model_folder), tmp_path
    )


def test_a_run_of_a_version_with_other_options_is_told_by_what_differs(tmp_path):
    """An option that one version lacks and the other has left open would else be no difference to read of."""
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "manifest.json").write_text("{}")
    there = {"options": {"seed": 0, "gamma": None, "flip_rate": 0.1}}
    (tmp_path / "ropo_config.json").write_text(json.dumps(there))
    with pytest.raises(ValueError, match="other settings") as refused:
        claim(tmp_path, {"options": {"seed": 0, "loss_args": None}})
    told = str(refused.value).splitlines()[1:-1]
    assert told == ["  flip_rate: 0.1 there, None now", "  options of another version: gamma, loss_args"]
    assert json.loads((tmp_path / "ropo_config.json").read_text()) == there


@pytest.fixture
def hub(model_folder, model, tmp_path, monkeypatch):
    """A cache of the hub with two commits of someone/tiny that differ in one weight; main is the first."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    for commit in ("a", "b"):
        shutil.copytree(model_folder, repository / "snapshots" / (commit * 40))
    other = copy.deepcopy(model)
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(repository / "snapshots" / ("b" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "refs" / "main"


def test_a_hub_id_is_known_by_its_commit(hub, tmp_path):
    before = Model("someone/tiny")
    named = identity(before, tmp_path)
    hub.write_text("b" * 40)
    after = Model("someone/tiny")
    assert before.fingerprint() != after.fingerprint()
    weights = [one.load().lm_head.weight[0, 0].item() for one in (before, after)]
    assert weights[1] - weights[0] == pytest.approx(1, abs=1e-5)
    # A run that has begun goes on with the commit that it began with where that one is asked for.
    assert identity(Model("someone/tiny", load_options={"revision": "a" * 40}), tmp_path) == named
    (tmp_path / "O" / "rounds").mkdir(parents=True)
    (tmp_path / "O" / "rounds" / "manifest.json").write_text("{}")
    (tmp_path / "O" / "ropo_config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=f"add --model_revision {'a' * 40}"):
        claim(tmp_path / "O", identity(after, tmp_path))


def test_a_judge_on_the_hub_is_known_by_its_commit(hub, tmp_path, model_folder):
    options = {"judge": "reward_model", "judge_model": "someone/tiny"}
    before = identity(Model(model_folder), tmp_path, **options)
    hub.write_text("b" * 40)
    assert identity(Model(model_folder), tmp_path, **options)["judge"] != before["judge"]


def test_a_model_in_a_subfolder_is_known_by_its_weights(model_folder, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(model_folder, folder)
    (folder / "best").mkdir()
    found = [Model(folder).fingerprint()]
    for number in range(2):
        (folder / "best" / "model.safetensors").write_bytes(bytes([number]))
        found.append(Model(folder, load_options={"subfolder": "best"}).fingerprint())
    assert len(set(found)) == 3


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_training_that_is_half_done_is_not_lost_to_another_option(is_linked, tmp_path):
    """No stage is done yet, and a checkpoint is there; a round's folder may be on another disk."""
    place = tmp_path / ("elsewhere" if is_linked else "O/rounds/00")
    (place / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (place / "checkpoints" / "checkpoint-4" / "complete.json").write_text("{}")
    if is_linked:
        (tmp_path / "O" / "rounds").mkdir(parents=True)
        (tmp_path / "O" / "rounds" / "00").symlink_to(place)
    (tmp_path / "O" / "ropo_config.json").write_text(json.dumps({"options": {"seed": 0}}))
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        claim(tmp_path / "O", {"options": {"seed": 1}})


def test_what_another_run_writes_to_the_cache_stays(tmp_path):
    for name in ("O/shared/reference/.a.safetensors.0123abcd", "O/rounds/.a.json.0123abcd"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    claim(tmp_path / "O", {}, cache=tmp_path / "O" / "shared")
    assert [path.name for path in tmp_path.rglob(".*")] == [".a.safetensors.0123abcd"]
