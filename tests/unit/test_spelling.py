"""A misspelt path is no question to the hub."""

import socket
from pathlib import Path

import pytest

from ropo.cli.main import main
from ropo.data.load import load_pairs
from ropo.models.source import find_model
from ropo.spelling import did_you_mean_path, is_misspelt_path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with data/pairs.jsonl and models/tiny, and no network."""
    for place in ("data", "models/tiny"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "data" / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("data/pars.jsonl", r"got data/pars\.jsonl: file not found\. Did you mean data/pairs\.jsonl\?$"),
        ("data/pairs", r"Did you mean data/pairs\.jsonl\? If it is on the hub, start where there is no folder data\.$"),
        ("./data/pars.jsonl", r"Did you mean data/pairs\.jsonl\?$"),
        ("dta/pairs.jsonl", r"There is no folder dta\.$"),
        ("data/xyz.csv", r"Check the path\.$"),
    ],
)
def test_data(source, said, folder):
    for given in (source, Path(source)):
        with pytest.raises(FileNotFoundError, match=said):
            load_pairs(given)


def test_a_model(folder):
    with pytest.raises(FileNotFoundError, match=r"got 'models/tny': .* models/tiny\?"):
        find_model("models/tny")
    assert find_model("owner/name") == "owner/name"


def test_nothing_is_asked_of_the_hub_before_every_path_is_looked_at(folder, capsys):
    """Whichever of model and data is the hub's, the other one's path is found wrong first."""
    for command in ("train", "audit"):
        for model, data, said in (
            ("models/tny", "owner/name", "Did you mean models/tiny?"),
            ("owner/name", "data/pars.jsonl", "Did you mean data/pairs.jsonl?"),
        ):
            words = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", "O", "--use_cpu"]
            assert main([command, *words]) == 2
            assert said in capsys.readouterr().err
    words = ["--model_name_or_path", "owner/name", "--dataset_name", "data/pairs.jsonl", "--eval_dataset_name", "e.csv"]
    assert main(["train", *words, "--output_dir", "O", "--use_cpu"]) == 2
    assert "e.csv: file not" in capsys.readouterr().err
    assert main(["validate", "data/pars.jsonl", "--model_name_or_path", "owner/name"]) == 2
    assert "mean data/pairs.jsonl?" in capsys.readouterr().err


def test_names_of_the_hub_stay_names(folder):
    for name in ("owner/name", "imdb", "OpenHermes-2.5"):
        assert not is_misspelt_path(name)
    assert is_misspelt_path("data/pairs")
    assert not is_misspelt_path("data/x")  # a folder of downloads that is called like the owner on the hub


def test_a_folder_that_may_not_be_read(folder, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", lambda _: (_ for _ in ()).throw(PermissionError()))
    assert did_you_mean_path(Path("data/pars.jsonl")) == ""
