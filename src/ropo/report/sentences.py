"""Numbers of the report -> what they mean and what to do, in plain sentences.

In: the dict of `tables.build_tables`. Out: strings, with commands and options between backticks.

The one idea: each piece of advice is a rule, a small function that looks at the numbers and either says something or
keeps silent. Add a piece of advice: one function, its name in `ADVICE`, one test row.
"""

from collections.abc import Callable, Mapping
from typing import Any

NB_SPACE = "\N{NO-BREAK SPACE}"

SHOWN_NAME_CHARACTERS = 40
ALPHA_LOSSES = ("ropo", "dpo", "")  # the losses that α tells apart; an unknown one is ropo's default

WIDE_RANGE = 0.1  # an interval from 0 to beyond this says nothing about cleanness

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


def shown_name(name: str) -> str:
    """A name from the data, fit for a sentence: in quotes, on one line, never set as a command.

    Examples:
        >>> shown_name("Ada `Lovelace`")
        "“Ada 'Lovelace'”"
    """
    line = " ".join(name.split()).replace("`", "'")
    return f"“{line if len(line) <= SHOWN_NAME_CHARACTERS else line[:SHOWN_NAME_CHARACTERS] + '…'}”"


def write_sentences(tables: Table) -> dict[str, Any]:
    """All prose of the report that depends on numbers."""
    return {
        "title": title(tables),
        "interval": interval(tables),
        "look": look(tables),
        "budget": budget(tables),
        "alpha": alpha(tables),
        "done": done(tables),
        "trust": trust(tables),
        "tokens": tokens(tables),
        "hard": [why_hard(pair) for pair in tables["hard"]],
        "next": [advice for rule in ADVICE if (advice := rule(tables))],
    }


def title(tables: Table) -> str:
    """The one sentence that a reader takes away."""
    estimate = tables["estimate"]
    if not estimate["is_informative"]:
        return "The margins carry too little signal to tell how many labels are flipped"
    if _may_be_clean(estimate):
        if estimate["high"] > WIDE_RANGE:
            return f"Anything from none to {percent(estimate['high'])} of the labels may be flipped"
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
    if estimate["is_raised"]:
        found = f"Two readings, {shown}, from {counted(estimate['num_pairs'], 'pair')}:"
        if tables["trial"] is not None:
            return (
                f"{found} one judge alone cannot tell whether labels are wrong. But {_tried(tables['trial'])} So it "
                "helps to leave them out, and the reading of both judges is acted on."
            )
        return (
            f"{found} flips that fall at random explain only the lower part, but two judges of different training "
            "contradict the same labels far more often. So the errors do not fall at random, and the higher reading is "
            "acted on."
        )
    return f"{percent(estimate['level'])} interval {shown}{best}, from {counted(estimate['num_pairs'], 'pair')}."


def look(tables: Table) -> str:
    """How many pairs a person should read."""
    review, num_judged = tables["review"], tables["counts"]["num_judged"]
    known = f" {counted(num_judged, 'pair')} with a verdict of a person are not counted." if num_judged else ""
    if review is None:
        return f"No pair can be called suspect on this evidence, so there is no list to read.{known}"
    if not review["num_likely"]:
        return f"No pair is more likely flipped than right, so none needs to be read.{known}"
    expected = counted(review["found_all"], "flip")
    return (
        "Read these first: each is more likely flipped than right. About "
        f"{count(review['found_likely'])} should be wrong, out of {expected} expected.{known}"
    )


def budget(tables: Table) -> str:
    """What share of the pairs is to be filtered out, and why."""
    estimate = tables["estimate"]
    if estimate["rho"] is None:
        return ""
    # What stands behind a colon is the evidence, which the first lines of the report tell already.
    reason = estimate["rho_reason"].split(":")[0].strip()
    if not reason:
        reason = "it follows the estimate" if estimate["is_rho_auto"] else "it was set by `--rho`"
    what = "the share to filter out" if estimate["rho"] else "so nothing is filtered out"
    text = f"ρ = {decimal(estimate['rho']) if estimate['rho'] else 0}, {what}, since {reason}."
    trial = tables["trial"]
    if trial is not None and not trial["helps"]:
        tried = _tried(trial)
        text += f" More was tried: {tried} That is no sure gain, so they stay."
    return text


def _tried(trial: Table) -> str:
    return (
        f"models trained without the {percent(trial['left_out'])} that the first judges contradict agree with "
        f"{100 * trial['without']:.1f}{NB_SPACE}% of the labels they have not seen, models trained on all pairs with "
        f"{100 * trial['with_all']:.1f}{NB_SPACE}%."
    )


