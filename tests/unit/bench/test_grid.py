import json
import multiprocessing
import time

import numpy as np
import pytest

from ropo.data.inject import NOISE
from ropo_bench import cell as cell_module
from ropo_bench import grid
from ropo_bench.cell import NUM_SEEN_BY_WEAK_ANNOTATOR, NUM_SPARE, Cell, make_task, measure, named, plant
from ropo_bench.grid import best_setting, missing_cells, missing_trials, run_bench
from ropo_bench.grid_config import BenchConfig, read_bench_config
from ropo_bench.methods import METHODS, trials_of
from ropo_bench.rows import KEY, append_row, read_rows
from ropo_bench.word_reward import fit_on_pairs

SMALL = {"num_pairs": 24, "num_held_out": 10, "num_samples": 4, "num_trials": 2, "options": {"use_cpu": True}}


def config(**more):
    given = {"task": "reviews", "seeds": (1, 2), "noise": {"symmetric": [0.0, 0.25]}, "methods": ("dpo", "ceiling")}
    return BenchConfig(**{**given, **SMALL, **more})


def row(method="dpo", accuracy=0.9, gold=1.0, **more):
    """A row of the tuning cell."""
    return {
        "task": "reviews",
        "num_pairs": 24,
        "kind": "symmetric",
        "flip_rate": 0.2,
        "seed": 100,
        "method": method,
        "options": json.dumps({"learning_rate": 1e-4}),
        "accuracy": accuracy,
        "gold": gold,
        "kl": 1.0,
        **more,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "review"}, "task needs one of .*; got 'review'. Did you mean reviews"),
        ({"methods": ("dpoo",)}, "Did you mean dpo"),
        ({"noise": {"symetric": [0.1]}}, "Did you mean symmetric"),
        ({"noise": {"symmetric": [0.5]}}, r"rates in \[0, 0.5\); got 0.5 for symmetric"),
        ({"seeds": (1, 100)}, "got 100, which is in seeds"),
        ({"tuned": {"dpo2": {}}}, "methods needs one of"),
        ({"num_pairs": 3}, "num_pairs needs 10 or more; got 3"),
        ({"options": {"max_lenght": 64}}, "Did you mean max_length"),
        ({"tuned": {"dpo": {"learning_rat": 1e-4}}}, "Did you mean learning_rate"),
        ({"tuned": {"ropo": {"beta": 0.1}}}, "tuned needs methods of this grid.*got ropo"),
        (
            {"methods": ("ropo_shipped",), "tuned": {"ropo_shipped": {"beta": 0.1}}},
            "tuned needs methods of this grid that are tuned themselves; got ropo_shipped",
        ),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "holds a list"),
        ("task: reviews\nseed: [1]\n", "unknown option 'seed'. Did you mean seeds"),
        ("task: reviews\n", "needs seeds, noise, methods"),
        ("task: reviews\nseeds: 1\nnoise: {symmetric: [0.2]}\nmethods: [dpo]\n", r"needs seeds like \[1, 2\]; got 1"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(tmp_path, text, message):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_bench_config(path)
    with pytest.raises(ValueError, match="is not there"):
        read_bench_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["quick", "toy", "support"])
def test_the_grids_that_we_ship_can_be_read(name, request):
    found = read_bench_config(request.config.rootpath / "benchmarks" / f"{name}.yaml")
    assert {"dpo", "ropo", "ceiling"} <= set(found.methods)


def test_every_method_is_tried_as_often():
    tried = {
        name: len(trials_of(name, 6)) for name, method in METHODS.items() if not (method.like or method.is_shipped)
    }
    assert set(tried.values()) == {6}


def test_trials_of_an_own_parameter_cover_every_value_alike():
    trials = trials_of("holder", 6)
    for name, times in (("learning_rate", 2), ("beta", 3), ("holder_gamma", 2)):
        values = [trial[name] for trial in trials]
        assert {values.count(value) for value in values} == {times}


def test_the_setting_is_nearly_best_in_both_scores_and_of_these_the_nearest(tmp_path):
    path = tmp_path / "trials.csv"
    trials = [(0.90, 0.2, 1.0), (0.895, 0.9, 5.0), (0.892, 0.85, 3.0), (0.85, 2.0, 0.1), (np.nan, 9.0, 0.0)]
    for number, (accuracy, gold, kl) in enumerate(trials):
        append_row(path, row(accuracy=accuracy, gold=gold, kl=kl, options=json.dumps({"beta": number})))
    append_row(path, row(method="ceiling", accuracy=1.0, gold=5.0, kl=0.0))
    assert best_setting(config(), "dpo", path) == {"beta": 2}


