"""Golden numbers of every loss, proof that they would notice a mistake, and the claim of every paper.

`golden.json` holds worked values in float64 to 12 digits: for each case the loss, its parameters, margins h, losses and
gradient weights −dL/dh (for dr_dpo those of the batch loss). For ipo, h = β·Δ.
"""

import inspect
import json
import math
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from ropo.losses import (
    INPUTS,
    LOSSES,
    bind_loss,
    cdpo,
    clipped,
    dpo,
    dr_dpo,
    focalpo,
    forward_corrected,
    gamma_po,
    gamma_po_targets,
    gradient_weight,
    hinge,
    holder,
    methods_table,
    na,
    plc_dpo,
    rappo,
    rdpo,
    re_po,
    re_po_posterior,
    ropo,
    ropo_v1,
    sft,
    simpo,
)
from ropo.pairs import PairLogps, margin, margin_per_token

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text(encoding="utf-8"))
CASES = GOLDEN["cases"]
for case in CASES.values():
    case["params"] = {
        name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for name, value in case["params"].items()
    }
PARAMS = {case["loss"]: case["params"] for case in reversed(CASES.values())}  # those of the first case of each loss
MARGINS = {case["loss"]: torch.tensor(case["margins"], dtype=torch.float64) for case in reversed(CASES.values())}
GRID = torch.linspace(-8, 8, 3201, dtype=torch.float64)
RATES = (0.1, 0.2, 0.3, 0.4)

# The cases go down to alpha = 2 and up to focal_gamma = 2 on purpose; the warnings have tests of their own.
quiet = pytest.mark.filterwarnings("ignore:.*(damp wrong labels|push every pair up):UserWarning")


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual, expected, rtol=1e-10, atol=0.0):
    actual, expected = (torch.as_tensor(numbers, dtype=torch.float64) for numbers in (actual, expected))
    return torch.allclose(actual, expected, rtol=rtol, atol=atol)


def matches(case, loss):
    """Whether `loss`, a function of the margin, reproduces the numbers of a case."""
    h = float64(case["margins"])
    values, weights = loss(h), gradient_weight(loss, h)
    if "batch_value" in case:
        return close(values.mean(), case["batch_value"]) and close(weights / len(h), case["batch_weights"])
    return close(weights, case["weights"]) and ("values" not in case or close(values, case["values"]))


def noisy_weight(loss, h, rate, **params):
    """−d/dh of the expected loss of a pair whose label is flipped with probability `rate`."""
    return (1 - rate) * gradient_weight(loss, h, **params) - rate * gradient_weight(loss, -h, **params)


@quiet
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradient_weights_are_the_golden_ones(name):
    case = CASES[name]
    assert matches(case, partial(LOSSES[case["loss"]].fn, **case["params"]))


@pytest.mark.parametrize("reliability", [0.9, 0.8])
def test_re_po_posterior_and_its_mean_are_the_golden_ones(reliability):
    case = CASES[f"re_po reliability={reliability}"]
    posterior = re_po_posterior(float64(case["margins"]), reliability)
    assert close(posterior, case["posterior"])
    assert close(0.9 * reliability + 0.1 * posterior.mean(), case["next_reliability"])


# Teeth: each of these mistakes must be noticed by at least one case of each loss that can make it.

MUTANTS = {
    "roles swapped": lambda loss, h: loss(-h),
    "scaled by 1.01": lambda loss, h: 1.01 * loss(h),
    "shifted by 0.01": lambda loss, h: loss(h) + 0.01,
    "gradient scaled by 1.01": lambda loss, h: 1.01 * loss(h) - 0.01 * loss(h).detach(),
}
PARAM_MUTANTS = {
    "flip_rate": {"flip rate ignored": lambda _: 0.0, "flip rate doubled": lambda value: 2 * value},
    "alpha": {"alpha ignored": lambda _: 14.0, "alpha doubled": lambda value: 2 * value},
    "gamma": {"gamma ignored": lambda _: 1.0, "gamma doubled": lambda value: 2 * value},
    "holder_gamma": {"gamma ignored": lambda _: 2.0, "gamma doubled": lambda value: 2 * value},
    "target_margin": {"target ignored": lambda _: 0.0, "target doubled": lambda value: 2 * value},
    "beta_prime": {"beta' ignored": lambda _: 1.0, "beta' doubled": lambda value: 2 * value},
    "reliability": {"reliability ignored": lambda _: 1.0, "taken for the flip rate": lambda value: 1 - value},
    "focal_gamma": {"gamma ignored": lambda _: 1e-9, "gamma doubled": lambda value: 2 * value},
    "max_weight": {"clip ignored": lambda _: 1 - 1e-9, "taken for 1 - max_weight": lambda value: 1 - value},
    "mean_target_margin": {"target ignored": lambda _: 0.5, "target doubled": lambda value: 2 * value},
    "evenness": {"evenness ignored": lambda _: 1.0, "evenness doubled": lambda value: 2 * value},
    "num_dropped": {"number ignored": lambda _: 1.0, "number doubled": lambda value: 2 * value, "none": lambda _: 0.0},
    "direction_temperature": {"ignored": lambda _: 1.0, "doubled": lambda value: 2 * value},
    "tie_temperature": {"ignored": lambda _: 1.0, "doubled": lambda value: 2 * value},
    "correction_warmup": {"warm-up ignored": lambda _: 0.0},
    "correction_max": {"largest correction ignored": lambda _: 1.0},
    "correction_power": {"power ignored": lambda _: 1.0},
    "moments": {
        "moments ignored": lambda _: None,
        "mean ignored": lambda value: value * float64([0, 1]),
        "variance taken for spread": lambda value: value ** float64([1, 2]),
    },
    "progress": {"progress ignored": lambda _: 1.0},
    "reference_ratio": {"ratio ignored": lambda _: None, "sign turned": lambda value: -value},
    "beta": {"beta ignored": lambda _: 1.0, "beta doubled": lambda value: 2 * value},
}