def alpha(tables: Table) -> str:
    """How the loss of training allows for wrong labels, and why so; nothing for losses that have no α."""
    loss = tables["loss"]
    if loss["alpha"] is None or loss["name"] not in ALPHA_LOSSES:
        return ""
    since = f", since {loss['alpha_reason']}" if loss["alpha_reason"] else ""
    would = "Training would use " if tables["task"] == "audit" else ""
    if loss["alpha"] == 0:
        counts = tables["counts"]
        exactly = " With every pair kept, training is exactly DPO." if counts["keep"] == counts["num_pairs"] else ""
        return f"{would}α = 0: plain DPO{since}.{exactly}"
    return f"{would}α = {loss['alpha']:.3g}, the weight of the noise-tolerant part of the loss{since}."


def done(tables: Table) -> str:
    """What was done with the pairs, or what training would do."""
    counts, loss = tables["counts"], tables["loss"]
    pairs = counted(counts["num_pairs"], "pair")
    if tables["task"] == "audit":
        pieces = [f"keep {count(counts['keep'])} of {pairs}", f"drop {count(counts['drop'])}"]
        pieces += [f"flip {count(counts['flip'])}"] if counts["flip"] else []
        text = f"Training would {_join(pieces)}."
    else:
        pieces = [f"{count(counts['keep'])} kept", f"{count(counts['drop'])} dropped"]
        pieces += [f"{count(counts['flip'])} flipped"] if counts["flip"] else []
        pieces += [f"{count(counts['resample'])} dropped and won back by a new pair"] if counts["resample"] else []
        text = f"Of {pairs}, {_join(pieces)}."
    text = f"{text} {budget(tables)}".rstrip()
    if loss["noise_left"] and loss["alpha_reason"] in ("", "it was given"):  # else the reason says it already
        text += f" About {percent(loss['noise_left'])} of the labels that are left should still be wrong."
    weight = counts["weight_kept_mean"]
    if weight is not None and weight < 0.999:
        text += f" A kept pair counts {decimal(weight)} on average."
    return text


def trust(tables: Table) -> list[str]:
    """How far the estimate can be believed: what became of labels that were turned round on purpose."""
    if tables["review"] is None:
        return [
            *_untested(tables),
            "This does not mean that the labels are right: right and wrong ones look the same to this model.",
            "Decisions below, if any, come from the filter's budget and not from evidence about single labels.",
        ]
    return [
        *(_tested(tables["calibration"]) or _untested(tables)),
        *_width(tables["estimate"]),
        ("" if tables["estimate"]["is_raised"] else "All this assumes flips that fall at random. ")
        + "Errors with a pattern (one annotator, one topic, one style) can be taken for a preference, and a hard pair "
        "with a right label can look wrong: read before you delete.",
    ]


def _tested(calibration: Table | None) -> list[str]:
    if calibration is None:
        return []
    shown = percent_range(calibration["found_low"], calibration["found_high"])
    found = [
        f"We turned each of {counted(calibration['num_turned'], 'label')} round once after training, "
        f"{count(calibration['num_injected'])} at a time: {percent(calibration['share_found'])} of them (interval "
        f"{shown}) were called flipped, and {percent(calibration['share_others'])} of the others."
    ]
    recall, precision = calibration["recall"], calibration["precision"]
    if not recall:
        return [*found, "So hardly any wrong label is found: none stands out from the others."]
    if precision is None:
        return [
            *found,
            f"So about {percent(recall)} of wrong labels would be found. As none seems to be wrong, nothing can be "
            "said about how many of the called ones are.",
        ]
    return [
        *found,
        f"So about {percent(recall)} of the truly wrong labels are found, and about {percent(precision)} of the called "
        f"ones are truly wrong. Both hang on the flip rate: across its interval the first is "
        f"{percent_range(*calibration['recall_range'])}, the second {percent_range(*calibration['precision_range'])}.",
    ]


def _untested(tables: Table) -> list[str]:
    """Why no labels were turned round to test the estimate."""
    estimate = tables["estimate"]
    if not tables["margins"]["is_held_out"]:
        return [
            "The test with labels turned round on purpose needs models that have not seen the pairs. There were none: "
            "`--num_folds 5` trains them."
        ]
    if not estimate["is_informative"]:
        return [
            "We did not test the estimate with labels turned round on purpose: with so little signal there is none "
            "to test."
        ]
    if estimate["is_raised"]:
        why = (
            "those would fall at random, and these errors do not."
            if tables["trial"] is None
            else "that takes a rate that one judge can tell."
        )
        return [
            f"We did not test the estimate with labels turned round on purpose: {why} That two judges contradict a "
            "label is evidence only as far as they do not err alike: with few pairs or on hard text they do, and the "
            "higher reading is then too high."
        ]
    if estimate["rate"] == 0:
        return ["We did not test the estimate with labels turned round on purpose: it says that none is flipped."]
    return ["We did not test the estimate with labels turned round on purpose: there are too few pairs for it."]


