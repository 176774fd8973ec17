"""Numbers of the report -> what to do next.

In: the dict of `tables.build_tables`. Out: sentences, with commands and options between backticks.

The one idea: each piece of advice is a rule, a small function that looks at the numbers and either says something or
keeps silent. Add a piece of advice: one function, one line in `ADVICE`, one case of the golden report.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ropo.audit.weights import Why
from ropo.report.biases import kept_differ
from ropo.report.wording import count, counted, decimal, listed, percent, percent_range, probability, shown_name

SMALL_RATE = 0.03  # an interval that ends below this leaves little to read for
MANY = 0.1  # share of contradicted labels from which it matters what they are
FEW = 20  # pairs that show what the others are

Table = Mapping[str, Any]


def is_open(tables: Table) -> bool:
    """Whether labels are contradicted of which P(flipped) calls none, and may be flips all the same."""
    contradicted, estimate, review = tables["contradicted"], tables["estimate"], tables["review"]
    if contradicted is None or not contradicted["num"] or (review is not None and review["num_likely"]):
        return False
    return not estimate["is_informative"] or estimate["high"] > SMALL_RATE


def is_whole(tables: Table) -> bool:
    """Whether every pair is kept with its full weight."""
    counts = tables["counts"]
    return bool(counts["keep"] == counts["num_pairs"] and counts["weight_kept_mean"] == 1.0)


def num_open_flips(tables: Table, rate: float) -> float:
    """How many labels without a review decision a flip rate of all makes wrong; reviews find the wrong ones first."""
    counts = tables["counts"]
    return float(max(rate * (counts["num_pairs"] - counts["num_left_out"]) - counts["num_judged_wrong"], 0.0))


def _advise_trusted_first(tables: Table) -> str | None:
    contradicted, estimate = tables["contradicted"], tables["estimate"]
    if not is_open(tables) or not estimate["is_vague"]:
        return None
    if contradicted["share"] < MANY or estimate["num_trusted"] != 0:
        return None
    return (
        "Make a file of 50 to 200 further pairs whose labels you know to be right, and audit again with `--trusted` "
        f"and that file: models that have not seen them contradict {percent(contradicted['share'])} of the labels, and "
        "how often they contradict right ones tells flips from honest doubt."
    )


def _advise_signal(tables: Table) -> str | None:
    estimate = tables["estimate"]
    if estimate["is_informative"]:
        return None
    is_kept = estimate["rho"] == 0 or estimate["rho_why"] == Why.FILTER_HELPS
    pieces = [] if is_kept else ["Keep all pairs (`--rho 0`) until there is a signal."]
    if tables["margins"]["is_held_out"]:
        is_trained = any(row["name"] == "models" and row["is_taken"] for row in tables["scorers"])
        training = "longer training of the fold models (`--num_train_epochs`, `--learning_rate`), "
        pieces.append(f"What brings a signal: more pairs, {training if is_trained else ''}or a larger model.")
    return " ".join(pieces) or None


def _advise_folds(tables: Table) -> str | None:
    if tables["margins"]["is_held_out"]:
        return None
    return (
        "These margins come from a model that was trained on the pairs. They can show which pairs it finds hard, but "
        "not how many labels are wrong. `--num_folds 5`, or `ropo audit`, asks models that have not seen the pairs."
    )


def _advise_clean(tables: Table) -> str | None:
    estimate, loss = tables["estimate"], tables["loss"]
    if not estimate["is_informative"] or not estimate["may_be_clean"]:
        return None
    if estimate["rho"] == 0 and loss["alpha"] == 0 and loss["has_alpha"] and not loss["has_terms"]:
        if estimate["high"] > SMALL_RATE:
            return "The interval reaches 0, so nothing is filtered out: training is exactly DPO."
        return "The interval reaches 0, so nothing has to be done about the labels: training is exactly DPO."
    return "The interval reaches 0: plain training (`--loss dpo --rho 0`) is a fair choice."


def _advise_reading(tables: Table) -> str | None:
    if not is_open(tables):
        return None
    first = min(FEW, tables["contradicted"]["num"])
    where = "`review.csv`" if tables["task"] == "audit" else "the ledger by `held_out_margin`, the smallest first"
    return (
        f"Read the first {first} of {where}. If most are wrong, these are flips: read on, and give the share of the "
        "pairs till where most are wrong as `--rho`. If most are right, it is honest doubt: keep them."
    )


def _advise_review(tables: Table) -> str | None:
    review = tables["review"]
    if review is None or not review["num_likely"]:
        return None
    first = min(FEW, review["num_likely"])
    return (
        f"Read the first {first} suspects. If fewer than half are wrong, the estimate is too high for this data: "
        "filter less with a smaller `--rho`. If nearly all are, correct the labels at the source and train again."
    )


def _advise_verdicts(tables: Table) -> str | None:
    review = tables["review"]
    is_likely = review is not None and bool(review["num_likely"])
    if tables["task"] != "audit" or not (is_likely or is_open(tables)):
        return None
    return (
        "Open `review.csv`, which has the most suspect pair first, and fill in the column `verdict`: right, wrong or "
        "drop. Then `ropo train --decisions review.csv` obeys you, and with `--audit_from` and this folder it needs no "
        "other audit."
    )


def _advise_cleaned(tables: Table) -> str | None:
    counts = tables["counts"]
    if tables["task"] != "audit":
        return None
    if is_whole(tables):
        return "`ropo train` on the data as it is does the same as on `cleaned.jsonl`: every pair is kept."
    turned = ", with the flipped ones swapped" if counts["flip"] else ""
    return (
        f"Or train on `cleaned.jsonl`, with any trainer: it holds the "
        f"{counted(counts['keep'] + counts['flip'], 'pair')} to train on{turned}."
    )


def _advise_trusted(tables: Table) -> str | None:
    estimate = tables["estimate"]
    is_sharp = estimate["is_informative"] and estimate["high"] - estimate["low"] <= 0.06
    if estimate["num_trusted"] != 0 or is_sharp or _advise_trusted_first(tables):
        return None
    return "50 to 200 further pairs whose labels you know to be right (`--trusted`) sharpen the estimate."


def _advise_annotators(tables: Table) -> str | None:
    worse = [entry for entry in tables["annotators"]["rows"] if entry["is_worse"] and not entry["is_opposite"]]
    if not worse:
        return None
    told = [
        f"{shown_name(entry['name'])} ({percent_range(entry['low'], entry['high'])} of "
        f"{counted(entry['num_pairs'], 'label')})"
        for entry in worse[:3]
    ]
    overall = percent_range(tables["estimate"]["low"], tables["estimate"]["high"])
    more = f" and {count(len(worse) - 3)} more" if len(worse) > 3 else ""
    return f"Look at the labels of {', '.join(told)}{more} first: more of them look flipped than overall ({overall})."


def _advise_opposite(tables: Table) -> str | None:
    opposite = [entry for entry in tables["annotators"]["rows"] if entry["is_opposite"]]
    if not opposite:
        return None
    names = listed([shown_name(entry["name"]) for entry in opposite[:5]])
    if all(entry["low"] is not None and entry["low"] > 0.5 for entry in opposite):
        return (
            f"More than half of the labels of {names} look flipped: they mean the opposite. Perhaps chosen and "
            "rejected were swapped there. Ask, then swap them in the data or leave them out."
        )
    return (
        f"Half of the labels of {names}, or more, look flipped: they say nothing, or the opposite. Ask how they were "
        "made, and leave them out till you know."
    )


def _advise_parts(tables: Table) -> str | None:
    high = [entry for entry in tables["file_parts"] if entry["is_high"]]
    if not high:
        return None
    rows = listed([f"{count(entry['first_row'])} to {count(entry['last_row'])}" for entry in high[:3]])
    worst = max(high, key=lambda entry: entry["p_flip_mean"])
    return (
        f"Look at rows {rows} as a batch: their mean P(flipped) is up to {probability(worst['p_flip_mean'])}, against "
        f"{probability(worst['p_flip_others'])} in the rest of the file. Was this part labelled in another way?"
    )


def _advise_rho(tables: Table) -> str | None:
    estimate, rho = tables["estimate"], tables["estimate"]["rho"]
    if not estimate["is_informative"] or rho is None or estimate["rho_why"] != Why.GIVEN:
        return None
    num_open = max(tables["counts"]["num_pairs"] - tables["counts"]["num_judged"], 1)
    low, high = (num_open_flips(tables, estimate[end]) / num_open for end in ("low", "high"))
    shown = percent_range(low, high)
    if rho > high + 0.005:
        return (
            f"ρ = {decimal(rho)} filters out more than the interval allows ({shown}): right pairs are being lost. "
            "`--rho auto` follows the estimate."
        )
    if rho < low - 0.005:
        return (
            f"ρ = {decimal(rho)} filters out less than the interval suggests ({shown}): wrong pairs stay in. "
            "`--rho auto` follows the estimate."
        )
    return None


def _advise_information(tables: Table) -> str | None:
    estimate = tables["estimate"]
    if not estimate["is_informative"] or estimate["rate"] < 0.25:
        return None
    # A label that is flipped at rate η carries about (1 − 2η)² of the information of a clean one.
    worth = (1 - 2 * estimate["rate"]) ** 2
    return (
        f"If the flips are random, {counted(estimate['num_pairs'], 'label')} teach about as much as "
        f"{count(worth * estimate['num_pairs'])} clean ones. A label that a person has checked counts in full again."
    )


def _advise_width(tables: Table) -> str | None:
    estimate = tables["estimate"]
    if not estimate["is_informative"] or estimate["high"] - estimate["low"] <= 0.12:
        return None
    return "The interval is wide. About four times as many pairs would halve it; till then treat the rate as a range."


def _advise_problems(tables: Table) -> str | None:
    lost = [problem for problem in tables["problems"] if problem["severity"] in ("error", "left_out")]
    if not lost:
        return None
    total = tables["num_left_out"] or sum(problem["count"] for problem in lost)
    kinds = listed([problem["kind"].replace("_", " ") for problem in lost[:3]])
    return f"{counted(total, 'row')} did not reach training ({kinds}): the table of problems says how to mend them."


def _advise_biases(tables: Table) -> str | None:
    """Say what the labels prefer, the strongest first."""
    clear = [entry for entry in tables["biases"]["features"] if entry["is_clear"]]
    if not clear:
        return None
    clear = sorted(clear, key=lambda entry: -abs(entry["all"]["share"] - 0.5))[:3]
    told = listed([f"{_direction(entry)} ({percent(_one_way(entry['all']['share']))})" for entry in clear])
    return (
        f"Where the two responses differ, the chosen one more often has {told}. A model will learn that too. If it is "
        "not what makes a response better here, look at these pairs. Balance them, or use a loss that counts per token "
        "(`--loss simpo`) where it is length."
    )


def _direction(entry: Table) -> str:
    return f"{'more' if entry['all']['share'] > 0.5 else 'less'} of “{entry['name']}”"


def _one_way(share: float) -> float:
    return max(share, 1 - share)


def _advise_filter(tables: Table) -> str | None:
    """Say where the filter itself may have learned a feature."""
    biases = tables["biases"]
    found = [entry for entry in biases["features"] if kept_differ(entry, least=biases["min_differing"])]
    if not found:
        return None
    widest = max(found, key=lambda entry: abs(entry["kept"]["share"] - entry["not_kept"]["share"]))
    return (
        f"Of the pairs that differ in “{widest['name']}”, chosen has more of it in {percent(widest['kept']['share'])} "
        f"of the kept ones and in {percent(widest['not_kept']['share'])} of the others. If that is a virtue here, it "
        "is as it should be; if not, the filter has learned it: look at the pairs that were not kept."
    )


def _advise_tokens(tables: Table) -> str | None:
    lengths = tables["token_lengths"]
    if lengths is None or None in (lengths["num_truncated"], lengths["suggested"], lengths["max_length"]):
        return None
    suggested = f"`--max_length {lengths['suggested']:.0f}`"
    if lengths["num_truncated"] > 0.01 * tables["estimate"]["num_pairs"]:
        cut = counted(lengths["num_truncated"], "pair")
        return f"{cut} lose their end: {suggested} lets {percent(0.99)} of the pairs fit."
    return None


ADVICE: Mapping[str, Callable[[Table], str | None]] = {
    "trusted_first": _advise_trusted_first,
    "problems": _advise_problems,
    "folds": _advise_folds,
    "signal": _advise_signal,
    "clean": _advise_clean,
    "opposite": _advise_opposite,
    "annotators": _advise_annotators,
    "parts": _advise_parts,
    "reading": _advise_reading,
    "review": _advise_review,
    "verdicts": _advise_verdicts,
    "cleaned": _advise_cleaned,
    "trusted": _advise_trusted,
    "rho": _advise_rho,
    "width": _advise_width,
    "information": _advise_information,
    "tokens": _advise_tokens,
    "biases": _advise_biases,
    "filter": _advise_filter,
}
"""Rules by name, in the order in which a reader needs them."""


def advice(tables: Table) -> dict[str, str]:
    """What to do next.

    Returns:
        Sentences by the name of the rule in `ADVICE`, those of rules that apply.
    """
    return {name: text for name, rule in ADVICE.items() if (text := rule(tables))}
