"""One run owns an output folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ropo.config import ROPOConfig
from ropo.run import align
from ropo.run.align import run_audit, run_rounds
from ropo.run.lock import LOCK_FILE, owning

HOLDING = f"""
import sys, time
from filelock import SoftFileLock
with SoftFileLock(sys.argv[1] + "/{LOCK_FILE}"):  # as `owning` does it, without the time to import torch
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `O`."""
    (tmp_path / "O").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path / "O")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def enter(folder):
    with owning(folder):
        return sorted(path.name for path in folder.iterdir())


def test_a_second_run_is_refused_until_the_first_is_dead(holder, tmp_path):
    folder = tmp_path / "O"
    holders = rf"O is in use by process {holder.pid} on \S+\. Wait for that run, .*remove \S+/{LOCK_FILE}\."
    with pytest.raises(ValueError, match=holders):
        enter(folder)
    assert (folder / LOCK_FILE).exists()
    holder.kill()
    holder.wait()
    assert enter(folder) == [LOCK_FILE]
    assert not any(folder.iterdir())


def test_the_file_is_called_as_the_documents_say():
    """An output folder of another version may hold it, so its name outlives the module's."""
    assert LOCK_FILE == "ropo.lock"
    assert f"(`{LOCK_FILE}`)" in (Path(__file__).parents[2] / "docs" / "outputs.md").read_text("utf-8")


def test_it_names_this_process(tmp_path):
    with owning(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().split()[0] == str(os.getpid())
        with pytest.raises(ValueError, match=f"by process {os.getpid()} on "):
            enter(tmp_path)


def test_a_run_on_another_host_may_be_alive(tmp_path):
    (tmp_path / LOCK_FILE).write_text("4711\nnode17\n")
    with pytest.raises(ValueError, match=r"process 4711 on node17\. .*another"):
        enter(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_released_however_it_ends(error, tmp_path):
    def fail():
        with owning(tmp_path / "new" / "O"):
            (tmp_path / "new" / "kept").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "O").write_text("x")
    with pytest.raises(ValueError, match=r"output_dir .*written to; .*O: "):
        enter(tmp_path / "O")


def test_other_processes_of_a_launch_are_not_refused(tmp_path, monkeypatch):
    with owning(tmp_path / "O"):
        monkeypatch.setenv("RANK", "1")
        assert enter(tmp_path / "O") == [LOCK_FILE]
        assert (tmp_path / "O" / LOCK_FILE).exists()


@pytest.mark.parametrize("run", [run_rounds, run_audit])
def test_runs_take_it_before_they_read(run, holder, tmp_path):
    with pytest.raises(ValueError, match="use by process"):
        run("no/such/model", tmp_path / "no_such_file", ROPOConfig(output_dir=str(tmp_path / "O"), use_cpu=True))
    assert [path.name for path in (tmp_path / "O").iterdir()] == [LOCK_FILE]


def test_a_lock_is_no_foreign_file(tmp_path, pairs, model_folder, monkeypatch):
    """And it is gone when the run is over, so that the folder may be uploaded as it is."""
    seen: list[Path] = []
    monkeypatch.setattr(align, "run_all", lambda _, setup, **__: seen.extend(setup.folder.parent.iterdir()))
    monkeypatch.setattr(align, "publish", lambda *_: None)
    monkeypatch.setattr(align, "upload", lambda *_, **__: None)
    monkeypatch.setattr(align.RunResult, "load", lambda _: None)
    run_rounds(model_folder, pairs, ROPOConfig(output_dir=str(tmp_path / "O"), num_folds=0, rho="0", use_cpu=True))
    assert LOCK_FILE in {path.name for path in seen}
    assert not (tmp_path / "O" / LOCK_FILE).exists()
