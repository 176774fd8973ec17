"""Numbers of the report -> what they mean, in plain sentences.

In: the dict of `tables.build_tables`. Out: strings, with commands and options between backticks.
"""

from collections.abc import Mapping
from typing import Any

from ropo.audit.weights import Why
from ropo.provenance import Json
from ropo.report.advice import FEW, SMALL_RATE, advice, is_open, is_whole, num_open_flips
from ropo.report.biases import LENGTH, kept_differ
from ropo.report.clauses import CLAUSES
from ropo.report.wording import count, counted, decimal, listed, percent, percent_range

NUM_DIFFERING = 0.03  # of the pairs: the two sums of flips differ by so much that a reader notices

_CALLED = "This counts what P(flipped) calls, not how well the margins rank the labels."

Table = Mapping[str, Any]


def write_sentences(tables: Table) -> Json:
    """All prose of the report that depends on numbers."""
    return {
        "title": title(tables),
        "interval": interval(tables),
        "to_read": to_read(tables),
        "look": look(tables),
        "margins": margins(tables),
        "budget": budget(tables),
        "alpha": alpha(tables),
        "beta": beta(tables),
        "done": done(tables),
        "trust": trust(tables),
        "knowledge": knowledge(tables),
        "readings": readings(tables),
        "tokens": tokens(tables),
        "hard": [why_hard(pair) for pair in tables["hard"]],
        "next": list(advice(tables).values()),
    }


def title(tables: Table) -> str:
    """The one sentence that a reader takes away."""
    estimate = tables["estimate"]
    if not estimate["is_informative"]:
        return "How many labels are flipped cannot be told"
    if estimate["may_be_clean"]:
        if estimate["is_vague"]:
            return f"Anything from none to {percent(estimate['high'])} of the labels may be flipped"
        return f"The labels may well be clean: {percent(estimate['high'])} flipped at most"
    return f"About {percent(estimate['rate'])} of the labels look flipped"


def interval(tables: Table) -> str:
    """How sure that is, or why nothing can be said."""
    estimate = tables["estimate"]
    if not estimate["is_informative"]:
        return str(estimate["reason"] or "The estimate gave no reason.")
    shown = percent_range(estimate["low"], estimate["high"])
    best = f"; best guess {percent(estimate['rate'])}" if estimate["may_be_clean"] else ""
    return f"{percent(estimate['level'])} interval {shown}{best}, from {counted(estimate['num_pairs'], 'pair')}."


def to_read(tables: Table) -> str:
    """The same as a figure."""
    review, contradicted = tables["review"], tables["contradicted"]
    if review is not None and review["num_likely"]:
        return count(review["num_likely"])
    if is_open(tables):
        return f"the first {min(FEW, contradicted['num'])}"
    return "none"


def look(tables: Table) -> str:
    """How many pairs a person should read."""
    review, estimate, num_judged = tables["review"], tables["estimate"], tables["counts"]["num_judged"]
    known = f" {counted(num_judged, 'pair')} with a review decision are not counted." if num_judged else ""
    if review is not None and review["num_likely"]:
        contradicted = tables["contradicted"]
        has_more = contradicted is not None and contradicted["num"] > review["num_likely"]
        more = f" {doubt(tables)}" if has_more and estimate["is_vague"] else ""
        return f"{_likely(tables)}{more}{known}"
    if _may_hide_flips(tables):
        return f"{doubt(tables)}{known}"
    if review is None:
        return f"No pair can be called suspect on this evidence, so there is no list to read.{known}"
    if estimate["high"] <= SMALL_RATE:
        return (
            f"No pair is more likely flipped than right, and {percent(estimate['high'])} of the labels are wrong at "
            f"most, so none needs to be read.{known}"
        )
    return f"No pair is more likely flipped than right.{known}"


def _may_hide_flips(tables: Table) -> bool:
    """Whether there are held-out margins that may rank flips though P(flipped) calls none."""
    estimate = tables["estimate"]
    return tables["contradicted"] is not None and not (estimate["is_informative"] and estimate["high"] <= SMALL_RATE)


def _likely(tables: Table) -> str:
    """What P(flipped) adds up to, and why the flip rate may say another number."""
    review, estimate = tables["review"], tables["estimate"]
    text = (
        f"Read these first: each is more likely flipped than right. Their P(flipped) add up to about "
        f"{counted(review['found_likely'], 'wrong label')}, those of all pairs to {count(review['found_all'])}."
    )
    by_rate = num_open_flips(tables, estimate["rate"])
    if abs(by_rate - review["found_all"]) <= max(1.0, NUM_DIFFERING * by_rate):
        return text
    return f"{text} The flip rate makes it {count(by_rate)}: it is estimated before, and by itself."


