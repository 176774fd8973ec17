"""Numbers of the report -> what they mean and what to do, in plain sentences.

In: the dict of `tables.build_tables`. Out: strings, with commands and options between backticks.

The one idea: each piece of advice is a rule, a small function that looks at the numbers and either says something or
keeps silent. Add a piece of advice: one function, its name in `ADVICE`, one test row.
"""

from collections.abc import Callable, Mapping
from typing import Any

NB_SPACE = "\N{NO-BREAK SPACE}"

Table = Mapping[str, Any]


def percent(share: float | None) -> str:
    """A share as people say it: whole percents, with one decimal below ten.

    Examples:
        >>> percent(0.294).replace(NB_SPACE, " "), percent(0.032).replace(NB_SPACE, " "), percent(None)
        ('29 %', '3.2 %', '–')
    """
    return "–" if share is None else f"{_percent_number(share)}{NB_SPACE}%"


def percent_range(low: float | None, high: float | None) -> str:
    """An interval of shares.

    Examples:
        >>> percent_range(0.257, 0.318).replace(NB_SPACE, " ")
        '26–32 %'
    """
    if low is None or high is None:
        return "–"
    return f"{_percent_number(low)}–{_percent_number(high)}{NB_SPACE}%"


def _percent_number(share: float) -> str:
    if 0.0995 <= share <= 0.9005 or share in (0, 1):
        return f"{100 * share:.0f}"
    return f"{100 * share:.1f}".removesuffix(".0")


def count(value: float | None) -> str:
    """A number of things, rounded, thousands set apart.

    Examples:
        >>> count(100000)
        '100,000'
    """
    return "–" if value is None else f"{value:,.0f}"


def counted(value: float, noun: str) -> str:
    """A number with its noun, which takes an s unless there is one.

    Examples:
        >>> [counted(number, "pair").replace(NB_SPACE, " ") for number in (1, 1200)]
        ['1 pair', '1,200 pairs']
    """
    return f"{count(value)}{NB_SPACE}{noun}" + ("" if round(value) == 1 else "s")


def decimal(value: float | None, places: int = 2) -> str:
    """A number with a fixed number of decimals and a true minus sign.

    Examples:
        >>> decimal(-1.5)
        '−1.50'
    """
    # z writes what rounds to −0.00 as 0.00
    return "–" if value is None else f"{value:z.{places}f}".replace("-", "−")


def probability(value: float | None) -> str:
    """A probability with two decimals that never reads as certainty.

    Examples:
        >>> probability(0.999), probability(0.25)
        ('>0.99', '0.25')
    """
    if value is None:
        return "–"
    return "<0.01" if value < 0.005 else ">0.99" if value > 0.995 else f"{value:.2f}"


def write_sentences(tables: Table) -> dict[str, Any]:
    """All prose of the report that depends on numbers."""
    return {
        "title": title(tables),
        "interval": interval(tables),
        "look": look(tables),
        "budget": budget(tables),
        "done": done(tables),
        "trust": trust(tables),
        "next": [advice for rule in ADVICE if (advice := rule(tables))],
    }


def title(tables: Table) -> str:
    """The one sentence that a reader takes away."""
    estimate = tables["estimate"]
    if not estimate["is_informative"]:
        return "The margins carry too little signal to tell how many labels are flipped"
    if _may_be_clean(estimate):
        return f"The labels may well be clean: {percent(estimate['high'])} flipped at most"
    return f"About {percent(estimate['rate'])} of the labels look flipped"


def interval(tables: Table) -> str:
    """How sure that is, or why nothing can be said."""
    estimate = tables["estimate"]
    if not estimate["is_informative"]:
        reason = estimate["reason"] or "The estimate gave no reason."
        return f"{reason[:1].upper()}{reason[1:]}" + ("" if reason.endswith(".") else ".")
    shown = percent_range(estimate["low"], estimate["high"])
    best = f"; best guess {percent(estimate['rate'])}" if _may_be_clean(estimate) else ""
    return f"{percent(estimate['level'])} interval {shown}{best}, from {counted(estimate['num_pairs'], 'pair')}."


def look(tables: Table) -> str:
    """How many pairs a person should read."""
    review = tables["review"]
    if review is None:
        return "No pair can be called suspect on this evidence, so there is no list to read."
    if not review["num_likely"]:
        return "No pair is more likely flipped than right, so none needs to be read."
    return (
        "Read these first: each is more likely flipped than right. About "
        f"{count(review['found_likely'])} should be wrong, out of {counted(review['found_all'], 'flip')} expected."
    )


def budget(tables: Table) -> str:
    """What share of the pairs was to be filtered out, and who said so."""
    estimate = tables["estimate"]
    if estimate["rho"] is None:
        return ""
    source = "follows the estimate" if estimate["is_rho_auto"] else "was set by `--rho`"
    return f"ρ = {decimal(estimate['rho'])}, the share to filter out, {source}."