FORMULA_MUTANTS = {
    ("ropo", "scale left out"): lambda h, alpha: dpo(h) + alpha * na(h),
    ("ropo", "parts exchanged"): lambda h, alpha: 4 * alpha / (1 + alpha) ** 2 * (alpha * dpo(h) + na(h)),
    ("ropo_v1", "parts exchanged"): lambda h, alpha, gamma: alpha * dpo(h) + gamma * na(h),
    ("rdpo", "taken for cdpo"): lambda h, flip_rate: cdpo(h, flip_rate=flip_rate),
    ("cdpo", "taken for rdpo"): lambda h, flip_rate: rdpo(h, flip_rate=flip_rate),
    ("forward_corrected", "taken for cdpo"): lambda h, flip_rate: cdpo(h, flip_rate=flip_rate),
    ("re_po", "posterior not held fixed"): lambda h, reliability: dpo(h) + (1 - re_po_posterior(h, reliability)) * h,
    ("holder", "first term left out"): lambda h, holder_gamma: -(1 + holder_gamma) * torch.sigmoid(h) ** holder_gamma,
    ("dr_dpo", "taken for the mean of dpo"): lambda h, **_: dpo(h),
    ("focalpo", "taken for the focal loss"): lambda h, focal_gamma: torch.sigmoid(-h) ** focal_gamma * dpo(h),
    ("focalpo", "factor held fixed"): lambda h, focal_gamma: torch.sigmoid(h).detach() ** focal_gamma * dpo(h),
    ("clipped", "outliers dropped"): lambda h, max_weight: dpo(h.clamp(min=math.log((1 - max_weight) / max_weight))),
    ("gamma_po", "taken for its form for simpo"): lambda h, **params: dpo(h - gamma_po_targets(h, **params)),
    ("gamma_po", "offset added"): lambda h, mean_target_margin, evenness: dpo(
        h + gamma_po_targets(h, mean_target_margin=mean_target_margin, evenness=evenness) - mean_target_margin
    ),
    ("rappo", "divided by all pairs"): lambda h, **params: rappo(h, **params) * (1 - params["num_dropped"] / len(h)),
    ("rappo", "any pair dropped"): lambda h, **params: rappo(h, **params | {"reference_ratio": -torch.ones_like(h)}),
    ("plc_dpo", "no ties"): lambda h, **params: plc_dpo(h, **params | {"tie_temperature": 1e-9}),
    ("plc_dpo", "taken for dpo"): lambda h, **_: dpo(h),
    ("ipo", "target not halved"): lambda h, beta: ((h - 1) / beta) ** 2,
    ("hinge", "squared"): lambda h: hinge(h) ** 2,
    ("simpo", "target added"): lambda h, target_margin: dpo(h + target_margin),
}


def assert_noticed(loss, mistake, wrong, cases):
    """Fail unless a case of `loss` differs from what `wrong(h, **params)` computes."""
    of_loss = [case for case in cases if case["loss"] == loss]
    noticed = any(not matches(case, partial(wrong, **case["params"])) for case in of_loss)
    assert noticed, f"no case of {loss} notices: {mistake}"


def mistakes_of(loss):
    """All mistakes that one can make in `loss`: what went wrong, and the wrong function of h and the parameters."""
    fn = LOSSES[loss].fn
    for mistake, mutant in MUTANTS.items():
        yield mistake, lambda h, mutant=mutant, **params: mutant(partial(fn, **params), h)
    for param in PARAMS[loss]:
        for mistake, change in PARAM_MUTANTS[param].items():
            yield mistake, lambda h, p=param, change=change, **params: fn(h, **params | {p: change(params[p])})
    for (mutated, mistake), mutant in FORMULA_MUTANTS.items():
        if mutated == loss:
            yield mistake, mutant


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("gamma_po")])
def test_gamma_po_targets_are_the_golden_ones(name):
    """To 10 digits, in which those after one more update of the authors' loop would differ."""
    assert close(gamma_po_targets(MARGINS["gamma_po"], **CASES[name]["params"]), CASES[name]["targets"])