def _width(estimate: Table) -> list[str]:
    if estimate["is_raised"]:
        return []
    half_width = (estimate["high"] - estimate["low"]) / 2
    width = "narrow" if half_width <= 0.03 else "wide" if half_width > 0.06 else "moderate"
    return [f"The interval is {width}: {100 * half_width:.1f} points either way."]


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
    if pair["is_learned_late"]:
        why = "contradicted the label at first, but learned to agree with it"
    elif min(pair["checks"]) < 0:
        why = "is of two minds: it agreed with the label at one check of its training and not at another"
    else:
        why = "agreed with the label at every check of its training, only less clearly than with others"
    return f"Not a suspect: the model that judges this pair {why} (held-out margins {margins} nats)."


def _may_be_clean(estimate: Table) -> bool:
    return bool(estimate["low"] < 0.005 and not estimate["is_raised"])


def _join(pieces: list[str]) -> str:
    return pieces[0] if len(pieces) == 1 else f"{', '.join(pieces[:-1])} and {pieces[-1]}"


def _advise_signal(tables: Table) -> str | None:
    estimate = tables["estimate"]
    if estimate["is_informative"]:
        return None
    pieces = [] if estimate["rho"] == 0 else ["Keep all pairs (`--rho 0`) until there is a signal."]
    if tables["margins"]["is_held_out"]:
        pieces.append(
            "What brings a signal: more pairs, longer training of the models that judge (`--num_train_epochs`, "
            "`--learning_rate`), or a larger model."
        )
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
    if not estimate["is_informative"] or not _may_be_clean(estimate):
        return None
    if estimate["rho"] == 0 and loss["alpha"] == 0 and loss["name"] in ALPHA_LOSSES:
        return "The interval reaches 0, so nothing has to be done about the labels: training is exactly DPO."
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


def _advise_verdicts(tables: Table) -> str | None:
    review = tables["review"]
    if tables["task"] != "audit" or review is None or not review["num_likely"]:
        return None
    return (
        "Open `review.csv`, which has the most suspect pair first, and fill in the column `verdict`: right, wrong or "
        "drop. Then `ropo train --decisions review.csv` obeys you."
    )


def _advise_cleaned(tables: Table) -> str | None:
    counts = tables["counts"]
    if tables["task"] != "audit":
        return None
    if counts["keep"] == counts["num_pairs"]:
        return "`ropo train` on the data as it is does the same as on `cleaned.jsonl`: every pair is kept."
    turned = ", with the flipped ones turned round" if counts["flip"] else ""
    return (
        f"Or train on `cleaned.jsonl`, with any trainer: it holds the "
        f"{counted(counts['keep'] + counts['flip'], 'pair')} to train on{turned}."
    )


def _advise_trusted(tables: Table) -> str | None:
    estimate = tables["estimate"]
    is_sharp = estimate["is_informative"] and estimate["high"] - estimate["low"] <= 0.06
    if estimate["num_trusted"] != 0 or is_sharp:
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
    names = _join([shown_name(entry["name"]) for entry in opposite[:5]])
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
    rows = _join([f"{count(entry['first_row'])} to {count(entry['last_row'])}" for entry in high[:3]])
    worst = max(high, key=lambda entry: entry["p_flip_mean"])
    return (
        f"Look at rows {rows} as a batch: their mean P(flipped) is up to {probability(worst['p_flip_mean'])}, against "
        f"{probability(worst['p_flip_others'])} in the rest of the file. Was this part labelled in another way?"
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


def _advise_problems(tables: Table) -> str | None:
    lost = [problem for problem in tables["problems"] if problem["severity"] in ("error", "left_out")]
    if not lost:
        return None
    total = sum(problem["count"] for problem in lost)
    kinds = _join([problem["kind"].replace("_", " ") for problem in lost[:3]])
    return f"{counted(total, 'row')} did not reach training ({kinds}): the table of problems says how to mend them."


def _advise_biases(tables: Table) -> str | None:
    """Say what the labels prefer, the strongest first."""
    clear = [entry for entry in tables["biases"]["features"] if entry["is_clear"]]
    if not clear:
        return None
    clear = sorted(clear, key=lambda entry: -abs(entry["all"]["share"] - 0.5))[:3]
    told = _join([f"{_direction(entry)} ({percent(_one_way(entry['all']['share']))})" for entry in clear])
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
    smallest = tables["biases"]["min_differing"]
    found = []
    for entry in tables["biases"]["features"]:
        kept, rest = entry["kept"], entry["not_kept"]
        is_known = min(kept["num_pairs"], rest["num_pairs"]) >= smallest
        if is_known and (kept["low"] > rest["high"] or kept["high"] < rest["low"]):
            found.append(entry)
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


ADVICE: tuple[Callable[[Table], str | None], ...] = (
    _advise_problems,
    _advise_folds,
    _advise_signal,
    _advise_clean,
    _advise_opposite,
    _advise_annotators,
    _advise_parts,
    _advise_review,
    _advise_verdicts,
    _advise_cleaned,
    _advise_trusted,
    _advise_rho,
    _advise_width,
    _advise_information,
    _advise_tokens,
    _advise_biases,
    _advise_filter,
)