def doubt(tables: Table) -> str:
    """How many labels are contradicted by models that have not seen them, and that it is open what they are."""
    contradicted, review = tables["contradicted"], tables["review"]
    if contradicted is None:
        return ""
    if not contradicted["num"]:
        return "No label is contradicted by models that have not seen it, so there is no list to read."
    labels = counted(contradicted["num"], "label")
    is_are = "is" if contradicted["num"] == 1 else "are"
    shown = f"{labels} ({percent(contradicted['share'])}) {is_are} contradicted by models that have not seen "
    shown += "it." if contradicted["num"] == 1 else "them."
    if review is not None and review["num_likely"]:
        return f"{shown} Whether the others among these are flips or honest doubt cannot be told."
    if review is not None:
        up_to = f"but up to {percent(tables['estimate']['high'])} of the labels may be wrong"
        shown = f"No pair is more likely flipped than right, {up_to}. {shown}"
    where = "they stand first in `review.csv`" if tables["task"] == "audit" else "the first ones are shown below"
    return f"{shown} Whether these are flips or honest doubt cannot be told; {where}: read the first ones."


def margins(tables: Table) -> str:
    """What the figure of the margins says about the estimate."""
    estimate = tables["estimate"]
    if not tables["margins"]["is_held_out"]:
        return ""
    if estimate["is_informative"] and not estimate["is_vague"]:
        return "P(flipped) comes from these margins."
    if tables["review"] is not None and tables["review"]["num_likely"]:
        return "P(flipped) comes from these margins, which tell the number of flips only roughly."
    return (
        "Here they do not tell how many labels are flipped: what lies below 0 may be wrong labels or honest doubt, "
        "even if it makes a hill of its own. They may rank the labels all the same; reading the lowest ones shows it."
    )


def budget(tables: Table) -> str:
    """What share of the pairs is to be filtered out, and why."""
    estimate = tables["estimate"]
    if estimate["rho"] is None:
        return ""
    of_open = " of the pairs without a review decision" if tables["counts"]["num_judged"] else ""
    what = f"the share{of_open} to filter out" if estimate["rho"] else "so nothing is filtered out"
    return f"ρ = {decimal(estimate['rho']) if estimate['rho'] else 0}, {what}{_since(estimate['rho_why'])}."


def _since(why: str) -> str:
    """The reason of a choice as a clause, if there is one."""
    return f", since {CLAUSES[why]}" if why in CLAUSES else ""


def alpha(tables: Table) -> str:
    """How the loss of training allows for wrong labels, and why so; nothing for losses that have no α."""
    loss = tables["loss"]
    if loss["alpha"] is None or not loss["has_alpha"]:
        return ""
    since = _since(loss["alpha_why"])
    would = "Training would use " if tables["task"] == "audit" else ""
    if loss["alpha"] == 0:
        is_dpo = is_whole(tables) and not loss["has_terms"]
        exactly = " With every pair kept, training is exactly DPO." if is_dpo else ""
        return f"{would}α = 0: plain DPO{since}.{exactly}"
    return f"{would}α = {loss['alpha']:.3g}, the weight of the noise-tolerant part of the loss{since}."


def beta(tables: Table) -> str:
    """The β of training and why so; nothing where it is the given one."""
    loss = tables["loss"]
    if loss["beta_why"] != Why.SAME_DISTANCE or loss["beta"] is None:
        return ""
    would = "Training would use " if tables["task"] == "audit" else ""
    times = f", {loss['beta'] / loss['given_beta']:.3g} times {loss['given_beta']:.3g}" if loss["given_beta"] else ""
    return f"{would}β = {loss['beta']:.3g}{times}{_since(loss['beta_why'])}."