@quiet
@pytest.mark.parametrize("loss", LOSSES)
def test_golden_numbers_notice_mistakes(loss):
    assert set(PARAMS[loss]) >= set(LOSSES[loss].params), f"the cases of {loss} leave an option out"
    for mistake, wrong in mistakes_of(loss):
        assert_noticed(loss, mistake, wrong, CASES.values())


def test_cases_without_flips_would_be_called_toothless():
    dpo_as_rdpo = CASES["dpo"] | {"loss": "rdpo", "params": {"flip_rate": 0.0}}
    with pytest.raises(AssertionError, match=r"rdpo notices: .*ignored"):
        assert_noticed("rdpo", "flip rate ignored", dict(mistakes_of("rdpo"))["flip rate ignored"], [dpo_as_rdpo])


POLICY, REFERENCE = (-12.0, -13.5), (-12.5, -12.8)  # chosen, rejected
END_TO_END = {
    "dpo": ({}, 0.634946101596),
    "cdpo": ({"flip_rate": 0.1}, 0.646946101596),
    "rdpo": ({"flip_rate": 0.1}, 0.619946101596),
    "ipo": ({}, 14.44),
    "hinge": ({}, 0.88),
    "na": ({}, 0.470035948235),
    "ropo": ({"alpha": 14.0}, 1.79584517825),
    "ropo_v1": ({"alpha": 2.0, "gamma": 0.1}, 1.00356650663),
    "holder": ({"holder_gamma": 2.0}, -0.544892271535),
    "forward_corrected": ({"flip_rate": 0.1}, 0.646318478969),
    "focalpo": ({"focal_gamma": 0.05}, 0.615104892906),
    "clipped": ({"max_weight": 0.5}, 0.634946101596),
}


def one_pair(chosen, rejected):
    return PairLogps(chosen=float64([chosen]).requires_grad_(), rejected=float64([rejected]).requires_grad_())


def end_to_end(loss, policy, reference, beta=0.1):
    options = END_TO_END[loss][0]
    return bind_loss(loss, beta=beta, options=options)(margin(policy, reference, beta=beta))


@pytest.mark.parametrize("loss", END_TO_END)
def test_from_log_probabilities_to_the_loss(loss):
    policy, reference, value = one_pair(*POLICY), one_pair(*REFERENCE), END_TO_END[loss][1]
    assert close(end_to_end(loss, policy, reference), [value])
    mistakes = {
        "roles swapped": end_to_end(loss, one_pair(*POLICY[::-1]), one_pair(*REFERENCE[::-1])),
        "models swapped": end_to_end(loss, reference, policy),
        "reference ignored": end_to_end(loss, policy, one_pair(0.0, 0.0)),
        "beta doubled": end_to_end(loss, policy, reference, beta=0.2),
    }
    for mistake, wrong in mistakes.items():
        assert not close(wrong, [value], rtol=1e-6), f"{loss} does not notice: {mistake}"


def test_gradient_reaches_the_log_probabilities():
    policy = one_pair(*POLICY)
    end_to_end("ropo", policy, one_pair(*REFERENCE)).sum().backward()
    assert close(policy.chosen.grad, [-0.098496934708])
    assert close(policy.rejected.grad, [0.098496934708])


def test_simpo_works_on_means_per_token():
    tokens = {"chosen_tokens": float64([6.0]), "rejected_tokens": float64([9.0])}
    m = margin_per_token(PairLogps(chosen=float64([-12.0]), rejected=float64([-13.5]), **tokens), beta=2.0)
    assert close(simpo(m, target_margin=0.5), [math.log1p(math.exp(1.5))])  # m = 2·(−12/6 + 13.5/9) = −1


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_margins_stay_finite_and_float32_agrees_with_float64(loss):
    def values_and_weights(h):
        contradicted = {"reference_ratio": -torch.ones_like(h)} if "reference_ratio" in PARAMS[loss] else {}
        params = PARAMS[loss] | contradicted
        return torch.stack([LOSSES[loss].fn(h, **params), gradient_weight(loss, h, **params)])

    extremes = float64([-1e4, -1e3, -100.0, -50.0, -20.0, 0.0, 20.0, 50.0, 100.0, 1e3, 1e4])
    exact, single = values_and_weights(extremes), values_and_weights(extremes.float())
    assert single.dtype == torch.float32
    assert torch.isfinite(exact).all()
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)


def test_no_threshold_beyond_which_the_logarithm_is_approximate():
    h = [-30.0, -21.0, -19.0, 21.0, 50.0]
    assert close(dpo(float64(h)), [math.log1p(math.exp(-x)) for x in h], rtol=1e-14)
    h = float64([-1000.0, -50.0, 50.0, 1000.0])
    assert close(ropo(h), [252.373333333333, 15.9288888889, 7.200666099065e-22, 0.0], rtol=1e-11)
    assert close(gradient_weight("ropo", h)[0], 0.248888888889, rtol=1e-11)


