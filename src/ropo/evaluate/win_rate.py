"""How often a judge prefers one model's outputs to another's, and how far length may explain it.

In: two files of outputs on the same instructions, in AlpacaEval's format; a judge. Out: `WinRate`, and a row for every
instruction.

The one idea: what the judge did not say is counted and shown, never guessed: ties count half, instructions without a
verdict are left out and the rate is given as it would be if all of them were lost, or won. Outputs that are the same
text are counted apart: nobody was asked, so they say nothing of who is better.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState

from ropo.data.problems import printable, short
from ropo.data.validate import DataError
from ropo.evaluate.export import encodable, read_objects
from ropo.evaluate.measures import Mean, share_of
from ropo.evaluate.options import WinRateArguments
from ropo.judge.options import make_judge
from ropo.judge.verdicts import Judge, ask
from ropo.pairs import Pair
from ropo.processes import meet
from ropo.provenance import Json, file_kind, hash_file, read_json, versions, write_aside, write_json
from ropo.report.notebook import as_html, as_text
from ropo.report.wording import percent, percent_range

OUTCOMES = ("win", "loss", "tie", "undecided", "identical")
LENGTHS = ("longer", "shorter", "as_long")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a model has written.

    Attributes:
        name: Of the model, or of the file that does not say.
        texts: Output to each instruction, in the order of the file.
    """

    name: str
    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two outputs to one instruction.

    Attributes:
        instruction: The instruction.
        output: Of the model.
        baseline: Of the model it is compared with.
        p_better: Probability that `output` is the better one; None where the judge could not tell, or was not asked
            since both are the same text.
    """

    instruction: str
    output: str
    baseline: str
    p_better: float | None

    @property
    def outcome(self) -> str:
        """One of OUTCOMES."""
        if self.output == self.baseline:
            return "identical"
        if self.p_better is None:
            return "undecided"
        return "tie" if self.p_better == 0.5 else "win" if self.p_better > 0.5 else "loss"

    @property
    def length(self) -> str:
        """One of LENGTHS: how many characters `output` has beside `baseline`."""
        difference = len(self.output) - len(self.baseline)
        return "longer" if difference > 0 else "shorter" if difference < 0 else "as_long"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class WinRate:
    """What a judge says of a model beside another.

    Attributes:
        outputs: Name of the model.
        baseline: Name of the other one.
        rate: Share of decided instructions that are won, ties counting half, with a 90 % interval; None if none is won
            or lost: a judge that prefers nothing has decided nothing.
        lowest: The rate if every undecided instruction were lost; None if the judge was asked about none.
        highest: The rate if every undecided instruction were won; likewise.
        counts: Number of instructions by outcome; "identical" are those with twice the same text, which no rate holds.
        mean_p_better: Mean of what the judge says; differs from the rate where a judge gives probabilities.
        by_length: Rate where the output is longer, shorter, or as long as the baseline's; None where there are none.
        mean_chars: Mean length of the outputs, characters.
        mean_chars_baseline: Likewise for the baseline.
    """

    outputs: str
    baseline: str
    rate: Mean | None
    lowest: float | None
    highest: float | None
    counts: dict[str, int]
    mean_p_better: float | None
    by_length: dict[str, Mean | None]
    mean_chars: float
    mean_chars_baseline: float

    @classmethod
    def load(cls, folder: str | Path) -> "WinRate":
        """What `run_win_rate` has written.

        Raises:
            FileNotFoundError: If there is no result.
            DamagedFileError: If it is damaged.
        """
        path = Path(folder) / "win_rate.json"
        if not path.exists():
            raise FileNotFoundError(
                f"WinRate.load needs the folder of a finished comparison; {folder} has no {path.name}."
            )
        found = read_json(path)
        plain = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        named = {name: found[name]["name"] for name in ("outputs", "baseline")}
        by_length = {length: _mean(mean) for length, mean in found["by_length"].items()}
        return cls(**{**plain, **named, "rate": _mean(found["rate"]), "by_length": by_length})

    def __repr__(self) -> str:
        return as_text(self._title(), self._rows())

    def _repr_html_(self) -> str:
        return as_html(self._title(), self._rows())

    def _title(self) -> str:
        return f"{self.outputs} against {self.baseline}"

    def _rows(self) -> list[tuple[str, str]]:
        rate, counts = self.rate, ", ".join(f"{num} {outcome}" for outcome, num in self.counts.items())
        shown = "cannot tell" if rate is None else f"{percent(rate.value)} (90 % {percent_range(rate.low, rate.high)})"
        return [("win rate", shown), ("instructions", counts)]


def _mean(found: Json | None) -> Mean | None:
    return None if found is None else Mean(**found)


def read_outputs(path: Path, *, option: str) -> Outputs:
    """Read outputs in AlpacaEval's format.

    Args:
        path: A .json list, or .jsonl lines, of `instruction`, `output` and `generator`; other fields are not looked at,
            but an `input` with text in it is refused: it belongs to the instruction.
        option: Who asks, for messages.

    Returns:
        The outputs.

    Raises:
        FileNotFoundError: If the file is not there.
        DataError: If a row has another form or repeats an instruction; names the file and the row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{option} needs a file; {path} is {file_kind(path)}. `ropo export` writes one.")
    texts: dict[str, str] = {}
    names: list[str] = []
    for where, row in read_objects(path, option=option):
        for name in ("instruction", "output"):
            if not isinstance(row.get(name), str):
                got = short(row[name]) if name in row else f"fields {', '.join(map(printable, row)) or 'none'}"
                raise DataError(
                    f"{where}: outputs need a text in `{name}`; got {got}. Write AlpacaEval's format, as `ropo export "
                    "--benchmark alpaca_eval` does."
                )
            if row.get("input"):
                raise DataError(
                    f"{where}: outputs need an instruction without `input`; got {short(row['input'])}. Write it into "
                    "`instruction`, in both files and in the questions."
                )
            try:
                encodable(row[name])
            except ValueError as error:
                raise DataError(f"{where}: outputs need {error}") from None
        if row["instruction"] in texts:
            raise DataError(
                f"{where}: outputs need an instruction once; got {short(row['instruction'])} again. Leave one out."
            )
        texts[row["instruction"]] = row["output"]
        names.append(printable(str(row.get("generator") or path.stem)))
    if not texts:
        raise DataError(f"{path}: outputs need at least one row; got none.")
    if len(set(names)) > 1:
        raise DataError(
            f"{path}: outputs need one generator; got {', '.join(sorted(set(names))[:3])}. Give a file for each model."
        )
    return Outputs(name=names[0], texts=texts)


