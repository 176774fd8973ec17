"""Whose an output folder is."""

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