def assert_minimum(loss, h, rate, **params):
    """The expected loss under flips falls before h, rises behind it."""
    below, at, above = noisy_weight(loss, float64([h - 0.01, h, h + 0.01]), rate, **params)
    assert below > 0 > above
    assert abs(at) < 1e-10


@pytest.mark.parametrize("alpha", [6.0, 14.0, 30.0])
def test_ropo_weighs_at_most_1_at_its_peak(alpha):
    weights = gradient_weight("ropo", GRID, alpha=alpha)
    peak = math.log((alpha - 1) / (alpha + 1))
    assert weights.max() <= 1 + 1e-12
    assert abs(GRID[weights.argmax()] - peak) <= 0.0026  # half a step of the grid, and a little
    assert close(gradient_weight("ropo", float64([peak]), alpha=alpha), [1.0], rtol=1e-14)


def test_ropo_tends_to_na_and_to_dpo():
    assert close(ropo(GRID, alpha=1e9), 4 * na(GRID), rtol=1e-7, atol=1e-7)
    with pytest.warns(UserWarning, match="damp wrong labels"):
        assert close(ropo(GRID, alpha=1e-9) / 4e-9, dpo(GRID), rtol=1e-7)


@pytest.mark.parametrize("row", GOLDEN["ropo_minimisers"], ids=lambda row: f"{row['alpha']:g}-{row['flip_rate']}")
def test_ropo_nearly_tolerates_flips(row):
    alpha, rate, h = row["alpha"], row["flip_rate"], row["margin"]
    a = alpha * (1 - 2 * rate)
    assert close((a - 1 + math.sqrt((a - 1) ** 2 + 4 * a * (1 - rate))) / (2 * a), row["probability"])
    if h is None:  # without flips the margin may grow for ever
        assert (noisy_weight("ropo", GRID, rate, alpha=alpha) > 0).all()
    else:
        assert_minimum("ropo", h, rate, alpha=alpha)
        assert close(torch.sigmoid(float64(h)), row["probability"])
        assert_minimum("dpo", math.log(row["dpo_probability"] / (1 - row["dpo_probability"])), rate)


