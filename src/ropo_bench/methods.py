"""What is compared: every method as a function of noisy pairs, with what it needs to know and what is tuned.

In: a task, pairs of which some are flipped, options. Out: the folder of a trained model.

Methods with a paper are those papers' methods in our reading, on our losses, judges and trainer; `docs/benchmark.md`
says where a paper leaves something open and where ours differs. The truth that a method is given and nobody knows in
practice stands in `oracle`.

Add a method: one line in `METHODS`; if options alone cannot say it, one function.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropo.config import ROPOConfig
from ropo.losses import LOSSES
from ropo.pairs import Pair
from ropo.run.align import run_rounds
from ropo_bench.perp_correct import correct_by_perplexity
from ropo_bench.selective import easiest_first
from ropo_bench.task import Task

LEARNING_RATES, BETAS = (1e-4, 2e-4, 4e-4), (0.3, 1.0)
"""What is tried where a grid names nothing else: for one pass of a model made in code over some thousand pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy:
    """A task with noise whose truth is known.

    Attributes:
        task: The task, with right labels.
        pairs: Its training pairs as the method sees them.
        is_flipped: Which of them are flipped, shape (pairs,).
        spare: Pairs with right labels that are neither trained nor tested on.
        seed: Of the training.
        common: Options that all methods share, as `ROPOConfig` takes them.
    """

    task: Task
    pairs: list[Pair]
    is_flipped: NDArray[np.bool_]
    spare: list[Pair]
    seed: int
    common: Mapping[str, Any]

    @property
    def flip_rate(self) -> float:
        """The true share of flipped pairs."""
        return float(self.is_flipped.mean())

    def config(self, folder: Path, **options: Any) -> ROPOConfig:
        """Options of one training in `folder`."""
        return ROPOConfig(**{**self.common, "output_dir": str(folder), "seed": self.seed, **options})


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method of the benchmark.

    Attributes:
        meaning: One phrase.
        paper: Where it comes from; empty for what has no paper.
        options: Options of `ROPOConfig` that make the method.
        search: Its own parameters with the values that are tried, beside learning rate and beta.
        oracle: The truth that it is given and nobody knows in practice; empty for none.
        data: What it trains on, from what it is given; the noisy pairs as they are by default.
        run: Trains, and returns the model's folder; `align` by default.
        is_reference: Whether it is a line to compare with, not a competitor.
        like: The method whose setting it takes over, as a variant of it; empty if it is tuned itself.
        is_shipped: Whether it has the defaults of `ROPOConfig` and is not tuned: a row for each learning rate of the
            grid.
    """

    meaning: str
    paper: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    oracle: str = ""
    data: Callable[[Noisy], list[Pair]] = lambda noisy: noisy.pairs
    run: Callable[..., Path] | None = None
    is_reference: bool = False
    like: str = ""
    is_shipped: bool = False


def align(noisy: Noisy, pairs: list[Pair], folder: Path, options: Mapping[str, Any]) -> Path:
    """Train by `run_rounds` for as many steps as all pairs of the task would take."""
    args = noisy.config(folder, **options)
    if len(pairs) < len(noisy.pairs):
        epochs = args.num_train_epochs * len(noisy.pairs) / len(pairs)
        args = noisy.config(folder, **{**options, "num_train_epochs": epochs})
    run_rounds(noisy.task.model, pairs, args)
    return folder


def run_method(name: str, noisy: Noisy, folder: Path, tuned: Mapping[str, Any]) -> Path:
    """Run one method of `METHODS`."""
    method = METHODS[name]
    options = {key: value(noisy) if callable(value) else value for key, value in method.options.items()}
    return (method.run or align)(noisy, method.data(noisy), folder, {**options, **options_of(name, tuned)})


def options_of(name: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    """A setting of a method as options of `ROPOConfig`: parameters of its loss become `loss_args`.

    Examples:
        >>> options_of("holder", {"beta": 0.3, "holder_gamma": 2.0})
        {'beta': 0.3, 'loss_args': {'holder_gamma': 2.0}}
    """
    params = {*LOSSES[METHODS[name].options.get("loss", "ropo")].params} - {"alpha"}
    of_loss = {key: value for key, value in setting.items() if key in params}
    others = {key: value for key, value in setting.items() if key not in params}
    return others | ({"loss_args": of_loss} if of_loss else {})


def trials_of(
    name: str,
    num_trials: int,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    betas: Sequence[float] = BETAS,
) -> list[dict[str, Any]]:
    """The settings that are tried for a method: all of them if they are few, else a Latin hypercube.

    In the latter every learning rate, every beta and every value of an own parameter is tried about equally often.

    Returns:
        Learning rate, beta and own parameters of each trial.

    Examples:
        >>> len(trials_of("dpo", 6)), [trial["holder_gamma"] for trial in trials_of("holder", 3)]
        (6, [1.0, 2.0, 4.0])
    """
    axes = {"learning_rate": learning_rates, "beta": betas, **METHODS[name].search}
    every = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(every) <= num_trials:
        return every
    rng, columns = random.Random(0), []
    for values in axes.values():
        column = list(itertools.islice(itertools.cycle(values), num_trials))
        rng.shuffle(column)
        columns.append(column)
    return [dict(zip(axes, trial, strict=True)) for trial in zip(*columns, strict=True)]


def _without_flipped(noisy: Noisy) -> list[Pair]:
    return [pair for pair, wrong in zip(noisy.pairs, noisy.is_flipped, strict=True) if not wrong]


def _clean(noisy: Noisy) -> list[Pair]:
    return noisy.task.pairs


def _same_information(noisy: Noisy) -> list[Pair]:
    """(1−2η)²·N right pairs: what N labels with symmetric flips can teach."""
    order = np.random.default_rng(noisy.seed).permutation(len(noisy.pairs))
    number = max(1, round((1 - 2 * noisy.flip_rate) ** 2 * len(order)))
    return [noisy.task.pairs[i] for i in order[:number]]


def _flip_rate(noisy: Noisy) -> dict[str, float]:
    return {"flip_rate": noisy.flip_rate}


def _rho(noisy: Noisy) -> str:
    return str(noisy.flip_rate)


def _perp_correct(noisy: Noisy, pairs: list[Pair], folder: Path, options: Mapping[str, Any]) -> Path:
    corrected = correct_by_perplexity(
        noisy.task.model, pairs, noisy.spare[:50], lambda name, **more: noisy.config(folder / name, **options, **more)
    )
    return align(noisy, corrected, folder / "policy", options)


def _selective(noisy: Noisy, pairs: list[Pair], folder: Path, options: Mapping[str, Any]) -> Path:
    ordered = easiest_first(
        noisy.task.model,
        pairs,
        lambda name, **more: noisy.config(folder / name, **{**options, **more}),
        share=0.5,
        seed=noisy.seed,
    )
    args = noisy.config(folder / "policy", **options, train_sampling_strategy="sequential")
    run_rounds(noisy.task.model, ordered, args)
    return folder / "policy"


_ALONE: dict[str, Any] = {"rho": "0", "num_folds": 0}  # the loss does everything: nothing is estimated or filtered


def _loss(name: str, **options: Any) -> dict[str, Any]:
    return {"loss": name, **_ALONE, **options}


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ceiling": Method(
            meaning="DPO without the flipped pairs",
            options=_loss("dpo"),
            oracle="which labels are flipped",
            data=_without_flipped,
            is_reference=True,
        ),
        "clean": Method(
            meaning="DPO on right labels", options=_loss("dpo"), oracle="all labels", data=_clean, is_reference=True
        ),
        "information_line": Method(
            meaning="DPO on (1−2η)²·N pairs with right labels",
            options=_loss("dpo"),
            oracle="their labels",
            data=_same_information,
            is_reference=True,
        ),
        "dpo": Method(meaning="DPO on the noisy labels, the floor", paper="arXiv:2305.18290", options=_loss("dpo")),
        "ropo": Method(
            meaning="this library's default: estimate, filter, DPO on what is kept",
            paper="arXiv:2404.04102, adapted",
        ),
        "dpo_shipped": Method(
            meaning="DPO with no other option but the learning rate",
            paper="arXiv:2305.18290",
            options={"loss": "dpo", "num_folds": 0},
            is_shipped=True,
        ),
        "ropo_shipped": Method(
            meaning="ropo with no other option but the learning rate",
            paper="arXiv:2404.04102, adapted",
            is_shipped=True,
        ),
        "ropo_paper": Method(
            meaning="ROPO with ρ given: train, drop the ρN largest losses of the trained model, train again",
            paper="arXiv:2404.04102",
            options={"num_folds": 0, "rounds": 2, "rho": _rho},
            search={"alpha": ("6", "14", "30")},
            oracle="flip rate",
        ),
        "ropo_loss": Method(
            meaning="the robust loss alone",
            paper="arXiv:2404.04102",
            options=_loss("ropo"),
            search={"alpha": ("6", "14", "30")},
        ),
        "ropo_resampling": Method(
            meaning="ropo, then new pairs for the prompts it lost, then once more",
            paper="arXiv:2404.04102, adapted",
            options={"rounds": 2, "num_candidates": 4},
            like="ropo",
        ),
        "ropo_relabel": Method(
            meaning="ropo that turns the surest suspects round instead of dropping them",
            options={"decision_rule": "relabel"},
            like="ropo",
        ),
        "cdpo": Method(
            meaning="label smoothing",
            paper="Mitchell 2023",
            options=_loss("cdpo", loss_args=_flip_rate),
            oracle="flip rate",
        ),
        "rdpo": Method(
            meaning="unbiased for a known rate",
            paper="arXiv:2403.00409",
            options=_loss("rdpo", loss_args=_flip_rate),
            oracle="flip rate",
        ),
        "forward_corrected": Method(
            meaning="likelihood of noisy labels",
            paper="arXiv:1609.03683, applied",
            options=_loss("forward_corrected", loss_args=_flip_rate),
            oracle="flip rate",
        ),
        "ipo": Method(meaning="regression of the margin", paper="arXiv:2310.12036", options=_loss("ipo")),
        "hinge": Method(meaning="hinge loss", paper="arXiv:2309.06657", options=_loss("hinge")),
        "na": Method(meaning="ROPO's noise-aware part alone", paper="arXiv:2404.04102", options=_loss("na")),
        "re_po": Method(
            meaning="expectation maximisation over labels",
            paper="arXiv:2509.24159",
            options=_loss("re_po"),
            search={"reliability": (0.7, 0.8, 0.9)},
        ),
        "holder": Method(
            meaning="a divergence that lets go of outliers",
            paper="arXiv:2505.17859",
            options=_loss("holder"),
            search={"holder_gamma": (1.0, 2.0, 4.0)},
        ),
        "dr_dpo": Method(
            meaning="weights within the batch",
            paper="arXiv:2407.07880",
            options=_loss("dr_dpo"),
            search={"beta_prime": (0.5, 1.0, 2.0)},
        ),
        "rappo": Method(
            meaning="leaves out the worst pair of a batch that the reference contradicts",
            paper="RAPPO, ICLR 2026",
            options=_loss("rappo"),
        ),
        "gamma_po": Method(
            meaning="target margins by how sure each pair is",
            paper="arXiv:2506.03690",
            options=_loss("gamma_po"),
            search={"mean_target_margin": (0.1, 0.5, 1.0)},
        ),
        "plc_dpo": Method(
            meaning="posterior of clean, flipped and tied by moving averages of margins",
            paper="arXiv:2608.30597",
            options=_loss("plc_dpo"),
        ),
        "clipped": Method(
            meaning="gradient weight cut off at λ",
            paper="arXiv:2406.15568",
            options=_loss("clipped"),
            search={"max_weight": (0.3, 0.5, 0.7)},
        ),
        "simpo": Method(
            meaning="no reference, mean log-probabilities",
            paper="arXiv:2405.14734",
            options=_loss("simpo"),
            search={"target_margin": (0.0, 0.5, 1.0)},
        ),
        "selective_dpo": Method(
            meaning="the easiest half by cross-fitted loss, easiest first",
            paper="arXiv:2502.09650",
            options=_loss("dpo"),
            run=_selective,
        ),
        "perp_correct": Method(
            meaning="turns pairs round by perplexity differences of a surrogate",
            paper="PerpCorrect, NeurIPS 2024",
            options=_loss("dpo"),
            oracle="50 right labels",
            run=_perp_correct,
        ),
    }
)
"""The methods by name."""


def methods_table() -> str:
    """`METHODS` as a Markdown table, for `docs/benchmark.md`."""
    rows = ["| method | what it is | source | needs oracle | own parameters tried |", "|---|---|---|---|---|"]
    for name, method in METHODS.items():
        tried = ", ".join(f"`{key}` {', '.join(map(str, values))}" for key, values in method.search.items())
        own = f"(setting of {method.like})" if method.like else "(not tuned)" if method.is_shipped else tried
        rows.append(f"| `{name}` | {method.meaning} | {method.paper} | {method.oracle} | {own} |")
    return "\n".join(rows)
