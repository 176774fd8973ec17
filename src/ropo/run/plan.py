"""How long a run will take before it starts: tokens, steps, operations and seconds of each stage.

In: sizes of the model, mean lengths of the pairs, options of the run, what the machine reaches. Out: a stage each.

The one idea: with prompts read once and nothing padded, the arithmetic of a run can be counted, and its time is that
arithmetic over the share of the machine's matrix rate that training reaches. It is an estimate: how long sampled
responses become, and how many are sampled, is not known before.

Add a stage: one line in `plan_stages`, one row in its test.
"""

from dataclasses import dataclass

_FORWARD, _TRAINING = 1, 3  # a backward pass costs two forward passes
_NUM_CHECKS = 3  # how often held-out pairs are scored while a fold trains (`ropo.audit.models`)
_NUM_OUTPUTS = 64  # of the gradient that an audit reads (`ropo.logps.features.Sketch`)
NUM_FEATURES = 2048
"""Of a gradient, and of the n-grams (`ropo.audit.features`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What costs of a decoder-only model.

    Attributes:
        layer_weights: Parameters of all layers, without embeddings and head.
        last_mlp_weights: Those of the last layer's MLP, which is run only where its output is read; 0 where it is run
            everywhere.
        head_weights: Vocabulary times hidden size.
        num_layers: Layers.
        hidden_size: Of the residual stream.
        intermediate_size: Of the MLP.
        trained_weights: Parameters that the optimizer moves; all of them, or those of an adapter.
        total_weights: All parameters, the tied head once, without an adapter.
    """

    layer_weights: int
    last_mlp_weights: int
    head_weights: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    trained_weights: int
    total_weights: int

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, whose weights are not among all."""
        return self.trained_weights != self.total_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSize:
    """How many pairs there are, and their mean lengths in tokens."""

    num_pairs: int
    prompt_tokens: float
    chosen_tokens: float
    rejected_tokens: float

    @property
    def unique_tokens(self) -> float:
        """Of a pair, the prompt counted once."""
        return self.prompt_tokens + self.chosen_tokens + self.rejected_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSize:
    """Options that decide how often every pair is read; named as in `ROPOConfig`."""

    rounds: int = 1
    num_train_epochs: float = 1.0
    max_steps: int = -1
    pairs_per_step: int = 8
    num_folds: int = 5
    scorer: str = "features"
    rho: float = 0.0
    num_candidates: int = 0
    new_tokens: float = 0.0
    needs_reference: bool = True

    @property
    def has_linear_audit(self) -> bool:
        """Whether labels are judged by linear models."""
        return bool(self.num_folds) and self.scorer == "features"

    def read_in_training(self, num_pairs: float) -> float:
        """Pairs that one training on so many reads; `max_steps` is what each training is given."""
        return self.max_steps * self.pairs_per_step if self.max_steps > 0 else num_pairs * self.num_train_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What computes, and how well.

    Attributes:
        flops: Operations a second that large matrix products reach on one device.
        share: Part of it that training reaches.
        scoring_flops: Operations a second of a pass without gradients; None for `flops` and `share`.
        sampling_flops: Of sampling, token by token; None for `flops`, `share` and `bytes_per_second`.
        num_devices: Devices that share the pairs.
        bytes_per_second: Of one device's memory; what sampling waits for. None: sampling is counted by its arithmetic.
        weight_bytes: Of one parameter while it is used.
        step_seconds: Of an optimizer step, beside its forward and backward passes.
        load_seconds: To load the model once.
        pair_seconds: Of the host's own work for each pair: folds, tables, report.
        run_seconds: The same for each run, whatever its size.
        has_linear_audit: Whether the linear models of an audit take time, which they do on the host.
    """

    flops: float
    share: float = 0.5
    scoring_flops: float | None = None
    sampling_flops: float | None = None
    num_devices: int = 1
    bytes_per_second: float | None = None
    weight_bytes: int = 4
    step_seconds: float = 0.0
    load_seconds: float = 0.0
    pair_seconds: float = 0.0
    run_seconds: float = 0.0
    has_linear_audit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of a run: tokens that go through the model, optimizer steps, operations, seconds."""

    name: str
    tokens: float
    steps: int
    operations: float
    seconds: float


def forward_operations(model: ModelSize, pairs: PairSize) -> float:
    """Operations of one forward pass over one pair.

    ::

        2·(p+c+r)·W − 2·(p−1)·M + 2·(c+r)·V·H + 4·L·H·[p²/2 + c·(p+c/2) + r·(p+r/2)]

    for prompt, chosen and rejected of p, c and r tokens: layers, less the last one's MLP where nothing is predicted,
    head, and attention, whose scores are counted where the mask lets them be. Pairs of uneven length cost a little
    more than their mean says, by the squares.

    Args:
        model: The model.
        pairs: Mean lengths.
    """
    p, c, r = pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens
    scores = p**2 / 2 + c * (p + c / 2) + r * (p + r / 2)
    return (
        2 * (p + c + r) * model.layer_weights
        - 2 * max(p - 1, 0) * model.last_mlp_weights
        + 2 * (c + r) * model.head_weights
        + 4 * model.num_layers * model.hidden_size * scores
    )


def plan_stages(model: ModelSize, pairs: PairSize, run: RunSize, machine: Machine) -> list[Stage]:
    """Count a whole run.

    ::

        reference    N forward
        audit        scorer models: (folds − 1) · N · epochs training, 3 · N forward; scorer features: nothing that
                     the reference pass does not do, or N forward where there is none
        each round   (1 − ρ) · N · epochs training, from the second round on with ρ·N new pairs; N forward
        sampling     after each round but the last: ρ·N prompts, `num_candidates` responses of `new_tokens` to each

    Args:
        model: The model.
        pairs: The pairs.
        run: Options.
        machine: What computes.

    Returns:
        The stages that the run has, in order.

    Raises:
        ValueError: If a size is not above 0.
    """
    _check_sizes(pairs, machine)
    n, once = pairs.num_pairs, forward_operations(model, pairs)
    rate = machine.flops * machine.share
    scoring_rate = machine.scoring_flops or rate

    def stage(
        name: str, *, trained: float = 0.0, scored: float = 0.0, num_loads: int = 0, others: float = 0.0
    ) -> Stage:
        steps = -(-round(trained) // run.pairs_per_step)
        seconds = once * (_TRAINING * trained / rate + _FORWARD * scored / scoring_rate) / machine.num_devices
        return Stage(
            name=name,
            tokens=(trained + scored) * pairs.unique_tokens,
            steps=steps,
            operations=(_TRAINING * trained + _FORWARD * scored) * once,
            seconds=seconds + steps * machine.step_seconds + num_loads * machine.load_seconds + others,
        )

    stages = [stage("reference", scored=n, num_loads=1)] if run.needs_reference else []
    if run.has_linear_audit:
        alone = 0 if run.needs_reference else 1
        others = _linear_seconds(n) if machine.has_linear_audit else 0.0
        others += n * _feature_operations(model, pairs) / scoring_rate / machine.num_devices
        stages.append(stage("audit", scored=alone * n, num_loads=alone, others=others))
    elif run.num_folds:
        in_a_fold = run.read_in_training((run.num_folds - 1) / run.num_folds * n)
        trained = run.num_folds * in_a_fold
        stages.append(stage("audit", trained=trained, scored=_NUM_CHECKS * n, num_loads=run.num_folds))
    if run.rounds:
        trained = run.rounds * run.read_in_training(n)
        stages.append(stage("rounds", trained=trained, scored=run.rounds * n, num_loads=2 * run.rounds))
    if run.num_candidates and run.rho and run.rounds > 1:
        stages.append(_sampling(model, pairs, run, machine, (run.rounds - 1) * run.rho * n))
    if machine.run_seconds:
        stages.append(stage("report", others=machine.run_seconds + machine.pair_seconds * n))
    return stages


def _check_sizes(pairs: PairSize, machine: Machine) -> None:
    for name, value in (
        ("num_pairs", pairs.num_pairs),
        ("flops", machine.flops),
        ("share", machine.share),
        ("num_devices", machine.num_devices),
    ):
        if value <= 0:
            raise ValueError(f"plan_stages needs {name} above 0; got {value}.")


def _feature_operations(model: ModelSize, pairs: PairSize) -> float:
    """Of the projected gradient by the head's output, for one pair, in the pass that reads the reference."""
    num_responses = pairs.chosen_tokens + pairs.rejected_tokens
    return 2 * num_responses * model.head_weights / model.hidden_size * _NUM_OUTPUTS


