"""What a command says when it is done: the only file of the command line that reads results.

In: the result of a run, and its folder. Out: lines on the standard output.
"""

from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState

from ropo.data.problems import printable
from ropo.evaluate.answers import Exported
from ropo.evaluate.measures import Mean
from ropo.evaluate.options import ExportArguments
from ropo.evaluate.win_rate import WinRate
from ropo.noise.review_order import WIDE_INTERVAL
from ropo.provenance import Json
from ropo.report.costs import cost_table
from ropo.run.forecast import Plan


def say_plan(plan: Plan) -> None:
    """Say what a run will cost.

    Args:
        plan: Of either.
    """
    if PartialState().is_main_process:
        seconds = {stage.name: stage.seconds for stage in plan.stages}
        memory = asdict(plan.memory)
        print(cost_table(seconds, memory, disk_bytes=plan.disk_bytes, layout=plan.layout, assumed=plan.assumed))


def say_audit(summary: Json, folder: Path) -> None:
    """Say what an audit has found, and what to do next."""
    say_rate(summary)
    print(
        f"Training would keep {summary['num_kept']} pairs, drop {summary['num_dropped']} and flip "
        f"{summary['num_flipped']}.\n"
        f"To train on: {folder / 'cleaned.jsonl'}\n"
        f"To correct:  {folder / 'review.csv'}   (fill in `verdict`: right, wrong or drop; then ropo train --decisions "
        f"that file --audit_from {folder} --output_dir another)\n"
        f"Report:      {folder / 'report.html'}   <- look here next"
    )


def say_training(summary: Json, folder: Path) -> None:
    """Say what a run has trained on, and where the model is."""
    say_rate(summary)
    print(
        f"Pairs: {summary['num_kept']} kept, {summary['num_dropped']} dropped, {summary['num_flipped']} flipped, "
        f"{summary['num_resampled']} resampled. rho {summary['rho']:.3f}, alpha {summary['alpha']:.2f}, "
        f"beta {summary['beta']:.3g}."
    )
    if evaluation := summary["evaluation"]:
        last = evaluation["rounds"][-1]
        print(
            f"Evaluation accuracy: {last['accuracy']:.1%}, 90 % interval {last['low']:.1%} to {last['high']:.1%}, on "
            f"{evaluation['num_pairs']} pairs that nothing was trained on."
        )
    print(
        f"Model:  {folder}\nLedger: {folder / 'ledger.parquet'}\nReport: {folder / 'report.html'}   <- look here next"
    )


def say_rate(summary: Json) -> None:
    """Say how many labels are flipped, as far as that can be said."""
    rate = summary["flip_rate"]
    if not summary["is_informative"]:
        print(f"\nFlipped labels: cannot tell. {summary['reason']}")
        _say_contradicted(summary)
        return
    print(f"\nFlipped labels: {rate['estimate']:.1%}, 90 % interval {rate['low']:.1%} to {rate['high']:.1%}.")
    if rate["high"] - rate["low"] > WIDE_INTERVAL:
        _say_contradicted(summary)
    for one in summary["annotators"][:5]:
        shown = f"{one['rate']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
        print(f"  {printable(one['name'])}: {shown}, {one['num_pairs']} pairs")


def _say_contradicted(summary: Json) -> None:
    """What stands first in the table for a person though nobody can say whether it is wrong."""
    num = summary["num_contradicted"]
    if not num:  # or None, without models that have not seen the labels
        return
    what = (
        "How many of these are flips and how many honest doubt can be told no closer"
        if summary["is_informative"]
        else "Whether these are flips or honest doubt cannot be told"
    )
    where = "first in review.csv" if summary["task"] == "audit" else "lowest by held_out_margin in ledger.parquet"
    print(
        f"  {num} of the labels are contradicted by models that have not seen them. {what}; they stand "
        f"{where}: read the first ones."
    )


def say_export(found: Exported, given: ExportArguments) -> None:
    """Say what was answered, and where the answers are."""
    kinds = ((found.num_unfinished, "cut at max_new_tokens"), (found.num_empty, "empty"))
    counts = [f"{num} {meaning}" for num, meaning in kinds if num]
    print(
        f"\n{found.num_questions} questions, {found.num_answers} answers of {found.mean_chars:.0f} characters "
        f"on average{''.join(f', {count}' for count in counts)}.\n"
        f"Temperature {' or '.join(f'{value:g}' for value in found.temperatures)}, top_p {given.top_p:g}, at most "
        f"{given.max_new_tokens} tokens.\n"
        f"Answers: {found.file}   <- what {given.benchmark} reads"
    )
    if given.benchmark == "alpaca_eval":
        print(f"Next:    ropo win_rate --outputs {found.file} --baseline B.json, or alpaca_eval itself")


def say_win_rate(found: WinRate, folder: Path) -> None:
    """Say how often the judge has preferred the outputs to the baseline."""
    counts = found.counts
    total = sum(counts.values())
    print(
        f"\n{found.outputs} against {found.baseline} on {total} instructions: "
        f"{_rate(found.rate) if found.rate else 'cannot tell, since the judge has preferred no output'}.\n"
        f"Wins {counts['win']}, losses {counts['loss']}, ties {counts['tie']}, undecided {counts['undecided']}; "
        f"{counts['identical']} with identical outputs, which count for neither."
    )
    if counts["undecided"]:
        print(f"If all undecided were lost {found.lowest:.1%}, if all were won {found.highest:.1%}.")
    print(f"Mean length {found.mean_chars:.0f} characters, baseline {found.mean_chars_baseline:.0f}.")
    for length, rate in found.by_length.items():
        if rate:
            print(f"  {length.replace('_', ' ')}: {_rate(rate)} of {rate.count}")
    print(f"Result: {folder / 'win_rate.json'}\nEach instruction: {folder / 'comparisons.jsonl'}   <- look here next")


def _rate(rate: Mean) -> str:
    return f"{rate.value:.1%} won, 90 % interval {rate.low:.1%} to {rate.high:.1%}"
