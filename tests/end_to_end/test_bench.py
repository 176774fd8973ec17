"""`ropo bench` as a user types it, on a model that has learned nothing, so that it costs seconds."""

import pytest

from ropo.cli.main import main
from ropo_bench.rows import read_rows
from ropo_bench.toy import make_model, make_tokenizer

GRID = """\
task: reviews
num_pairs: 24
num_held_out: 10
num_samples: 4
num_trials: 1
seeds: [1]
noise:
  symmetric: [0.0, 0.25]
methods: [ceiling, dpo]
options: {use_cpu: true}
"""


@pytest.fixture
def output(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(tmp_path / "out" / "tasks" / "reviews")
    tokenizer.save_pretrained(tmp_path / "out" / "tasks" / "reviews")
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path / "out"


def bench(output, *more):
    return main(["bench", "--config", str(output.parent / "grid.yaml"), "--output_dir", str(output), *more])


@pytest.mark.slow
def test_bench_measures_publishes_and_goes_on(output, capsys):
    assert bench(output, "--num_processes", "1") == 0
    said = capsys.readouterr().out
    assert "{'" not in said  # what trainers print
    assert "Forward:" not in said  # and log
    assert "[2/2]" in said
    assert "[3/3] dpo on symmetric" in said
    assert str(output / "results.md") in said
    rows = read_rows(output / "results.csv")
    assert {(row["method"], row["flip_rate"]) for row in rows} == {
        ("dpo", "0"), ("ceiling", "0.25"), ("dpo", "0.25")
    }  # fmt: skip
    assert len(read_rows(output / "trials.csv")) == 2
    assert (output / "reviews_24_accuracy.svg").exists()
    before = (output / "results.csv").read_bytes()
    assert bench(output, "--num_processes", "1") == 0
    assert (output / "results.csv").read_bytes() == before
    assert "[1/" not in capsys.readouterr().out


@pytest.mark.slow
def test_several_processes_measure_what_one_does(output, tmp_path):
    assert bench(output, "--num_processes", "2") == 0
    rows = read_rows(output / "results.csv")
    assert len(rows) == 3
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)


def test_misuse_is_told_before_anything_is_made(output, capsys):
    (output.parent / "grid.yaml").write_text(GRID.replace("dpo]", "dpoo]"))
    assert bench(output) == 2
    assert "mean dpo" in capsys.readouterr().err
    assert not (output / "results.csv").exists()