def _linear_seconds(num_pairs: int) -> float:
    """Of the linear models of an audit on one core: three bases, and fits that leave out folds.

    Fitted to benchmarks/audit_cost.csv, whose five sizes it meets within a quarter.
    """
    num_kept = min(num_pairs, NUM_FEATURES)
    return 0.2 + 5e-11 * num_kept**3 + 5e-7 * num_pairs * num_kept


def _sampling(model: ModelSize, pairs: PairSize, run: RunSize, machine: Machine, num_prompts: float) -> Stage:
    """Prompts once, then token by token; each step of a batch reads all weights once."""
    num_new = num_prompts * run.num_candidates * run.new_tokens
    of_prompts = 2 * model.layer_weights * num_prompts * pairs.prompt_tokens
    of_new = 2 * (model.layer_weights + model.head_weights) * num_new
    rate = machine.flops * machine.share
    seconds = of_prompts / (machine.scoring_flops or rate) + of_new / (machine.sampling_flops or rate)
    if machine.bytes_per_second is not None:
        rows_at_once = 64
        reads = num_new / rows_at_once * (model.layer_weights + model.head_weights) * machine.weight_bytes
        seconds += reads / machine.bytes_per_second
    return Stage(
        name="sampling",
        tokens=num_prompts * pairs.prompt_tokens + num_new,
        steps=0,
        operations=of_prompts + of_new,
        seconds=seconds / machine.num_devices,
    )