def done(tables: Table) -> str:
    """What was done with the pairs, or what training would do."""
    counts, loss = tables["counts"], tables["loss"]
    pairs = counted(counts["num_pairs"], "pair")
    if tables["task"] == "audit":
        pieces = [f"keep {count(counts['keep'])} of {pairs}", f"drop {count(counts['drop'])}"]
        pieces += [f"flip {count(counts['flip'])}"] if counts["flip"] else []
        text = f"Training would {listed(pieces)}."
    else:
        pieces = [f"{count(counts['keep'])} kept", f"{count(counts['drop'] + counts['resample'])} dropped"]
        pieces += [f"{count(counts['flip'])} flipped"] if counts["flip"] else []
        pieces += [f"{count(counts['resample'])} of the dropped replaced by a new pair"] if counts["resample"] else []
        text = f"Of {pairs}, {listed(pieces)}."
    text = f"{text} {budget(tables)}".rstrip()
    if loss["noise_left"] and percent(loss["noise_left"]) != percent(0):
        text += f" About {percent(loss['noise_left'])} of the labels that are left should still be wrong."
    weight = counts["weight_kept_mean"]
    if weight is not None and weight < 0.999:
        text += f" A kept pair counts {decimal(weight)} on average."
    return text


def trust(tables: Table) -> list[str]:
    """How far the estimate can be believed: what became of labels that were flipped on purpose."""
    if tables["review"] is None:
        return [
            *_untested(tables),
            "This does not mean that the labels are right: "
            + (
                "how many are wrong cannot be told, and the margins may rank them all the same."
                if tables["contradicted"] is not None
                else "a model that has been trained on wrong labels agrees with them, too."
            ),
            "Decisions below, if any, come from the filter's budget and not from evidence about single labels.",
            *_length_rule(tables),
        ]
    return [
        *(_tested(tables["calibration"]) or _untested(tables)),
        *_width(tables["estimate"]),
        *_length_rule(tables),
        "All this assumes flips that fall at random. Errors with a pattern (one annotator, one topic, one style) can "
        "be taken for a preference, and a hard pair with a right label can look wrong: read before you delete.",
    ]


def _tested(calibration: Table | None) -> list[str]:
    if calibration is None:
        return []
    shown = percent_range(calibration["found_low"], calibration["found_high"])
    found = [
        f"We flipped each of {counted(calibration['num_turned'], 'label')} once after the margins were made, "
        f"{count(calibration['num_injected'])} at a time: {percent(calibration['share_found'])} of them (interval "
        f"{shown}) were called flipped, and {percent(calibration['share_others'])} of the others."
    ]
    recall, precision = calibration["recall"], calibration["precision"]
    if not recall:
        return [*found, f"So hardly any wrong label would be called flipped. {_CALLED}"]
    if precision is None:
        return [
            *found,
            f"So about {percent(recall)} of wrong labels would be called flipped. {_CALLED} As none seems to be wrong, "
            "nothing can be said about how many of the called ones are.",
        ]
    return [
        *found,
        f"So about {percent(recall)} of the truly wrong labels are found, and about {percent(precision)} of the called "
        f"ones are truly wrong. Both depend on the flip rate: across its interval the first is "
        f"{percent_range(*calibration['recall_range'])}, the second {percent_range(*calibration['precision_range'])}.",
    ]


def _untested(tables: Table) -> list[str]:
    """Why no labels were flipped to test the estimate."""
    estimate, counts = tables["estimate"], tables["counts"]
    if not tables["margins"]["is_held_out"]:
        return [
            "The test with labels flipped on purpose needs models that have not seen the pairs. There were none: an "
            "audit makes them (`--rho auto` with `--num_folds 5`)."
        ]
    if not estimate["is_informative"]:
        return ["We did not test the estimate with labels flipped on purpose: none is given."]
    if estimate["rate"] == 0:
        return ["We did not test the estimate with labels flipped on purpose: it says that none is flipped."]
    if counts["num_judged"]:
        return [
            "We did not test the estimate with labels flipped on purpose: those that were not reviewed are no sample "
            "of all. The audit before the review did."
        ]
    if counts["keep"] == counts["num_pairs"]:
        return ["We did not test the estimate with labels flipped on purpose: no label is called wrong."]
    return ["We did not test the estimate with labels flipped on purpose: there are too few pairs for it."]


def _length_rule(tables: Table) -> list[str]:
    """A warning where the filter may have learned nothing but which response is longer."""
    biases = tables["biases"]
    entry = next((entry for entry in biases["features"] if entry["name"] == LENGTH), None)
    if entry is None or not kept_differ(entry, least=biases["min_differing"]):
        return []
    return [
        "Kept and dropped pairs differ in length: chosen is the longer one in "
        f"{percent(entry['kept']['share'])} of the kept pairs and in {percent(entry['not_kept']['share'])} of the "
        "others. Read some of these before you trust the filter."
    ]


