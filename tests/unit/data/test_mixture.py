"""Several datasets as one: shares, samples, and where each pair comes from."""

import json

import pytest

from ropo.cli.main import main
from ropo.data.load import load_pairs
from ropo.data.mixture import Mixture, load_mixture, named_mixture
from ropo.data.problems import render
from ropo.data.validate import read_checked


def rows(name, number):
    return [{"prompt": f"{name} {i} ?", "chosen": f" {name}", "rejected": f" no {i}"} for i in range(number)]


@pytest.fixture
def files(tmp_path):
    """Of 40 and 9 pairs, the second with a bad first row."""
    for name, content in (("a", rows("a", 40)), ("b", [{"prompt": "b"}, *rows("b", 9)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return [str(tmp_path / f"{name}.jsonl") for name in "ab"]


def by_part(pairs):
    names = [pair.source.rpartition(":")[0][-7:] for pair in pairs]
    return [names.count("a.jsonl"), names.count("b.jsonl")]


def test_all_pairs_without_shares(files):
    """Rows count on; pairs and problems name their file, and the row and the line there."""
    loaded = load_mixture(Mixture(parts=tuple(files)))
    assert by_part(loaded.pairs) == [40, 9]
    assert [pair.row for pair in loaded.pairs] == [*range(40), *range(41, 50)]
    assert loaded.pairs[40].source == f"{files[1]}:1"
    assert loaded.num_rows == 50
    assert f"- row 40 ({files[1]}:0, line 1): a row needs chosen" in render(loaded.problems)


@pytest.mark.parametrize(("shares", "most", "counts"), [
    ((0.7, 0.3), None, [21, 9]),  # b runs out first
    ((0.9, 0.1), None, [40, 4]),  # a does
    ((0.5, 0.5), 11, [6, 5]),
    ((0.5, 0.5), 1000, [9, 9]),
    ((1 / 3, 2 / 3), 9, [3, 6]),
])  # fmt: skip
def test_shares_hold_and_no_pair_is_drawn_twice(shares, most, counts, files, caplog):
    caplog.set_level("INFO", "ropo")
    loaded = load_mixture(Mixture(parts=tuple(files), shares=shares), max_samples=most)
    assert by_part(loaded.pairs) == counts
    assert len({pair.row for pair in loaded.pairs}) == sum(counts)
    assert f"a.jsonl {counts[0]} of 40" in caplog.text
    assert f"b.jsonl {counts[1]} of 9" in caplog.text


def test_the_seed_decides_the_sample(files):
    """A pair keeps its row, whatever is drawn; the hash is that of the sample."""
    whole = {pair.id: pair.row for pair in load_pairs(files[0]).pairs}
    first, again, other = (load_mixture(files[0], max_samples=8, seed=seed) for seed in (0, 0, 1))
    assert first.pairs == again.pairs != other.pairs
    assert first.sha256 == again.sha256 != other.sha256
    assert [whole[pair.id] for pair in first.pairs] == [pair.row for pair in first.pairs]
    assert len(first.pairs) == first.num_rows == 8
    assert load_mixture(files[0], max_samples=40).sha256 == load_pairs(files[0]).sha256


def test_copies_are_found_across_datasets(files):
    copy = [rows("a", 1)[0], dict(zip(("prompt", "rejected", "chosen"), rows("a", 2)[1].values(), strict=True))]
    _, _, problems = read_checked(Mixture(parts=(files[0], copy)))
    assert [(problem.kind, problem.row) for problem in problems] == [("duplicate", 40), ("contradictory", 41)]
    assert f"row 41 (dataset 2:1): the pair prefers the opposite of row 1 ({files[0]}:1)." in render(problems)


def test_names_with_and_without_shares(tmp_path):
    assert named_mixture("a.jsonl, b.jsonl").parts == ("a.jsonl", "b.jsonl")
    assert named_mixture("owner/a:0.25,b.jsonl:0.75").shares == (0.25, 0.75)
    (tmp_path / "odd, name:0.5.jsonl").write_text("")
    assert named_mixture(str(tmp_path / "odd, name:0.5.jsonl")) == str(tmp_path / "odd, name:0.5.jsonl")


@pytest.mark.parametrize(("text", "message"), [
    ("a.jsonl:0.5,b.jsonl", "a share"),
    ("a.jsonl:0.5,b.jsonl:0.6", "together 1; got 0.5, 0.6"),
    ("a.jsonl:-0.5,b.jsonl:1.5", "above 0"),
    ("a.jsonl,,b.jsonl", "comma"),
])  # fmt: skip
def test_refused(text, message):
    with pytest.raises(ValueError, match=message):
        named_mixture(text)


def test_validate_reads_all(files, capsys):
    assert main(["validate", ",".join(files)]) == 1
    out = capsys.readouterr().out
    assert "50 rows, 49 pairs, layout text." in out
    assert f"({files[1]}:0, line 1)" in out
    assert main(["validate", f"{files[0]},{files[1]}x"]) == 2
    assert "b.jsonlx" in capsys.readouterr().err
