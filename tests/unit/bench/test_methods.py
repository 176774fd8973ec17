from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ropo.config import ROPOConfig
from ropo.data.inject import flip_labels
from ropo.losses import LOSSES
from ropo.pairs import Pair
from ropo_bench import methods, selective
from ropo_bench.cell import make_task
from ropo_bench.grid_config import BenchConfig
from ropo_bench.methods import METHODS, Noisy, run_method
from ropo_bench.perp_correct import Mixture, correct_by_perplexity, fit_mixture, perplexity_differences

OPTIONS = {
    "per_device_train_batch_size": 8,
    "max_length": 128,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def noisy(small_task, tmp_path):
    config = BenchConfig(
        task="reviews", seeds=(1,), noise={}, methods=("dpo",), num_pairs=100, num_held_out=10, num_samples=4
    )
    task, spare = make_task(config, tmp_path, 1)
    pairs, is_flipped = flip_labels(task.pairs, rate=0.2, seed=0)
    return Noisy(task=task, pairs=pairs, is_flipped=is_flipped, spare=spare, seed=3, common=OPTIONS)


@pytest.fixture
def given(noisy, monkeypatch, tmp_path):
    """What a method hands to `run_rounds`, without training."""
    calls = []

    def record(model, pairs, args, **_):
        calls.append((list(pairs), args))

    monkeypatch.setattr(methods, "run_rounds", record)

    def of(name, **tuned):
        calls.clear()
        run_method(name, noisy, tmp_path / name, tuned)
        return calls[-1]

    return of


def labels(pairs):
    return [(pair.row, pair.chosen) for pair in pairs]


def test_reference_lines_see_right_labels_only(given, noisy):
    right = dict(labels(noisy.task.pairs))
    for name, count in (("ceiling", 80), ("clean", 100), ("information_line", 36)):
        pairs, args = given(name)
        assert len(pairs) == count
        assert all(right[row] == chosen for row, chosen in labels(pairs))
        assert args.num_train_epochs == pytest.approx(100 / count), "as many steps as on all pairs"
        assert args.loss == "dpo"


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].run is None])
def test_competitors_see_the_noisy_labels_and_what_they_are_told(given, noisy, name):
    pairs, args = given(name, learning_rate=3e-4, beta=0.7)
    assert (args.learning_rate, args.beta, args.seed) == (3e-4, 0.7, 3)
    if METHODS[name].is_reference:
        return
    assert labels(pairs) == labels(noisy.pairs)
    is_told = (args.loss_args or {}).get("flip_rate") == 0.2 or args.rho == "0.2"
    assert is_told == (METHODS[name].oracle == "flip rate")
    if LOSSES[args.loss].needs_flip_rate:
        assert is_told


def test_parameters_of_a_loss_are_its_loss_args(given):
    """In a grid they stand beside learning rate and beta; alpha is an option of its own."""
    assert given("holder", holder_gamma=4.0, beta=0.7)[1].bound_loss().options == {"holder_gamma": 4.0}
    assert given("ropo_loss", alpha="6")[1].bound_loss().options == {"alpha": 6.0}


@pytest.mark.parametrize("name", ["dpo_shipped", "ropo_shipped"])
def test_as_shipped_all_options_but_the_learning_rate_are_the_defaults(given, name):
    _, args = given(name, learning_rate=3e-4)
    default = ROPOConfig(output_dir=args.output_dir, **OPTIONS)
    changed = {key for key, value in args.to_dict().items() if value != default.to_dict()[key]} - {"logging_dir"}
    of_dpo = {"loss", "num_folds", "alpha"} if name == "dpo_shipped" else set()
    assert changed - {"seed"} == {"learning_rate", *of_dpo}
    assert (args.loss, args.needs_audit) == (("dpo", False) if of_dpo else ("ropo", True))


def test_every_loss_but_old_ropo_competes():
    alone = {method.options.get("loss") for method in METHODS.values()}
    assert set(LOSSES) - alone == {"ropo_v1", "focalpo"}


def test_the_mixture_is_found_again_and_its_threshold_is_the_papers():
    """10,000 draws: α within 0.02 (4 sd), μ and σ within 0.05."""
    rng = np.random.default_rng(0)
    is_right = rng.random(10_000) < 0.8
    found = fit_mixture(rng.normal(np.where(is_right, -1.2, 1.2), 1.0))
    assert found.share_right == pytest.approx(0.8, abs=0.02)
    assert (found.mean, found.sd) == (pytest.approx(-1.2, abs=0.05), pytest.approx(1.0, abs=0.05))
    assert Mixture(0.8, -1.2, 1.0).threshold == pytest.approx(0.577622650467)


def test_perplexity_counts_the_prompt_and_each_token_alike(noisy, model_folder, model, tokenizer):
    pair = Pair(prompt="the soup was", chosen=" good and the waiter was kind .", rejected=" cold !", row=0)
    args = ROPOConfig(output_dir="none", **OPTIONS)
    [found] = perplexity_differences(model_folder, [pair], args)

    def log_perplexity(response):
        ids = [*tokenizer(pair.prompt)["input_ids"], *tokenizer(response)["input_ids"], tokenizer.eos_token_id]
        x = torch.tensor([ids])
        return model(input_ids=x, labels=x).loss.item()

    assert found == pytest.approx(log_perplexity(pair.chosen) - log_perplexity(pair.rejected), abs=1e-5)


def test_perp_correct_turns_what_the_surrogate_finds_the_wrong_way_round(noisy, monkeypatch, tmp_path):
    """With a surrogate that knows the truth up to some noise, nearly all flips are turned and few others."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr("ropo_bench.perp_correct.run_rounds", lambda *given: Path(given[2].output_dir).mkdir())
    monkeypatch.setattr(
        "ropo_bench.perp_correct.perplexity_differences",
        lambda *_: rng.normal(np.where(noisy.is_flipped, 1.0, -1.0), 0.4),
    )
    found = correct_by_perplexity(
        noisy.task.model, noisy.pairs, noisy.spare[:50], lambda name, **more: noisy.config(tmp_path / name, **more)
    )
    is_wrong = np.array([a.chosen != b.chosen for a, b in zip(found, noisy.task.pairs, strict=True)])
    assert is_wrong.mean() < 0.05


def test_selective_keeps_the_easiest_half_in_order(noisy, monkeypatch, tmp_path):
    seeds, margins = [], np.linspace(-1.0, 3.0, len(noisy.pairs))

    def audit(model, pairs, args):
        seeds.append(args.seed)
        assert (args.scorer, args.num_folds, args.loss) == ("models", 2, "dpo")

    class Ledger:
        def to_pandas(self):
            return pd.DataFrame({"origin": "data", "row": range(100), "held_out_margin": margins})

    monkeypatch.setattr(selective, "run_audit", audit)
    monkeypatch.setattr(selective, "read_ledger", lambda _: Ledger())
    monkeypatch.setattr(methods, "run_rounds", lambda *given: kept.append(given[1:]))
    kept = []
    run_method("selective_dpo", noisy, tmp_path, {"beta": 0.3})
    pairs, args = kept[0]
    assert [pair.row for pair in pairs] == list(range(99, 49, -1))
    assert len(set(seeds)) == 3
    assert args.train_sampling_strategy == "sequential"


def test_perplexity_is_blind_to_the_order_of_a_pair(model_folder):
    pair = Pair(prompt="the soup was", chosen=" good .", rejected=" cold , slow and far too loud !", row=0)
    turned = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    one, other = perplexity_differences(model_folder, [pair, turned], ROPOConfig(output_dir="none", **OPTIONS))
    assert one == pytest.approx(-other, abs=1e-6)