def _width(estimate: Table) -> list[str]:
    half_width = (estimate["high"] - estimate["low"]) / 2
    width = "narrow" if half_width <= 0.03 else "wide" if half_width > 0.06 else "moderate"
    return [f"The interval is {width}: {100 * half_width:.1f} points either way."]


def knowledge(tables: Table) -> str:
    """Whether what judges the labels knows more than the surface of the texts; nothing where it was not asked."""
    taken = next((row for row in tables["scorers"] if row["is_taken"]), None)
    if taken is None:
        return ""
    surface = [row for row in tables["scorers"] if row["is_surface"]]
    text = f"What judges the labels agrees with {percent(taken['agreement'])} of those it has not seen"
    if not surface:
        return f"{text}.{_refit(tables)}"
    best = max(surface, key=lambda row: row["agreement"])
    text += f"; the best of what sees only the surface of the texts, {best['name']}, with {percent(best['agreement'])}."
    if taken["agreement"] <= best["high"]:
        text += " So it may know no more than that, and a suspect may only go against it."
    return f"{text}{_refit(tables)}"


def _refit(tables: Table) -> str:
    judges, training = tables["refit"], tables["filter"]
    if judges is None or training is None:
        return ""
    which = "so they judge here" if judges["helps"] else "which is not enough, so models of all pairs judge here"
    enough = "enough to leave them out" if training["helps"] else "not enough to leave all of them out"
    if training["helps"] and training["rests_on_covariates"]:
        fewer = decimal(-100 * training["with_covariates"], 1)
        enough = (
            f"but with {fewer} points fewer once the lengths of the responses count: leaving them out rests on lengths "
            "being no evidence"
        )
    text = f" Models that were fitted without the pairs that others contradict agree with {_points(judges)}, {which}."
    if training == judges:  # gradients follow no labels, and were not asked
        return text
    return f"{text} To first order a training without those pairs agrees with {_points(training)}, {enough}."


def _points(found: Table) -> str:
    return f"{decimal(100 * found['gain'], 1)} points more labels (standard error {decimal(100 * found['error'], 1)})"


def readings(tables: Table) -> str:
    """The flip rate without and with what the lengths of the responses say; nothing where that is not told apart."""
    estimate, other = tables["estimate"], tables["with_length"]
    if other is None:
        return ""
    return (
        f"Pairs are judged without the lengths of their responses, which makes the flip rate {_reading(estimate)}. "
        f"Were lengths evidence, it would be {_reading(other)}; if they are, audit with `--length_is_evidence`."
    )


def _reading(estimate: Table) -> str:
    shown = percent_range(estimate["low"], estimate["high"])
    return shown if estimate["rate"] is None else f"{percent(estimate['rate'])} ({shown})"


def tokens(tables: Table) -> str:
    """How long pairs are, and how many are cut."""
    lengths = tables["token_lengths"]
    if lengths is None or lengths["max_length"] is None:
        return ""
    cut = lengths["num_truncated"]
    share = f" ({percent(cut / tables['estimate']['num_pairs'])})" if cut else ""
    told = f"{counted(cut, 'pair')}{share} {'is' if cut == 1 else 'are'} cut" if cut else "No pair is cut"
    text = f"{told} at `--max_length {lengths['max_length']:.0f}`."
    if lengths["suggested"] is not None:
        text += f" {percent(0.99)} of the pairs fit in `--max_length {lengths['suggested']:.0f}`."
    return text


def why_hard(pair: Table) -> str:
    """Why a pair is called hard and not suspect."""
    margins = ", ".join(decimal(margin, 1) for margin in pair["checks"])
    if not pair["are_moments"]:
        why = (
            "linear models on some features agree with the label, and on others they contradict it"
            if min(pair["checks"]) < 0
            else "linear models on all features agree with the label, only less clearly than with others"
        )
        return f"Not a suspect: {why} (held-out margins {margins} nats)."
    if pair["is_learned_late"]:
        why = "contradicted the label at first, but learned to agree with it"
    elif min(pair["checks"]) < 0:
        why = "is of two minds: it agreed with the label at one check of its training and not at another"
    else:
        why = "agreed with the label at every check of its training, only less clearly than with others"
    return f"Not a suspect: the model that judges this pair {why} (held-out margins {margins} nats)."