def compare(outputs: Outputs, baseline: Outputs, judge: Judge, *, plain_text: bool = False) -> list[Comparison]:
    """Ask a judge about every instruction whose two outputs are not the same text.

    Args:
        outputs: Of the model.
        baseline: Of the other, on the same instructions in any order.
        judge: Any judge, see `ropo.judge.verdicts`.
        plain_text: Whether it reads plain text; conversations of one turn by default.

    Returns:
        One entry for each instruction, in the order of `outputs`.

    Raises:
        DataError: If one lacks an instruction that the other has.
    """
    for one, other in ((outputs, baseline), (baseline, outputs)):
        if missing := [text for text in one.texts if text not in other.texts]:
            raise DataError(
                f"win_rate needs outputs to the same instructions; got {len(missing)} of {len(one.texts)} of "
                f"{one.name} that {other.name} has not answered, the first {short(missing[0])}. Answer the same "
                "questions with both models."
            )
    differ = [text for text in outputs.texts if outputs.texts[text] != baseline.texts[text]]
    pairs = [
        _pair(text, outputs.texts[text], baseline.texts[text], row, plain_text=plain_text)
        for row, text in enumerate(differ)
    ]
    said = dict(zip(differ, ask(judge, pairs).tolist(), strict=True))
    return [
        Comparison(
            instruction=text,
            output=output,
            baseline=baseline.texts[text],
            p_better=None if np.isnan(p := said.get(text, np.nan)) else p,
        )
        for text, output in outputs.texts.items()
    ]


