"""What a benchmark is to measure.

In: a YAML file. Out: `BenchConfig`, known to be valid before anything is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from ropo.config import ROPOConfig
from ropo.data.inject import NOISE
from ropo.options import Rule, check_choice, check_mapping, check_values, is_finite, read_numbers, read_yaml, short
from ropo.spelling import did_you_mean
from ropo.train.options import instead_of
from ropo_bench.methods import BETAS, LEARNING_RATES, METHODS, options_of
from ropo_bench.own import LACKS, judge_args
from ropo_bench.tasks import TASKS

_OWN = ("model", "judge", "max_length", "max_new_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What to measure; the fields are the keys of the YAML file.

    Attributes:
        task: A name in `TASKS`.
        source: Data of the task, if it needs any.
        num_pairs: Training pairs.
        num_held_out: Pairs for the accuracy.
        num_samples: Responses for gold reward and distance, at most one per held-out pair.
        seeds: Those that are reported.
        noise: Kind of noise -> flip rates.
        methods: Names in `METHODS`; reference lines too.
        num_trials: Settings that are tried for each method.
        learning_rates: From these.
        betas: And these.
        tuning_kind: Noise on which methods are tuned.
        tuning_rate: Its rate.
        tuning_seed: A seed that is not reported.
        tuned: Settings that are known already: method -> learning rate, beta, own parameters. It is not tuned then.
        options: Options of `ROPOConfig` that all methods share.
        model: Initial model of the task `own`, folder or hub id.
        judge: Its judge: options named as in `ROPOConfig`.
        max_length: Of the task `own`: longest prompt and response together, tokens.
        max_new_tokens: Of the task `own`: longest sampled response, tokens.
    """

    task: Annotated[str, Rule(choices=tuple(TASKS))]
    seeds: tuple[int, ...]
    noise: Mapping[str, Sequence[float]]
    methods: tuple[str, ...]
    source: str | None = None
    num_pairs: Annotated[int, Rule(low=10)] = 6000
    num_held_out: Annotated[int, Rule(low=1)] = 2000
    num_samples: Annotated[int, Rule(low=2)] = 1000
    num_trials: Annotated[int, Rule(low=1)] = 9
    learning_rates: tuple[float, ...] = LEARNING_RATES
    betas: tuple[float, ...] = BETAS
    tuning_kind: Annotated[str, Rule(choices=tuple(NOISE))] = "symmetric"
    tuning_rate: Annotated[float, Rule(low=0, below=0.5)] = 0.2
    tuning_seed: int = 100
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    judge: Mapping[str, Any] = field(default_factory=dict)
    max_length: Annotated[int | None, Rule(low=1)] = None
    max_new_tokens: Annotated[int | None, Rule(low=1)] = None

    @property
    def own(self) -> dict[str, Any]:
        """What only the task `own` is given; empty for the others."""
        given = {name: getattr(self, name) for name in _OWN}
        return {name: value for name, value in given.items() if value is not None and value != {}}

    def __post_init__(self) -> None:
        check_values({one.name: getattr(self, one.name) for one in fields(self)}, BenchConfig)
        self._check_names()
        self._check_own()
        for kind, rate in [(kind, rate) for kind, rates in self.noise.items() for rate in rates]:
            if not 0 <= rate < 0.5:
                raise ValueError(f"noise needs rates in [0, 0.5); got {rate} for {kind}.")
        if self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed needs a seed that is not reported; got {self.tuning_seed}, which is in seeds. Change one."
            )
        for name in ("learning_rates", "betas"):
            values = getattr(self, name)
            if not values or not all(value > 0 for value in values):
                raise ValueError(f"{name} needs one or more numbers above 0; got {list(values)}.")

    def _check_names(self) -> None:
        """Every name is in its table, and no setting is given that nothing would use."""
        for what, names, table in (("methods", [*self.methods, *self.tuned], METHODS), ("noise", self.noise, NOISE)):
            for name in names:
                check_choice(what, name, table)
        for options in (self.options, *(options_of(name, setting) for name, setting in self.tuned.items())):
            _check_keys("options", options, ROPOConfig)
            check_values(options, ROPOConfig)
            read_numbers("loss_args", options.get("loss_args"))
        tuned_ones = {METHODS[name].like or name for name in self.methods if not METHODS[name].is_shipped}
        if unused := sorted(set(self.tuned) - tuned_ones):
            raise ValueError(
                f"tuned needs methods of this grid that are tuned themselves; got {unused[0]}. Leave it out."
            )

    def _check_own(self) -> None:
        """A task of the user's has what it needs, and nothing is given that another task would ignore."""
        if self.task != "own":
            if self.own:
                raise ValueError(
                    f"The task {self.task} brings its own {next(iter(self.own))}; got another. Leave it out."
                )
            return
        for name in ("source", "model", "judge"):
            if not getattr(self, name):
                raise ValueError(f"The task own needs {name}; got none. See docs/benchmark.md.")
        judge_args(self.judge)
        for kind in (*self.noise, self.tuning_kind):
            if kind in LACKS:
                raise ValueError(f"The task own cannot have noise of kind {kind}; got it. Leave it out.")


