"""Results appear together: the model first, the summary last; a run without room leaves those of the run before."""

import os
import resource
from pathlib import Path

import pytest

from ropo.config import ROPOConfig
from ropo.provenance import DiskFullError, hash_file, read_json
from ropo.run.align import run_rounds
from ropo.run.ledger import read_ledger
from ropo.stages import Stages


def config(folder, **options):
    common = {
        "output_dir": str(folder), "learning_rate": 3e-3, "per_device_train_batch_size": 10, "max_length": 64,
        "num_candidates": 0, "use_cpu": True, "disable_tqdm": True, "rho": "0", "rounds": 1, "num_folds": 0,
    }  # fmt: skip
    return ROPOConfig(**{**common, **options})


def test_the_summary_comes_last(model_folder, pairs, tmp_path, monkeypatch):
    folder, order, replace = tmp_path / "run", [], Path.replace

    def watched(self, target):
        if Path(target).parent == folder and ".results.partial" in self.parts:
            order.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    run_rounds(model_folder, pairs, config(folder))
    assert {"model.safetensors", "config.json", "tokenizer.json", "ledger.parquet", "README.md"} <= set(order[:-4])
    assert order[-4:] == ["report.html", "report.json", "report.md", "summary.json"]
    assert not (folder / ".results.partial").exists()
    order.clear()
    run_rounds(model_folder, pairs, config(folder))
    assert "model.safetensors" not in order  # it is there already, and need not take its room again


def test_the_weights_are_on_the_disk_twice_at_most(model_folder, pairs, tmp_path, monkeypatch):
    """In training two checkpoints for a moment; then one and the model; then the model and the published one."""
    folder, fsync, seen = tmp_path / "run", os.fsync, []
    one = (model_folder / "model.safetensors").stat().st_size

    def watched(descriptor):
        sizes = [path.stat().st_size for path in folder.rglob("model.safetensors")]
        seen.append(sum(sizes) / one)
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    run_rounds(model_folder, pairs, config(folder, num_train_epochs=4, num_folds=2, rho="0.3"))
    assert 1.9 < max(seen) < 2.1


def test_no_room_for_the_results(model_folder, pairs, tmp_path):
    """What was published before stays as it was, and the same command ends when there is room."""
    folder = tmp_path / "run"
    run_rounds(model_folder, pairs, config(folder))
    before = {path.name: hash_file(path) for path in folder.iterdir() if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / "report.html").stat().st_size - 9, hard))
    try:
        with pytest.raises(DiskFullError, match=r"report\.html .*more room"):
            run_rounds(model_folder, pairs, config(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {path.name: hash_file(path) for path in folder.iterdir() if path.is_file()}
    assert {name: after[name] for name in before if name != "ropo.lock"} == {
        name: before[name] for name in before if name != "ropo.lock"
    }
    run_rounds(model_folder, pairs, config(folder))


def test_killed_while_results_are_written(model_folder, pairs, tmp_path, monkeypatch):
    """Temporary files are cleared by the next start, whose model and ledger are those of the run."""
    folder, replace = tmp_path / "run", Path.replace

    def dying(self, target):
        if Path(target) == folder / "ledger.parquet":
            (folder / ".summary.json.0123abcd").touch()  # `finally` does not run where a process is killed
            (folder / "rounds" / "00" / ".model.partial").mkdir()
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            run_rounds(model_folder, pairs, config(folder))
    assert not (folder / "summary.json").exists()
    run_rounds(model_folder, pairs, config(folder))
    weights = [hash_file(path / "model.safetensors") for path in (folder, folder / "rounds" / "00" / "model")]
    assert weights[0] == weights[1]
    assert len(read_ledger(folder / "ledger.parquet")) == read_json(folder / "summary.json")["num_pairs"]
    assert not list(folder.rglob(".*.partial"))
    assert not (folder / ".summary.json.0123abcd").exists()


def test_a_folder_that_was_never_claimed(model_folder, pairs, tmp_path):
    """Killed in its first file: what that leaves is no one else's."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".ropo_config.json.0123abcd").write_text("{")
    run_rounds(model_folder, pairs, config(folder))
    assert not (folder / ".ropo_config.json.0123abcd").exists()


def test_checkpoints_stay_until_nobody_can_ask_for_them(tmp_path, monkeypatch):
    """Killed before the manifest says that a stage is done, the stage goes on from them, and not from the start."""
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    seen = []

    def watched(path, value):
        seen.append((tmp_path / "checkpoints").exists())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ropo.stages.write_json", watched)
        with pytest.raises(KeyboardInterrupt):
            Stages(tmp_path).run("train", 1, [], lambda: None, scratch="checkpoints")
    assert seen == [True]
    Stages(tmp_path).run("train", 1, [], lambda: None, scratch="checkpoints")
    assert not (tmp_path / "checkpoints").exists()