def _pair(instruction: str, output: str, baseline: str, row: int, *, plain_text: bool) -> Pair:
    if plain_text:
        return Pair(prompt=instruction, chosen=output, rejected=baseline, row=row)
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (output, baseline))
    return Pair(prompt=[{"role": "user", "content": instruction}], chosen=chosen, rejected=rejected, row=row)


def win_rate(comparisons: Sequence[Comparison], *, outputs: str = "outputs", baseline: str = "baseline") -> WinRate:
    """The win rate, and what it may hide.

    Returns:
        Rates with 90 % intervals (Wilson's; ties make it a little wider than need be).

    Examples:
        >>> rows = [Comparison(instruction=str(i), output="a", baseline="bb", p_better=p)
        ...         for i, p in enumerate([1.0, 1.0, 0.5, 0.0, None])]
        >>> found = win_rate(rows)
        >>> found.rate.value, found.counts["undecided"], found.lowest, found.highest
        (0.625, 1, 0.5, 0.7)
    """
    counts = Counter(one.outcome for one in comparisons)
    asked = [one for one in comparisons if one.outcome != "identical"]
    decided = [one.p_better for one in asked if one.p_better is not None]
    is_decided = bool(counts["win"] or counts["loss"])
    hits = counts["win"] + 0.5 * counts["tie"]
    groups = {length: [one for one in asked if one.length == length] for length in LENGTHS}
    return WinRate(
        outputs=outputs,
        baseline=baseline,
        rate=_rate(asked) if is_decided else None,
        lowest=hits / len(asked) if asked else None,
        highest=(hits + counts["undecided"]) / len(asked) if asked else None,
        counts={outcome: counts[outcome] for outcome in OUTCOMES},
        mean_p_better=float(np.mean(decided)) if decided else None,
        by_length={length: _rate(group) if is_decided else None for length, group in groups.items()},
        mean_chars=float(np.mean([len(one.output) for one in comparisons])),
        mean_chars_baseline=float(np.mean([len(one.baseline) for one in comparisons])),
    )


def _rate(comparisons: Sequence[Comparison]) -> Mean | None:
    worth = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    hits = [worth[one.outcome] for one in comparisons if one.outcome in worth]
    return share_of(hits) if hits else None


def run_win_rate(args: WinRateArguments) -> WinRate:
    """Compare two files of outputs, and write `win_rate.json` and `comparisons.jsonl`.

    What the judge answers is kept in the same folder, so the same call asks only for what it has not said.

    Returns:
        The win rate; `win_rate.json` holds it with the judge and the hashes of both files.

    Raises:
        FileNotFoundError: If a file is not there.
        DataError: If a file has another form, or the two have different instructions.
        EndpointError: If the endpoint fails for good and `judge_on_failure` is "stop".
    """
    folder = Path(str(args.output_dir))
    paths = [Path(str(path)) for path in (args.outputs, args.baseline)]
    outputs, baseline = (
        read_outputs(path, option=f"--{name}") for path, name in zip(paths, ("outputs", "baseline"), strict=True)
    )
    judge = make_judge(args, folder / "judge")
    if judge is None:
        raise ValueError("win_rate needs a judge; got none. Set args.judge.")
    comparisons = compare(outputs, baseline, judge, plain_text=args.plain_text)
    found = win_rate(comparisons, outputs=outputs.name, baseline=baseline.name)
    summary = {
        "outputs": {"name": outputs.name, "sha256": hash_file(paths[0])},
        "baseline": {"name": baseline.name, "sha256": hash_file(paths[1])},
        "judge": {"kind": args.judge, "model": args.judge_model},
        **{name: value for name, value in asdict(found).items() if name not in ("outputs", "baseline")},
        "versions": versions(),
    }
    if PartialState().is_main_process:
        rows = [{"outcome": one.outcome, "length": one.length, **asdict(one)} for one in comparisons]
        with write_aside(folder / "comparisons.jsonl") as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        write_json(folder / "win_rate.json", summary)
    meet()
    return found