def test_a_trial_without_a_gold_reward_is_none_of_the_best(tmp_path):
    """A judge may know nothing of its answers."""
    path = tmp_path / "trials.csv"
    for number, gold in enumerate((np.nan, 0.5)):
        append_row(path, row(accuracy=0.9, gold=gold, kl=1.0, options=json.dumps({"beta": number})))
    assert best_setting(config(), "dpo", path) == {"beta": 1}


def test_a_method_that_always_diverged_is_named(tmp_path):
    append_row(tmp_path / "trials.csv", row(accuracy=np.nan))
    with pytest.raises(RuntimeError, match="dpo diverged with"):
        best_setting(config(), "dpo", tmp_path / "trials.csv")


def test_a_variant_takes_over_the_setting_of_its_method(tmp_path):
    grid_with_variant = config(methods=("ropo_relabel",), tuned={"ropo": {"beta": 0.7}})
    assert missing_trials(grid_with_variant, tmp_path / "trials.csv") == []
    assert best_setting(grid_with_variant, "ropo_relabel", tmp_path / "trials.csv") == {"beta": 0.7}


def test_only_what_is_missing_is_to_do_whole_seeds_first(tmp_path):
    known = config(tuned={"dpo": {"beta": 0.1}, "ceiling": {"beta": 1.0}})
    results = tmp_path / "results.csv"
    cells = missing_cells(known, tmp_path / "trials.csv", results)
    # Without flips the ceiling is DPO itself.
    assert [(cell.seed, cell.flip_rate, cell.method) for cell in cells] == [
        (seed, rate, method) for seed in (1, 2) for rate, method in ((0.0, "dpo"), (0.25, "dpo"), (0.25, "ceiling"))
    ]
    append_row(results, row(flip_rate=0.25, seed=1, options=json.dumps({"beta": 0.1})))
    assert len(missing_cells(known, tmp_path / "trials.csv", results)) == len(cells) - 1
    append_row(results, row(flip_rate=0.25, seed=2, options=json.dumps({"beta": 0.2})))
    with pytest.raises(ValueError, match=r'dpo with {"beta": 0.2}; .* {"beta": 0.1}'):
        missing_cells(known, tmp_path / "trials.csv", results)


def test_as_shipped_nothing_is_tuned_and_every_learning_rate_has_a_row(tmp_path):
    trials, results = tmp_path / "trials.csv", tmp_path / "results.csv"
    shipped = config(
        methods=("dpo_shipped", "ropo_shipped"), seeds=(1,), noise={"symmetric": [0.25]}, learning_rates=(1e-4, 4e-4)
    )
    assert missing_trials(shipped, trials) == []
    cells = missing_cells(shipped, trials, results)
    assert [(cell.method, dict(cell.options)) for cell in cells] == [
        (method, {"learning_rate": rate}) for method in shipped.methods for rate in (1e-4, 4e-4)
    ]
    append_row(results, {**named(shipped, cells[0]), "accuracy": 0.9})
    append_row(results, {**named(shipped, cells[3]), "accuracy": 0.9})
    assert missing_cells(shipped, trials, results) == cells[1:3]


@pytest.mark.parametrize("kind", NOISE)
def test_every_kind_of_noise_can_be_planted(kind, small_task, tmp_path):
    task, spare = make_task(config(), tmp_path, 1)
    noisy, is_flipped = plant(task, kind, 0.25, 1, spare)
    assert is_flipped.sum() == 6
    assert [a.chosen == b.rejected for a, b in zip(noisy, task.pairs, strict=True)] == is_flipped.tolist()


def test_the_weak_annotator_errs_where_its_own_reward_does(small_task, tmp_path):
    task, spare = make_task(config(num_pairs=1000), tmp_path, 1)
    weak = fit_on_pairs(spare[:NUM_SEEN_BY_WEAK_ANNOTATOR])
    is_fooled = np.array([weak(p.prompt, p.rejected) > weak(p.prompt, p.chosen) for p in task.pairs])
    _, is_flipped = plant(task, "weak_annotator", 0.3, 1, spare)
    assert is_flipped[is_fooled].mean() > 0.5 > 0.25 > is_flipped[~is_fooled].mean()


