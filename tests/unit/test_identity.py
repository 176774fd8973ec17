"""Whose an output folder is."""

import json

import pytest

from ropo.run.identity import claim


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