def done(tables: Table) -> str:
    """What was done with the pairs."""
    counts = tables["counts"]
    pieces = [f"{count(counts['keep'])} kept", f"{count(counts['drop'])} dropped"]
    pieces += [f"{count(counts['flip'])} flipped"] if counts["flip"] else []
    pieces += [f"{count(counts['resample'])} dropped and won back by a new pair"] if counts["resample"] else []
    text = f"Of {counted(counts['num_pairs'], 'pair')}, {_join(pieces)}. {budget(tables)}".rstrip()
    weight = counts["weight_kept_mean"]
    if weight is not None and weight < 0.999:
        text += f" A kept pair counts {decimal(weight)} on average, less the more suspect it is."
    return text


def trust(tables: Table) -> list[str]:
    """How far the estimate can be believed, as far as its own numbers tell."""
    estimate, review = tables["estimate"], tables["review"]
    if review is None:
        return [
            "This does not mean that the labels are right: right and wrong ones look the same to this model.",
            "Decisions below, if any, come from the filter's budget and not from evidence about single labels.",
        ]
    half_width = (estimate["high"] - estimate["low"]) / 2
    width = "narrow" if half_width <= 0.03 else "wide" if half_width > 0.06 else "moderate"
    found = [f"The interval is {width}: {100 * half_width:.1f} points either way."]
    if review["num_likely"]:
        wrong = 1 - review["found_likely"] / review["num_likely"]
        found.append(
            f"For {percent(review['share_clear'])} of the pairs the verdict is clear (P(flipped) below 0.1 or above "
            f"0.9); of the suspects above 0.5, about {percent(wrong)} should turn out right after all."
        )
    found.append(
        "All this assumes flips that fall at random. Errors with a pattern (one annotator, one topic, one style) can "
        "be taken for a preference, and a hard pair with a right label can look wrong: read before you delete."
    )
    return found


def _may_be_clean(estimate: Table) -> bool:
    return bool(estimate["low"] < 0.005)


def _join(pieces: list[str]) -> str:
    return pieces[0] if len(pieces) == 1 else f"{', '.join(pieces[:-1])} and {pieces[-1]}"


def _advise_signal(tables: Table) -> str | None:
    if tables["estimate"]["is_informative"]:
        return None
    return (
        "Keep all pairs (`--rho 0`) until there is a signal. What brings one: more pairs, a stronger or longer trained "
        "model, or responses that differ more."
    )


def _advise_clean(tables: Table) -> str | None:
    estimate = tables["estimate"]
    if not estimate["is_informative"] or not _may_be_clean(estimate):
        return None
    return "The interval reaches 0: plain training (`--loss dpo --rho 0`) is a fair choice."


def _advise_review(tables: Table) -> str | None:
    review = tables["review"]
    if review is None or not review["num_likely"]:
        return None
    first = min(20, review["num_likely"])
    return (
        f"Read the first {first} suspects. If fewer than half are wrong, the estimate is too high for this data: "
        "filter less with a smaller `--rho`. If nearly all are, correct the labels at the source and train again."
    )


def _advise_rho(tables: Table) -> str | None:
    estimate = tables["estimate"]
    rho, shown = estimate["rho"], percent_range(estimate["low"], estimate["high"])
    if not estimate["is_informative"] or rho is None:
        return None
    if rho > estimate["high"] + 0.005:
        return (
            f"ρ = {decimal(rho)} filters out more than the interval allows ({shown}): right pairs are being lost. "
            "`--rho auto` follows the estimate."
        )
    if rho < estimate["low"] - 0.005:
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


def _advise_rounds(tables: Table) -> str | None:
    known = [entry for entry in tables["rounds"] if None not in (entry["rate"], entry["low"], entry["high"])]
    if len(known) < 2 or known[-2]["low"] <= known[-1]["rate"] <= known[-2]["high"]:
        return None
    return (
        f"The estimate still moved in the last round, from {percent(known[-2]['rate'])} to "
        f"{percent(known[-1]['rate'])}: add a round (`--rounds`) and see whether it settles."
    )


def _advise_problems(tables: Table) -> str | None:
    lost = [problem for problem in tables["problems"] if problem["severity"] in ("error", "left_out")]
    if not lost:
        return None
    total = sum(problem["count"] for problem in lost)
    kinds = _join([problem["kind"].replace("_", " ") for problem in lost[:3]])
    return f"{counted(total, 'row')} did not reach training ({kinds}): the table of problems says how to mend them."


def _advise_length(tables: Table) -> str | None:
    groups = {entry["group"]: entry for entry in tables["lengths"]}
    kept, dropped = groups.get("kept"), groups.get("dropped")
    if kept and dropped and (kept["low"] > dropped["high"] or kept["high"] < dropped["low"]):
        return (
            f"Chosen is the longer response in {percent(kept['share_chosen_longer'])} of the kept pairs and in "
            f"{percent(dropped['share_chosen_longer'])} of the dropped ones. If length is a virtue here, that is as it "
            "should be; if not, the filter has learned length: look at the dropped pairs."
        )
    if kept and kept["low"] > 0.6:
        return (
            f"In {percent(kept['share_chosen_longer'])} of the kept pairs the longer response is the chosen one: the "
            "model will learn to write at length. Compare with a loss that counts per token (`--loss simpo`)."
        )
    return None


ADVICE: tuple[Callable[[Table], str | None], ...] = (
    _advise_problems,
    _advise_signal,
    _advise_clean,
    _advise_review,
    _advise_rho,
    _advise_width,
    _advise_rounds,
    _advise_information,
    _advise_length,
)