def test_held_out_and_spare_pairs_are_not_those_of_training(small_task, tmp_path):
    task, spare = make_task(config(), tmp_path, 1)
    parts = [{pair.id for pair in pairs} for pairs in (task.pairs, task.held_out, spare)]
    assert [len(part) for part in parts] == [24, 10, NUM_SPARE]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_a_stopped_grid_goes_on_and_a_finished_one_does_nothing(small_task, tmp_path, monkeypatch):
    done = []

    def measured(config, cell, folder):
        if len(done) == 3:
            (folder / "work" / "dpo").mkdir(parents=True)
            raise KeyboardInterrupt
        done.append(cell)
        return {**named(config, cell), "accuracy": 0.9, "gold": 1.0, "kl": 1.0, "seconds": 1.0}

    monkeypatch.setattr(grid, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        run_bench(config(), tmp_path, num_processes=1)
    assert len(read_rows(tmp_path / "trials.csv")) == 3
    assert not (tmp_path / "work").exists()
    first, told = list(done), []
    done.append("past the stop")
    results = run_bench(config(), tmp_path, num_processes=1, on_row=lambda *what: told.append(what))
    assert not set(map(str, first)) & set(map(str, done[4:])), "what was there is not measured again"
    assert len(read_rows(tmp_path / "trials.csv")) == 4
    assert len(read_rows(results)) == 6
    assert told[0][1:] == (1, 1)
    run_bench(config(), tmp_path, num_processes=1, on_row=lambda *_: pytest.fail("nothing was missing"))


def test_an_interrupt_does_not_wait_for_cells(tmp_path):
    """One may take hours, and a scheduler's signal reaches this process alone."""

    def interrupted():
        with grid._Workers(config(), tmp_path, 2, 0) as workers:
            workers._pool.submit(time.sleep, 100)
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 20
    assert not multiprocessing.active_children()


def test_two_grids_in_one_folder(small_task, tmp_path, monkeypatch):
    def measured(*_):
        run_bench(config(), tmp_path, num_processes=1)

    monkeypatch.setattr(grid, "measure", measured)
    with pytest.raises(RuntimeError, match=r"by process \d+ on "):
        run_bench(config(), tmp_path, num_processes=1)


def test_a_folder_of_another_grid_is_not_gone_on_with(small_task, tmp_path, monkeypatch):
    """Options that all rows share are in no row, so they stand beside them."""
    monkeypatch.setattr(grid, "measure", lambda *_: pytest.fail("nothing should be measured"))
    known = {"dpo": {"beta": 0.1}}
    none = config(methods=("dpo",), tuned=known, noise={})
    run_bench(none, tmp_path, num_processes=1)
    run_bench(none, tmp_path, num_processes=1)
    other = config(methods=("dpo",), tuned=known, noise={}, options={"use_cpu": True, "num_train_epochs": 2})
    with pytest.raises(ValueError, match=r"options \{'use_cpu': True\};"):
        run_bench(other, tmp_path, num_processes=1)
    with pytest.raises(ValueError, match=r"num_processes .*; got 0"):
        run_bench(none, tmp_path, num_processes=0)


def test_a_task_that_needs_no_data_refuses_some(tmp_path):
    with pytest.raises(ValueError, match="needs no source"):
        make_task(config(source="reviews.zip"), tmp_path, 1)


def test_one_cell_that_fails_does_not_cost_the_others(small_task, tmp_path, monkeypatch):
    def measured(config, cell, folder):
        if cell.method == "ceiling" and cell.seed == 1:
            raise ValueError("no luck")
        return {**named(config, cell), "accuracy": 0.9, "gold": 1.0, "kl": 1.0, "seconds": 1.0}

    monkeypatch.setattr(grid, "measure", measured)
    with pytest.raises(RuntimeError, match=r"1 of 6 .*\n.*ceiling .* 25%, seed 1.*luck"):
        run_bench(config(), tmp_path, num_processes=1)
    assert len(read_rows(tmp_path / "results.csv")) == 5


def test_a_run_that_diverges_is_a_row_without_scores(small_task, tmp_path, monkeypatch):
    def diverge(*_):
        raise FloatingPointError("The loss is not finite")

    monkeypatch.setattr(cell_module, "run_method", diverge)
    found = measure(config(), Cell(method="dpo", kind="symmetric", flip_rate=0.25, seed=1, options={}), tmp_path)
    append_row(tmp_path / "trials.csv", found)
    assert read_rows(tmp_path / "trials.csv")[0]["accuracy"] == ""


def test_a_cell_is_measured_and_leaves_nothing_but_its_row(small_task, tmp_path):
    cell = Cell(
        method="ropo",
        kind="symmetric",
        flip_rate=0.25,
        seed=1,
        options={"learning_rate": 1e-3, "beta": 0.3, "num_folds": 2},
    )
    found = measure(config(), cell, tmp_path)
    append_row(tmp_path / "results.csv", found)
    [written] = read_rows(tmp_path / "results.csv")
    assert [written[name] for name in KEY] == ["reviews", "24", "symmetric", "0.25", "1", "ropo"]
    assert 0 <= float(written["accuracy"]) <= 1
    assert 0 <= float(written["auroc"]) <= 1
    assert -4 <= float(written["gold"]) < 2.5
    assert list((tmp_path / "work").iterdir()) == []
    assert any((tmp_path / "reference_cache").iterdir())


def test_rows_are_not_added_to_a_file_with_other_columns(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("task,seed\nreviews,1\n")
    with pytest.raises(ValueError, match="its columns differ"):
        append_row(path, row())
    assert path.read_text() == "task,seed\nreviews,1\n"
