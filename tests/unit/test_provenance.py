"""Whole files or none, and digests that see what matters."""

import os
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from ropo.provenance import (
    DamagedFileError,
    DiskFullError,
    hash_tensors,
    hash_value,
    is_leftover,
    read_json,
    remove_leftovers,
    versions,
    write_aside,
    write_json,
)


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


def test_a_folder_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    """The old one is renamed, not removed, before the new one takes its place."""
    path, seen = tmp_path / "folder", []
    rename = Path.rename

    def watched(self, target):
        seen.append((Path(target) == path, sorted(one.name for one in tmp_path.iterdir() if (one / "file").exists())))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    for text in ("old", "new"):
        with write_aside(path) as aside:
            aside.mkdir()
            (aside / "file").write_text(text)
    assert (path / "file").read_text() == "new"
    assert seen[-1][0]
    assert len(seen[-1][1]) == 2  # the old one aside, and the new one


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """Else a machine that loses power leaves an empty file of the right name."""
    order, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append(Path(f"/proc/self/fd/{fd}").readlink()) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append("renamed") or replace(self, to))
    write_json(tmp_path / "a.json", 1)
    assert [one if one == "renamed" else one.is_dir() or one.name[:7] for one in order] == [".a.json", "renamed", True]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(9000)),
        lambda path: save_file({"a": torch.zeros(9000)}, path),
        lambda path: torch.save({"a": torch.zeros(9000)}, path),
        lambda path: torch.save(list(range(900)), path),
        lambda path: pq.write_table(pa.table({"a": list(range(9000))}), path),
    ],
    ids=["python", "safetensors", "torch", "torch-small", "parquet"],
)
def test_a_full_disk_is_said(write, tmp_path):
    """Each library says it in another way, or not at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(DiskFullError, match=r"a\.bin .*more room"),
            write_aside(tmp_path / "a.bin") as aside,
        ):
            write(aside)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), write_aside(tmp_path / "a.bin"):
        raise PermissionError(13, "Permission denied")


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"x": [1, 2')
    with pytest.raises(DamagedFileError, match=r"a\.json .*damaged .*JSON"):
        read_json(tmp_path / "a.json")


def test_leftovers_of_killed_runs(tmp_path):
    """Ours and those of safetensors, whole folders, too; nothing that a user could have named so or that is in use."""
    left = [".a.json.0123abcd", "deep/.model.partial/weights", "deep/.tmpAb3xYz", ".model.89abcdef/config.json"]
    stay = ["a.json", ".hidden", ".gitignore", "deep/.model.partially", ".a.json.0123abcg", "tmp123456", "x.partial"]
    stay += ["busy/ropo.lock", "busy/deep/.a.json.0123abcd"]
    for name in [*left, *stay]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, lock_file="ropo.lock")
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()) == sorted(stay)
    with write_aside(tmp_path / "b.json") as aside:
        assert is_leftover(aside)
        aside.touch()


def test_leftovers_in_a_cache_go_when_they_are_old(tmp_path):
    for name in ("new", "old"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / ".a.json.0123abcd").touch()
    os.utime(tmp_path / "cache" / "old" / ".a.json.0123abcd", (0, 0))
    remove_leftovers(tmp_path, lock_file="ropo.lock", caches=[tmp_path / "cache"])
    assert [path.parent.name for path in tmp_path.rglob(".a*")] == ["new"]


def test_links_are_removed_and_what_they_lead_to_stays(tmp_path):
    """A user may have moved a model to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "weights").touch()
    for name in ("model", ".a.json.0123abcd"):
        (tmp_path / "O").mkdir(exist_ok=True)
        (tmp_path / "O" / name).symlink_to(tmp_path / "disk")
    remove_leftovers(tmp_path / "O", lock_file="ropo.lock")
    with write_aside(tmp_path / "O" / "model") as aside:
        aside.mkdir()
    assert [path.name for path in (tmp_path / "O").iterdir()] == ["model"]
    assert not (tmp_path / "O" / "model").is_symlink()
    assert (tmp_path / "disk" / "weights").exists()


def test_who_may_read_a_file_is_what_the_umask_says(tmp_path):
    """safetensors lets nobody but the user read what it writes."""
    (tmp_path / "usual").touch()
    with write_aside(tmp_path / "a.safetensors") as aside:
        save_file({"a": torch.zeros(1)}, aside)
    with write_aside(tmp_path / "model") as aside:
        aside.mkdir()
        save_file({"a": torch.zeros(1)}, aside / "model.safetensors")
    modes = {(tmp_path / name).stat().st_mode for name in ("usual", "a.safetensors", "model/model.safetensors")}
    assert len(modes) == 1


def test_a_mount_without_modes_is_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "chmod", refuse)
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}


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
