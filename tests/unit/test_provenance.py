"""Whole files or none, and digests that see what matters."""

import pytest
import torch

from ropo.provenance import hash_tensors, hash_value, read_json, versions, write_aside, write_json


def test_write_aside_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def fail_half_way():
        with write_aside(path) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_write_aside_replaces_folders(tmp_path):
    for text in ("old", "new"):
        with write_aside(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / "file").write_text(text)
    assert (tmp_path / "folder" / "file").read_text() == "new"


def test_hashes():
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    digest = hash_tensors(tensors)
    assert hash_tensors(dict(reversed(tensors.items()))) == digest
    assert hash_tensors({**tensors, "a": torch.zeros(3, 2)}) != digest
    assert hash_tensors({**tensors, "a": torch.zeros(2, 3, dtype=torch.float64)}) != digest
    changed = torch.zeros(2, 3)
    changed[1, 2] = 1e-30
    assert hash_tensors({**tensors, "a": changed}) != digest
    assert hash_value({"a": 1}) != hash_value({"a": 2})


def test_versions():
    assert {"python", "torch", "ropo"} <= set(versions())
