"""What a run will cost before it starts: tokens, steps, operations, time and memory.

In: sizes of the model, mean lengths of the pairs, options of the run, what the machine reaches. Out: a `Plan`, one line
per stage, and its sentences.

The one idea: with prompts read once and nothing padded, the arithmetic of a run can be counted, and its time is that
arithmetic over the share of the machine's matrix rate that training reaches. It is an estimate: how long sampled
responses become, and how many are sampled, is not known before.

Add a stage: one line in `plan_run`, one row in its test.
"""

from dataclasses import dataclass

_FORWARD, _TRAINING = 1, 3  # a backward pass costs two forward passes
_NUM_CHECKS = 3  # how often held-out pairs are scored while a fold trains (`ropo.audit.models`)


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
        total_weights: All parameters, the tied head once.
    """

    layer_weights: int
    last_mlp_weights: int
    head_weights: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    trained_weights: int
    total_weights: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What computes, and how well.

    Attributes:
        flops: Operations a second that large matrix products reach on one device.
        share: Part of it that training reaches.
        num_devices: Devices that hold the whole model and share the pairs.
        bytes_per_second: Of one device's memory; what sampling waits for. None: sampling is counted by its arithmetic.
        weight_bytes: Of one parameter while it is used.
        optimizer_bytes: For each trained parameter: gradient and optimizer state. AdamW in float32: 12.
    """

    flops: float
    share: float = 0.5
    num_devices: int = 1
    bytes_per_second: float | None = None
    weight_bytes: int = 4
    optimizer_bytes: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of a run: tokens that go through the model, optimizer steps, operations, seconds."""

    name: str
    tokens: float
    steps: int
    operations: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will cost: its stages, and the memory that training needs on each device."""

    stages: list[Stage]
    memory_bytes: float

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def sentence(self) -> str:
        """All of it in one sentence."""
        tokens, steps = (sum(getattr(stage, name) for stage in self.stages) for name in ("tokens", "steps"))
        parts = ", ".join(f"{stage.name} {_cost(stage)}" for stage in self.stages)
        return (
            f"About {_duration(self.seconds)} ({parts}), {tokens:.2g} tokens, {steps} steps, "
            f"{self.memory_bytes / 2**30:.1f} GiB of memory in training."
        )


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


def plan_run(model: ModelSize, pairs: PairSize, run: RunSize, machine: Machine, *, tokens_at_once: float) -> Plan:
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
        tokens_at_once: Tokens in one forward pass of training, which decide the memory of activations.

    Returns:
        The plan.

    Raises:
        ValueError: If a size is not above 0.
    """
    for name, value in (
        ("num_pairs", pairs.num_pairs),
        ("flops", machine.flops),
        ("share", machine.share),
        ("num_devices", machine.num_devices),
    ):
        if value <= 0:
            raise ValueError(f"plan_run needs {name} above 0; got {value}.")
    n, once = pairs.num_pairs, forward_operations(model, pairs)
    rate = machine.flops * machine.share * machine.num_devices

    def read_in_training(num_pairs: float) -> float:
        """Pairs that one training on so many reads; `max_steps` is what each training is given."""
        return run.max_steps * run.pairs_per_step if run.max_steps > 0 else num_pairs * run.num_train_epochs

    def stage(name: str, *, trained: float = 0.0, scored: float = 0.0) -> Stage:
        operations = (_TRAINING * trained + _FORWARD * scored) * once
        return Stage(
            name=name,
            tokens=(trained + scored) * pairs.unique_tokens,
            steps=-(-round(trained) // run.pairs_per_step),
            operations=operations,
            seconds=operations / rate,
        )

    stages = [stage("reference", scored=n)] if run.needs_reference else []
    if run.num_folds and run.scorer == "features":
        stages.append(stage("audit", scored=0 if run.needs_reference else n))
    elif run.num_folds:
        in_a_fold = read_in_training((run.num_folds - 1) / run.num_folds * n)
        stages.append(stage("audit", trained=run.num_folds * in_a_fold, scored=_NUM_CHECKS * n))
    if run.rounds:
        stages.append(stage("rounds", trained=run.rounds * read_in_training(n), scored=run.rounds * n))
    if run.num_candidates and run.rho and run.rounds > 1:
        stages.append(_sampling(model, pairs, run, machine, (run.rounds - 1) * run.rho * n))
    return Plan(stages=stages, memory_bytes=training_bytes(model, machine, tokens_at_once=tokens_at_once))


def _sampling(model: ModelSize, pairs: PairSize, run: RunSize, machine: Machine, num_prompts: float) -> Stage:
    """Prompts once, then token by token; each step of a batch reads all weights once."""
    num_new = num_prompts * run.num_candidates * run.new_tokens
    operations = 2 * model.layer_weights * (num_prompts * pairs.prompt_tokens + num_new)
    operations += 2 * model.head_weights * num_new
    seconds = operations / (machine.flops * machine.share * machine.num_devices)
    if machine.bytes_per_second is not None:
        rows_at_once = 64
        reads = num_new / rows_at_once * (model.layer_weights + model.head_weights) * machine.weight_bytes
        seconds += reads / machine.bytes_per_second / machine.num_devices
    tokens = num_prompts * pairs.prompt_tokens + num_new
    return Stage(name="sampling", tokens=tokens, steps=0, operations=operations, seconds=seconds)


def training_bytes(model: ModelSize, machine: Machine, *, tokens_at_once: float) -> float:
    """Memory of weights, gradients, AdamW and what a backward pass needs of its forward pass.

    Per token and layer about 18 numbers of the hidden size and 5 of the MLP's are kept (normed and rotated copies,
    queries, keys, values, outputs; gate, up and their product), each of `weight_bytes`; fewer with checkpointing.

    Args:
        model: The model.
        machine: For the bytes.
        tokens_at_once: Tokens in one forward pass.
    """
    numbers = model.num_layers * (18 * model.hidden_size + 5 * model.intermediate_size)
    return (
        model.total_weights * machine.weight_bytes
        + model.trained_weights * machine.optimizer_bytes
        + tokens_at_once * numbers * machine.weight_bytes
    )


def _cost(stage: Stage) -> str:
    return _duration(stage.seconds) if stage.tokens else "with the reference, without training"


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"
