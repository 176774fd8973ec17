"""What a pair costs: every loss as a pure function of the margin, and the table of them all.

In: the margin h of each pair (`pairs.margin`; for `simpo` the margin m of `pairs.margin_per_token`).
Out: the loss of each pair, not reduced; or its gradient weight w(h) = −dL/dh, the force that pushes the margin up.

In reading order: `margin_losses` (a pair by itself), `batch_losses` (a pair among others), `sft` (what may be added to
any), `table` (all of them, what each needs, how to bind one to its options).

What all losses promise, so that none repeats it: they take `margin` and options by keyword, return the loss per pair,
not reduced, and refuse an option outside its range with a `ValueError` that says what to do instead.
"""

from ropo.losses.batch_losses import dr_dpo, gamma_po, gamma_po_targets, plc_dpo, rappo
from ropo.losses.margin_losses import (
    cdpo,
    clipped,
    dpo,
    focalpo,
    forward_corrected,
    hinge,
    holder,
    ipo,
    na,
    rdpo,
    re_po,
    re_po_posterior,
    ropo,
    ropo_v1,
    simpo,
)
from ropo.losses.sft import sft
from ropo.losses.table import INPUTS, LOSSES, BoundLoss, Loss, LossSpec, bind_loss, gradient_weight, methods_table

__all__ = [
    "INPUTS",
    "LOSSES",
    "BoundLoss",
    "Loss",
    "LossSpec",
    "bind_loss",
    "cdpo",
    "clipped",
    "dpo",
    "dr_dpo",
    "focalpo",
    "forward_corrected",
    "gamma_po",
    "gamma_po_targets",
    "gradient_weight",
    "hinge",
    "holder",
    "ipo",
    "methods_table",
    "na",
    "plc_dpo",
    "rappo",
    "rdpo",
    "re_po",
    "re_po_posterior",
    "ropo",
    "ropo_v1",
    "sft",
    "simpo",
]