@quiet
@pytest.mark.parametrize(("alpha", "gamma"), [(2.0, 0.1), (0.2, 0.1), (3.0, 0.5)])
def test_ropo_v1_is_ropo_up_to_scale(alpha, gamma):
    a = alpha / gamma
    expected = gamma * (1 + a) ** 2 / (4 * a) * ropo(GRID, alpha=a)
    assert close(ropo_v1(GRID, alpha=alpha, gamma=gamma), expected, rtol=1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_na_keeps_the_direction_of_the_gradient_under_flips(rate):
    assert close(na(GRID) + na(-GRID), torch.ones_like(GRID), rtol=1e-14)
    assert close(noisy_weight("na", GRID, rate), (1 - 2 * rate) * gradient_weight("na", GRID), rtol=1e-9)


@pytest.mark.parametrize("rate", RATES)
def test_rdpo_is_unbiased(rate):
    expected = (1 - rate) * rdpo(GRID, flip_rate=rate) + rate * rdpo(-GRID, flip_rate=rate)
    assert close(expected, dpo(GRID), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_cdpo_and_ipo_shrink_margins_by_a_known_amount(rate):
    p = (1 - rate) * 0.9 + rate * 0.1
    assert_minimum("cdpo", math.log(p / (1 - p)), rate, flip_rate=0.1)
    assert_minimum("ipo", (1 - 2 * rate) * 0.5, rate, beta=0.1)


@pytest.mark.parametrize("rate", RATES)
def test_hinge_has_its_minimum_at_1_whatever_the_rate(rate):
    risk = (1 - rate) * hinge(GRID) + rate * hinge(-GRID)
    assert abs(GRID[risk.argmin()] - 1) < 1e-9


@pytest.mark.parametrize("rate", RATES)
def test_holder_keeps_the_direction_of_the_gradient_at_gamma_2_alone(rate):
    assert close(holder(GRID) + holder(-GRID), -torch.ones_like(GRID), rtol=1e-13)
    assert close(noisy_weight("holder", GRID, rate), (1 - 2 * rate) * gradient_weight("holder", GRID), rtol=1e-8)
    for gamma in (1.0, 3.0, 4.0):
        sums = holder(GRID, holder_gamma=gamma) + holder(-GRID, holder_gamma=gamma)
        assert sums.max() - sums.min() > 0.01


@pytest.mark.parametrize(("loss", "params"), [("holder", {}), ("na", {}), ("forward_corrected", {"flip_rate": 0.1})])
def test_redescending_losses_let_go_of_contradicted_pairs(loss, params):
    far, near = gradient_weight(loss, float64([-40.0, 0.0]), **params)
    assert 0 <= far < 1e-15 * near


def test_holder_tends_to_dpo_minus_na():
    """Not to dpo: the weight γ·(1+γ)·p^γ·(1−p)² tends to γ·(1−p)²."""
    weights = gradient_weight("holder", GRID, holder_gamma=1e-8) / 1e-8
    assert close(weights, gradient_weight("dpo", GRID) - gradient_weight("na", GRID), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rate", RATES)
def test_forward_correction_undoes_flips_of_its_rate(rate):
    assert (noisy_weight("forward_corrected", GRID, rate, flip_rate=rate) > 0).all()  # as clean labels: h may grow
    p = (1 - rate - 0.05) / 0.9  # with ε = 0.05: (1−ε)·p + ε·(1−p) = 1 − rate
    assert_minimum("forward_corrected", math.log(p / (1 - p)), rate, flip_rate=0.05)
    assert forward_corrected(GRID, flip_rate=rate).max() < -math.log(rate)


@pytest.mark.parametrize("flip_rate", [0.0, 0.05, 0.2, 0.45])
def test_re_po_has_the_gradient_of_the_forward_correction(flip_rate):
    weights = gradient_weight("re_po", GRID, reliability=1 - flip_rate)
    assert close(weights, gradient_weight("forward_corrected", GRID, flip_rate=flip_rate), rtol=1e-9, atol=1e-14)
    assert (weights >= 0).all()


def test_re_po_takes_a_reliability_per_pair():
    h, reliability = float64([-1.0, 0.0, 2.0]), float64([0.6, 0.9, 1.0])
    one_by_one = [re_po(h[i : i + 1], reliability=reliability[i].item()).item() for i in range(3)]
    assert close(re_po(h, reliability=reliability), one_by_one)


@pytest.mark.parametrize("row", GOLDEN["re_po_fixed_points"])
def test_re_po_posteriors_converge_to_the_golden_reliability(row):
    reliability = row["start"]
    for _ in range(400):
        reliability = re_po_posterior(float64(row["margins"]), reliability).mean().item()
    assert close(reliability, row["reliability"])


@pytest.mark.parametrize("loss", ["cdpo", "rdpo", "forward_corrected"])
def test_losses_that_know_the_flip_rate_are_dpo_without_flips(loss):
    assert close(LOSSES[loss].fn(GRID, flip_rate=0.0), dpo(GRID), rtol=1e-14)
    assert close(gradient_weight(loss, GRID, flip_rate=0.0), gradient_weight("dpo", GRID), rtol=1e-14)


def test_dr_dpo_lies_between_the_mean_and_the_best_pair_and_ignores_an_outlier():
    h = float64([-5.0, -1.0, 0.0, 0.5, 3.0])
    assert close(dr_dpo(h, beta_prime=1e7).mean(), dpo(h).mean(), rtol=1e-6)
    assert close(dr_dpo(h, beta_prime=1e-4).mean(), dpo(h).min(), rtol=1e-2)
    assert gradient_weight("dr_dpo", float64([-50.0, 0.0, 1.0]))[0] < 1e-15


def of_part(loss, h, here):
    """The losses of the pairs `here`, taken for the whole batch."""
    per_pair = ("reference_ratio",)
    params = {name: value[here] if name in per_pair else value for name, value in PARAMS[loss].items()}
    return LOSSES[loss].fn(h[here], **params)


@pytest.mark.parametrize("loss", [name for name, spec in LOSSES.items() if spec.needs_whole_batch])
@pytest.mark.parametrize("first", [3, 2])
def test_a_loss_of_the_batch_is_the_sum_of_its_parts_if_each_sees_the_batch(loss, first):
    """As in data-parallel training: each process has the gradient of its pairs alone, and they are added up."""
    h, fn = MARGINS[loss], partial(LOSSES[loss].fn, **PARAMS[loss])
    whole = h.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fn(whole).mean(), whole)
    values, slopes = [], []
    for here in (slice(0, first), slice(first, len(h))):
        part = h[here].clone().requires_grad_()
        values.append(fn(torch.cat([h[: here.start], part, h[here.stop :]]))[here].sum() / len(h))
        slopes.append(torch.autograd.grad(values[-1], part)[0])
        assert not close(of_part(loss, h, here), fn(h)[here], rtol=0.001)
    assert close(sum(values).detach(), fn(h).mean())
    assert close(torch.cat(slopes), gradient)


def test_focalpo_damps_what_is_contradicted_and_turns_far_out():
    ratio = gradient_weight("focalpo", GRID) / gradient_weight("dpo", GRID)
    assert (ratio.diff() > 0).all()
    assert close(focalpo(GRID, focal_gamma=1e-9), dpo(GRID), rtol=1e-7)
    with pytest.warns(UserWarning, match=r"margin below .*-0\.5 "):
        below, above = gradient_weight("focalpo", float64([-0.55, -0.53]), focal_gamma=1.0)
    assert below < 0 < above
    far = gradient_weight("focalpo", float64([-20.1, -19.9]))
    assert far[0] < 0 < far[1]


@pytest.mark.parametrize("max_weight", [0.2, 0.5, 0.9])
def test_clipped_is_dpo_with_the_best_outlier_of_each_pair(max_weight):
    offsets = torch.linspace(0, 20, 4001, dtype=torch.float64)
    h = float64([-6.0, -2.5, -1.0, 0.0, 1.0, 3.0])
    best = [(dpo(one + offsets) + max_weight * offsets).min() for one in h]
    assert close(clipped(h, max_weight=max_weight), torch.stack(best), rtol=1e-4)
    weights = gradient_weight("clipped", GRID, max_weight=max_weight)
    assert close(weights, gradient_weight("dpo", GRID).clamp(max=max_weight), rtol=1e-12)
    assert close(gradient_weight("clipped", float64([0.0])), [0.5], rtol=1e-14)  # where every pair starts


@pytest.mark.parametrize("evenness", [0.3, 1.0, 10.0])
def test_gamma_po_gives_larger_targets_to_pairs_that_fit(evenness):
    h, mean = float64([-5.0, -1.0, 0.0, 0.5, 3.0]), 0.8
    targets = gamma_po_targets(h, mean_target_margin=mean, evenness=evenness)
    assert (targets.diff() > 0).all()
    assert close(targets.mean(), mean)
    at_minimum = torch.softmax(-mean * torch.sigmoid(targets - h) / evenness, dim=0)
    assert close(targets, mean * len(h) * at_minimum, rtol=1e-3)
    assert close(gamma_po(h, evenness=1e9), dpo(h), rtol=1e-8)
    assert close(gradient_weight("gamma_po", float64([-50.0, 0.0])).amax(), 1.0)  # not robust to flips, and says so


def test_rappo_drops_the_worst_of_those_that_the_reference_contradicts_and_no_other():
    h, ratio = float64([-9.0, -3.0, 0.5, -2.0, 1.0]), float64([0.1, -0.1, -2.0, 0.0, 3.0])
    for num_dropped, dropped in ((0.0, []), (1.0, [1]), (2.0, [1, 3]), (3.0, [1, 2, 3]), (8.0, [1, 2, 3])):
        loss = rappo(h, num_dropped=num_dropped, reference_ratio=ratio)
        kept = [i for i in range(5) if i not in dropped]
        assert loss.nonzero().flatten().tolist() == kept
        assert close(loss.mean(), dpo(h)[kept].mean())
    assert close(rappo(h), dpo(h))
    assert rappo(h, num_dropped=5.0, reference_ratio=-torch.ones(5)).tolist() == [0.0] * 5


def test_plc_dpo_starts_as_dpo_and_lets_go_of_what_is_surely_flipped():
    moments = float64([0.5, 2.0])
    for progress in (0.0, 0.05, 0.07):
        assert close(plc_dpo(GRID, moments=moments, progress=progress), dpo(GRID))
    flipped, fitting = gradient_weight("plc_dpo", float64([-20.0, 5.0]), moments=moments)
    assert flipped == pytest.approx(1 - 0.85, abs=1e-6)
    assert fitting == pytest.approx(torch.sigmoid(torch.tensor(-5.0)).item(), rel=0.05)


def test_plc_dpo_reads_a_margin_by_where_it_stands():
    """A margin of 0.7 is read alike wherever it is 1.5 spreads above the mean; what is read differs elsewhere."""
    h, same = float64([-2.0, -0.4, 0.3, 1.0, 2.5]), float64([0.7])
    assert close(plc_dpo(h), plc_dpo(h, moments=torch.stack([h.mean(), h.var(correction=0)])))
    alike = [plc_dpo(same, moments=float64([0.7 - 1.5 * s, s * s])) for s in (0.5, 1.0, 4.0)]
    assert close(torch.cat(alike), alike[0].expand(3))
    assert not close(plc_dpo(same, moments=float64([0.7 + 1.5, 1.0])), alike[0], rtol=0.01)
    assert torch.isfinite(plc_dpo(torch.zeros(3))).all()  # nothing has moved yet


def test_all_monotone_losses_rank_pairs_alike_and_cdpo_does_not():
    h = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    order = (-h).argsort()
    for losses in (dpo(h), na(h), ropo(h, alpha=6.0), ropo(h), ropo(h, alpha=30.0)):
        assert torch.equal(losses.argsort(), order)
    assert not torch.equal(cdpo(h, flip_rate=0.1).argsort(), order)


def test_gradient_weight_works_without_gradients_and_leaves_the_margin_alone():
    h = float64([0.0])
    with torch.no_grad():
        assert close(gradient_weight("ipo", h, beta=0.1), [100.0])
        assert close(gradient_weight(bind_loss("ipo", beta=0.1, options={}), h), [100.0])
    assert not h.requires_grad
    assert not gradient_weight("dpo", h.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("call", "is_warned"),
    [
        (lambda: ropo(torch.zeros(1), alpha=1.9), True),
        (lambda: ropo(torch.zeros(1), alpha=2.0), False),
        (lambda: ropo_v1(torch.zeros(1), alpha=0.19, gamma=0.1), True),
        (lambda: ropo_v1(torch.zeros(1), alpha=2.0, gamma=0.1), False),
        (lambda: bind_loss("ropo", beta=0.1, options={"alpha": 1}), True),
    ],
)
def test_a_ropo_that_does_not_damp_wrong_labels_warns(call, is_warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert [warning.category for warning in caught] == [UserWarning] * is_warned
    assert all("an undecided one" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("holdr", {}, "got 'holdr'. Did you mean holder? Choose one of: ropo, "),
        ("kto", {}, "got 'kto'. Choose one of: ropo, "),
        ("dpo", {"flip_rate": 0.3}, "Leave it out, or choose a loss that takes it: cdpo, rdpo, forward_corrected."),
        ("ropo", {"flip_rate": 0.3}, "ropo needs options among alpha; got flip_rate. Leave it out"),
        ("ropo", {"alhpa": 14.0}, "got alhpa. Did you mean alpha?"),
        ("ipo", {"beta": 0.1}, "ipo needs no options; got beta"),
        ("dr_dpo", {"reliability": 0.9}, "dr_dpo needs options among beta_prime; got reliability"),
        ("rdpo", {}, "rdpo needs flip_rate; got none"),
        ("ropo_v1", {}, "ropo_v1 needs alpha; got none. No default suits all data: add --alpha NUMBER."),
        ("ropo_v1", {"alpha": 2.0}, "ropo_v1 needs gamma; got none. No default suits all data: add --loss_args gamma="),
        ("rdpo", {"flip_rate": 0.6}, "rdpo needs flip_rate in [0, 0.5); got 0.6. At 0.5 the labels carry no"),
        ("cdpo", {"flip_rate": -0.1}, "got -0.1"),
        ("cdpo", {"flip_rate": 0.5}, "got 0.5"),
        ("forward_corrected", {"flip_rate": math.nan}, "got nan"),
        ("ropo", {"alpha": 0.0}, "ropo needs a finite alpha > 0; got 0.0. The paper uses 14"),
        ("ropo", {"alpha": math.inf}, "got inf"),
        ("ropo_v1", {"alpha": 2.0, "gamma": 0.0}, "use na"),
        ("ropo_v1", {"alpha": 0.0, "gamma": 0.1}, "use dpo"),
        ("holder", {"holder_gamma": -2.0}, "holder needs a finite holder_gamma > 0; got -2.0"),
        ("dr_dpo", {"beta_prime": 0.0}, "dr_dpo needs a finite beta_prime > 0"),
        ("simpo", {"target_margin": -0.5}, "simpo needs a finite target_margin >= 0; got -0.5"),
        ("re_po", {"reliability": 0.0}, "re_po needs reliability in (0, 1]; got 0.0"),
        ("re_po", {"reliability": 1.1}, "got 1.1"),
        ("focalpo", {"focal_gamma": 0.0}, "focalpo needs a finite focal_gamma > 0; got 0.0. The paper uses 0.05"),
        ("clipped", {"max_weight": 1.0}, "clipped needs max_weight in (0, 1); got 1.0. For the limit"),
        ("clipped", {"max_weight": math.nan}, "got nan"),
        ("gamma_po", {"mean_target_margin": 0.0}, "gamma_po needs a finite mean_target_margin > 0"),
        ("gamma_po", {"evenness": -1.0}, "gamma_po needs a finite evenness > 0"),
        ("rappo", {"num_dropped": 1.5}, "rappo needs a whole num_dropped >= 0; got 1.5"),
        ("rappo", {"num_dropped": -1}, "got -1"),
        ("rappo", {"reference_ratio": 0.0}, "rappo needs options among num_dropped; got reference_ratio"),
        ("plc_dpo", {"direction_temperature": 0.0}, "plc_dpo needs a finite direction_temperature > 0"),
        ("plc_dpo", {"tie_temperature": 0.0}, "plc_dpo needs a finite tie_temperature > 0"),
        ("plc_dpo", {"correction_power": 0.0}, "plc_dpo needs a finite correction_power > 0"),
        ("plc_dpo", {"correction_max": 1.1}, "plc_dpo needs correction_max in [0, 1]; got 1.1"),
        ("plc_dpo", {"correction_warmup": 1.0}, "plc_dpo needs correction_warmup in [0, 1); got 1.0"),
        ("plc_dpo", {"progress": 0.5}, "got progress. Leave it out"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_bound(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bind_loss(name, beta=0.1, options=options)


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
def test_options_are_numbers(value):
    with pytest.raises(TypeError, match=r"rdpo .*flip_rate"):
        bind_loss("rdpo", beta=0.1, options={"flip_rate": value})


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_is_positive_even_where_only_the_margin_uses_it(beta):
    for loss in ("dpo", "ipo"):
        with pytest.raises(ValueError, match=f"{loss} .*beta > 0; got {beta}"):
            bind_loss(loss, beta=beta, options={})


def test_what_changes_between_batches_is_given_at_the_call():
    h = float64([-1.0, 0.0, 2.0])
    re_po_loss = bind_loss("re_po", beta=0.1, options={"reliability": 0.8})
    reliability = float64([0.6, 0.7, 0.8])
    assert close(re_po_loss(h), re_po(h, reliability=0.8))
    assert close(re_po_loss(h, reliability=reliability), re_po(h, reliability=reliability))
    with pytest.raises(ValueError, match="reliability in"):
        re_po_loss(h, reliability=float64([0.6, 0.7, 1.8]))


def test_every_loss_declares_what_it_needs():
    for name, spec in LOSSES.items():
        arguments = inspect.signature(spec.fn).parameters
        assert spec.fn.__name__ == name
        assert spec.needs_flip_rate == ("flip_rate" in arguments)
        assert set(spec.inputs) == set(arguments) & set(INPUTS)
        one, all_five = of_part(name, MARGINS[name], slice(1)), of_part(name, MARGINS[name], slice(5))
        assert spec.needs_whole_batch != close(one, all_five[:1])
        assert spec.is_per_pair == (not spec.needs_whole_batch and not spec.inputs)
        assert spec.needs_reference != spec.per_token
        assert set(spec.params) == set(arguments) - {"margin", "beta", *set(INPUTS) - {"reliability"}}
        assert spec.formula.startswith(("L(h) = ", "L(m) = ", "L = "))
        assert spec.paper.startswith(("arXiv:", "after arXiv:", "Mitchell 2023", "RAPPO, ICLR 2026"))
        assert spec.when.endswith(".")
    with pytest.raises(TypeError):
        LOSSES["mine"] = LOSSES["dpo"]


def test_methods_table_has_a_row_for_each_loss():
    header, _, *rows = [line for line in methods_table().splitlines() if line.startswith("|")]
    assert [row.split("`")[1] for row in rows] == list(LOSSES)
    assert {row.count("|") for row in rows} == {header.count("|")}
    cells = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[1:-1]] for row in rows}
    assert cells["rdpo"][2:5] == ["arXiv:2403.00409", "reference, flip rate", "`flip_rate`"]
    assert cells["simpo"][3:5] == ["per token", "`target_margin` = 0.5"]


def test_sft_is_the_mean_over_the_tokens_of_the_chosen_response():
    """Of 3 tokens with chances 1/2, 1/4 and 1/8 it is 2·ln 2; of one with 1/8, 3·ln 2."""
    chosen = torch.tensor([math.log(1 / 64), math.log(1 / 8)], dtype=torch.float64)
    policy = PairLogps(
        chosen=chosen, rejected=-torch.ones(2), chosen_tokens=torch.tensor([3, 1]), rejected_tokens=torch.ones(2)
    )
    torch.testing.assert_close(sft(policy), torch.tensor([2, 3], dtype=torch.float64) * math.log(2))
    with pytest.raises(ValueError, match="token counts"):
        sft(PairLogps(chosen=chosen, rejected=chosen))


def gradient_of(loss, h, weight):
    h = h.clone().requires_grad_(True)
    (loss(h) * weight).sum().backward()
    return h.grad


@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0, 1.0], [0.01, 1.0, 1.0, 0.5], [2.0, 0.3, 1.0, 0.0]])
def test_dr_dpo_by_weights_has_the_gradient_of_its_value(weight):
    """A pair that weighs next to nothing changes nothing; once it halved the gradient of the others."""
    h, weight = float64([5.0, -1.0, -1.0, 0.3]), float64(weight)
    found = gradient_of(lambda one: dr_dpo(one, weight=weight), h, weight)
    free = h.clone().requires_grad_(True)
    value = -torch.log((weight * torch.exp(-dpo(free))).sum() / weight.sum())
    (weight.sum() * value).backward()
    assert close(found, free.grad)
    assert close(dr_dpo(h, weight=weight), value.detach().expand(4))


def test_rappo_drops_as_much_weight_as_pairs():
    """One pair by weights of ½ is two pairs; one of next to no weight takes no other's place."""
    h, ratio = float64([-5.0, -2.0, -1.0, 3.0]), float64([-1.0, -1.0, -1.0, 1.0])
    plain = rappo(h[1:], reference_ratio=ratio[1:])
    weighted = rappo(h, reference_ratio=ratio, weight=float64([1e-9, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(weighted[1:], plain, rtol=0, atol=1e-6)
    halves = rappo(h, reference_ratio=ratio, weight=float64([0.5, 0.5, 1.0, 1.0]))
    assert halves[:2].tolist() == [0.0, 0.0]
    assert halves[2] > dpo(h)[2]
    assert close(rappo(h, reference_ratio=ratio, weight=torch.ones(4)), rappo(h, reference_ratio=ratio))
