"""TRL's `DPOTrainer` on audited labels.

In: what `DPOTrainer` takes. Out: a `DPOTrainer` that trains without the pairs that an audit drops and, where there are
weights or an α above 0, with those and with ROPO's loss.

The one idea: TRL computes every loss. For a single pair its `sigmoid` loss is ℓ = −log σ(h), and ROPO's loss is a
function of ℓ, since σ(−h) = 1 − exp(−ℓ). So nothing of TRL is copied: `Trainer.compute_loss`, which is documented for
overriding, calls TRL's own, and the rest is done by arguments: dataset, options and data collator.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import ProcessorMixin

from ropo.config import ROPOConfig
from ropo.data.load import load_pairs
from ropo.models.source import Model, load_tokenizer
from ropo.provenance import read_json
from ropo.run.align import run_audit
from ropo.run.result import AuditResult

try:
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined] # exported by name only when asked for
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError('ropo.integrations.trl needs TRL; it is not installed. Run: pip install "trl>=1.0"') from None

logger = logging.getLogger(__name__)

__all__ = ["AuditedDPOTrainer", "DPOConfig"]

_WEIGHT = "ropo_weight"  # a column of its own: TRL ignores `weight`, and the evaluation set may have one
_LOSSES = ("ropo", "dpo")  # whose α ROPO's loss from TRL's has
_WHOLE_TEXTS = 131_072  # tokens; TRL's `max_length` None cuts nothing


class AuditedDPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` that audits its training set first and trains on what the audit keeps.

    Nothing else differs: model, reference, adapter, tokenization, metrics and checkpoints are TRL's. The number of
    steps stays that of all pairs and β follows the filter, as in `run_rounds`. Where the audit keeps every pair with
    weight 1 and α is 0, which is its default, losses are exactly those of `DPOTrainer`.

    With other weights or an α above 0 the pairs of a batch go through the model one by one, and the loss is the mean
    over the batch of w·ℓ, so it is the same for every split of a batch into accumulated ones of equal size.

    Args:
        *given: What `DPOTrainer` takes, by place.
        audit: Options of the audit that differ from the defaults, such as `{"alpha": 14}` (see `ROPOConfig`), or a
            finished audit of the same dataset. It is written beside the output folder (`model-audit` for `model`),
            from where the same script resumes. A model object is saved there first; a name is not.
        **options: What `DPOTrainer` takes, by name.

    Attributes:
        audit: What was found about the labels: suspects, ledger, report.

    Raises:
        DataError: If rows cannot be read, unless `audit` says `{"on_bad_rows": "skip"}`.
        TypeError: If `train_dataset` is no `datasets.Dataset`, or an argument is unknown.
        ValueError: If `audit` is of other pairs, or TRL's loss does not go with its α.
    """

    def __init__(self, *given: Any, audit: AuditResult | Mapping[str, Any] | None = None, **options: Any) -> None:
        arguments = signature(DPOTrainer).bind(*given, **options).arguments
        dataset, args = arguments.get("train_dataset"), _args_of(arguments)
        if not isinstance(dataset, Dataset) or not {"chosen", "rejected"} <= set(dataset.column_names):
            raise TypeError(
                "AuditedDPOTrainer needs train_dataset as a datasets.Dataset with the columns chosen and rejected; got "
                f"{getattr(dataset, 'column_names', type(dataset).__name__)}. Load it whole, without streaming."
            )
        if isinstance(audit, AuditResult):
            _check_same_pairs(audit, dataset)
            _check_audited_loss(audit)
            self.audit = audit
        else:
            config = _audit_config(args, audit or {})
            _check_loss(args, 0.0 if config.fixed_alpha is None else config.fixed_alpha)
            with torch.random.fork_rng(devices=[]):  # a new adapter begins as it does without an audit
                self.audit = _run_audit(arguments, args, config)
        _check_loss(args, self.audit.alpha.value)
        kept = _kept_of(dataset, self.audit)
        factor = self.audit.beta.facts.get("factor", 1.0)
        args.beta *= factor  # or the labels that are kept would lead farther away than all of them
        logger.info("beta = %.3g, %.3g times the given one.", args.beta, factor)
        if args.max_steps <= 0:  # what a filter takes away must not shorten the training as well
            args.num_train_epochs *= kept.num_before / len(kept.dataset)
        if _WEIGHT in kept.dataset.column_names:
            args.remove_unused_columns = False  # or the column would not reach the collator
        super().__init__(**{**arguments, "args": args, "train_dataset": kept.dataset})
        # TRL has made its collator now, and has read the reference with it, which takes no weights.
        self.data_collator = _Weighted(self.data_collator)
        self._is_pair_by_pair = _WEIGHT in kept.dataset.column_names or self.audit.alpha.value > 0
        if self._is_pair_by_pair and (of_batch := [name for name in args.loss_type if name.startswith("aot")]):
            raise ValueError(
                f"Weights of pairs need a loss of pairs alone; got loss_type {of_batch[0]!r}, which sorts those of a "
                "batch. Take another loss, or drop the column of weights and rules that weigh."
            )
        if self.audit.alpha.value and getattr(self, "aux_loss_enabled", False):
            raise ValueError("alpha above 0 needs a loss of pairs alone; got router_aux_loss_coef. Set it to 0.")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the signature of Trainer
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """TRL's loss of a batch; with weights or α the mean over its pairs of w·ℓ, each pair a batch of its own."""
        of_trl: Callable[..., Any] = super().compute_loss
        if not self._is_pair_by_pair:
            return of_trl(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        num_pairs, alpha = len(inputs["input_ids"]) // 2, self.audit.alpha.value
        weights = inputs.pop(_WEIGHT, torch.ones(num_pairs))
        # A weight decides nothing here: under FSDP and in TRL's metrics all processes make the same calls.
        losses = torch.stack([of_trl(model, _pair_of(inputs, i, num_pairs)) for i in range(num_pairs)])
        loss = (weights.to(losses) * (ropo_of_dpo(losses, alpha=alpha) if alpha else losses)).mean()
        if return_outputs:
            return loss, of_trl(model, inputs, return_outputs=True)[1]
        return loss


def ropo_of_dpo(loss: Tensor, *, alpha: float) -> Tensor:
    """ROPO's loss of pairs from DPO's, shape (pairs,); see `ropo.losses.margin_losses.ropo`.

    ::

        L = 4α/(1+α)²·ℓ + 4α²/(1+α)²·(1 − exp(−ℓ)) with ℓ = dpo(h)            (arXiv:2404.04102v2, eq. 9)

    Args:
        loss: ℓ = −log σ(h) of each pair, shape (pairs,).
        alpha: α, above 0.
    """
    return 4 * alpha / (1 + alpha) ** 2 * (loss - alpha * torch.expm1(-loss))


def _pair_of(inputs: Mapping[str, Tensor], i: int, num_pairs: int) -> dict[str, Tensor]:
    """One pair of a batch: TRL stacks all chosen responses, then all rejected ones; reference log-probs are by pair."""
    return {
        name: values[[i, num_pairs + i]] if len(values) == 2 * num_pairs else values[[i]]
        for name, values in inputs.items()
    }


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A collator that hands on the weights of the examples that have one."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        if _WEIGHT in examples[0]:
            batch[_WEIGHT] = torch.tensor([example[_WEIGHT] for example in examples])
        return batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What is trained on.

    Attributes:
        dataset: The pairs with a weight above 0, flipped ones swapped; with `_WEIGHT` if any weight is not 1.
        num_before: Pairs that the audit has read.
    """

    dataset: Dataset
    num_before: int


def _kept_of(dataset: Dataset, audit: AuditResult) -> _Kept:
    """The rows of a dataset that an audit keeps.

    Raises:
        ValueError: If it keeps none.
    """
    ledger = audit.ledger.filter(pc.equal(audit.ledger["round"], 0))
    is_data = np.array(ledger["origin"].to_pylist()) == "data"
    is_kept = is_data & (audit.weights > 0)
    weights, is_flipped = audit.weights[is_kept], audit.decisions[is_kept] == "flip"
    logger.info("%d of %d pairs are trained on; see %s.", len(weights), len(dataset), audit.report)
    if not len(weights):
        raise ValueError(f"Training needs a pair with a weight above 0; {audit.report} keeps none. Lower rho.")
    kept = dataset.select(ledger["row"].to_numpy()[is_kept])
    if is_flipped.any():
        kept = kept.map(
            lambda row, i: {"chosen": row["rejected"], "rejected": row["chosen"]} if is_flipped[i] else row,
            with_indices=True,
        )
    if (weights != 1).any():
        kept = kept.add_column(_WEIGHT, weights)
    return _Kept(dataset=kept, num_before=int(is_data.sum()))


def _args_of(arguments: Mapping[str, Any]) -> Any:
    """The options of the training: a copy, since the number of epochs may change; as `DPOTrainer` if there are none."""
    args = arguments.get("args")
    if args is None:
        model = arguments["model"]
        name = model if isinstance(model, str) else model.config.name_or_path
        return DPOConfig(f"{name.split('/')[-1]}-DPO")
    return copy.copy(args)


def _audit_config(args: Any, audit: Mapping[str, Any]) -> ROPOConfig:
    """Options of an audit that reads what the training will read.

    Raises:
        ValueError: If an option is out of range, or is that of another loss.
    """
    config = ROPOConfig(
        **{
            "output_dir": f"{Path(args.output_dir)}-audit",  # beside it: push_to_hub uploads what lies in it
            "max_length": args.max_length or _WHOLE_TEXTS,
            **{name: getattr(args, name) for name in ("seed", "bf16", "fp16", "use_cpu", "disable_tqdm")},
            **audit,
        }
    )
    if config.loss not in _LOSSES:
        raise ValueError(f"audit needs no loss; got {config.loss!r}. It is loss_type of DPOConfig here.")
    if config.sft_weight:
        raise ValueError(
            f"audit needs no sft_weight; got {config.sft_weight}. It is loss_type ['sigmoid', 'sft'] with loss_weights "
            "of DPOConfig here."
        )
    return config


def _check_loss(args: Any, alpha: float) -> None:
    """ROPO's loss is a function of TRL's `sigmoid` loss, and of no other.

    Raises:
        ValueError: If α is above 0 with another loss.
    """
    others = {
        "loss_type": list(args.loss_type) != ["sigmoid"],
        "loss_weights": args.loss_weights not in (None, [1.0]),
        "use_weighting": args.use_weighting,
    }
    for name in (name for name, is_other in others.items() if is_other and alpha):
        raise ValueError(
            f"alpha above 0 needs loss_type 'sigmoid' alone; got {name}={getattr(args, name)}. Leave it out, or leave "
            "alpha at 0: pairs are filtered all the same."
        )


def _check_same_pairs(audit: AuditResult, dataset: Dataset) -> None:
    """A finished audit speaks of rows.

    Raises:
        ValueError: If they are rows of another dataset.
    """
    if read_json(audit.folder / "ropo_config.json")["data"] != load_pairs(dataset).sha256:
        raise ValueError(
            f"audit needs to be of train_dataset; {audit.folder} is of other pairs. Audit these, or leave audit out."
        )


def _check_audited_loss(audit: AuditResult) -> None:
    """α of an audit is that of its loss.

    Raises:
        ValueError: If that is neither ROPO nor DPO.
    """
    loss = read_json(audit.folder / "ropo_config.json")["options"]["loss"]
    if loss not in _LOSSES:
        raise ValueError(f"audit needs to be one for the loss ropo or dpo; got one for {loss!r}. Audit with these.")


def _run_audit(arguments: Mapping[str, Any], args: Any, config: ROPOConfig) -> AuditResult:
    """Audit the training set by the model that will be trained, as `DPOTrainer` would load it."""
    model, tokenizer = arguments["model"], arguments.get("processing_class")
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    adapter, dataset = arguments.get("peft_config"), arguments["train_dataset"]
    if isinstance(model, str):
        quantization = arguments.get("quantization_config")
        load_options = {
            "trust_remote_code": getattr(args, "trust_remote_code", False),
            **(args.model_init_kwargs or {}),
            **({} if quantization is None else {"quantization_config": quantization}),
        }
        return run_audit(Model(model, tokenizer=tokenizer, adapter=adapter, load_options=load_options), dataset, config)
    tokenizer = tokenizer or load_tokenizer(model.config.name_or_path)
    return run_audit(model, dataset, config, peft_config=adapter, processing_class=tokenizer)