def read_bench_config(path: Path) -> BenchConfig:
    """Read a grid from YAML.

    Raises:
        ValueError: If the file is not there, or a key is unknown, missing or out of range.
    """
    found = read_yaml(path)
    _check_keys(str(path), found, BenchConfig)
    missing = [name for name in ("task", "seeds", "noise", "methods") if name not in found]
    if missing:
        raise ValueError(f"{path} needs {', '.join(missing)}; got none. See benchmarks/quick.yaml.")
    for name, kind, form in (
        ("seeds", list, "[1, 2]"),
        ("methods", list, "[dpo]"),
        ("noise", dict, "{symmetric: [0.2]}"),
        ("judge", dict, "{judge: reward_model, judge_model: R}"),
        ("learning_rates", list, "[2.0e-4]"),
        ("betas", list, "[0.3]"),
    ):
        if name in found and not isinstance(found[name], kind):
            raise ValueError(f"{path} needs {name} like {form}; got {found[name]!r}.")
    check_values(found, BenchConfig)
    _check_lists(found)
    for name in ("seeds", "methods", "learning_rates", "betas"):
        if name in found:
            found[name] = tuple(found[name])
    if "tuning_rate" in found:
        found["tuning_rate"] = float(found["tuning_rate"])
    return BenchConfig(**found)


def _check_lists(found: Mapping[str, Any]) -> None:
    """Lists are lists of the right things, each once, and named values are named values."""

    def is_seed(one: Any) -> bool:
        return isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**32

    for name, is_one, what in (
        ("seeds", is_seed, f"whole numbers from 0 to {2**32 - 1}"),
        ("methods", lambda one: isinstance(one, str), "names of methods"),
    ):
        values = found[name]
        if not values or not all(map(is_one, values)) or len(set(values)) < len(values):
            raise ValueError(f"{name} needs {what}, each once; got {short(values)}.")
    named = [(name, found[name]) for name in ("noise", "tuned", "options", "judge") if name in found]
    for name, value in named:
        check_mapping(name, value)
    for name, value in found.get("tuned", {}).items():
        check_mapping(f"tuned {name}", value)
    for kind, rates in found["noise"].items():
        if not isinstance(rates, list) or not all(map(is_finite, rates)):
            raise ValueError(f"noise needs a list of rates in [0, 0.5) for {kind}; got {short(rates)}.")
    for name in ("learning_rates", "betas"):
        if not all(map(is_finite, found.get(name, ()))):
            raise ValueError(f"{name} needs finite numbers above 0; got {short(found[name])}.")


def _check_keys(where: str, found: Mapping[str, Any], kind: type) -> None:
    known = [one.name for one in fields(kind)]
    for name in found:
        if name not in known:
            close = (instead_of(name) if kind is ROPOConfig else "") or did_you_mean(name, known)
            raise ValueError(f"{where}: unknown option {name!r}.{close}")
