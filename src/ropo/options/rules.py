"""What options may be: each dataclass of options says so beside its fields, and one function checks it.

In: a dataclass of options. Out: the same with values of the types it states, or one sentence that names the option.
"""

import inspect
import os
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from numbers import Integral
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any

import numpy as np

from ropo.options.read import SHOWN, check_keys, is_finite, is_number, read_object, short
from ropo.spelling import did_you_mean


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not in a table.

    Raises:
        ValueError: If `value` is none of them.
    """
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} needs one of {', '.join(known)}; got {value!r}.{did_you_mean(value, known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Taker:
    """An entry of a table that reads options of its own, such as a kind of judge.

    Attributes:
        needs: Options that it needs.
        takes: Options that it can do without, with what stands in for them.
    """

    needs: tuple[str, ...] = ()
    takes: Mapping[str, str] = field(default_factory=dict)


def takers_of(table: Mapping[str, Taker]) -> dict[str, list[str]]:
    """Every option that entries of a table read, with the names of those that do."""
    takers: dict[str, list[str]] = {}
    for name, spec in table.items():
        for one in (*spec.needs, *spec.takes):
            takers.setdefault(one, []).append(name)
    return takers


def check_taker(options: Any, what: str, table: Mapping[str, Taker]) -> None:
    """Check the options that belong to an entry of a table, and fill in what it can do without.

    Args:
        options: A dataclass of options.
        what: The option that names the entry; another name than those in the table stands for none of them.
        table: The entries.

    Raises:
        ValueError: If an option is missing, or ignored by the entry.
    """
    chosen = getattr(options, what)
    for name, takers in takers_of(table).items():
        if getattr(options, name) is not None and chosen not in takers:
            raise ValueError(
                f"{name} needs {what} {' or '.join(takers)}; got {what} {chosen}. Leave it out, or change {what}."
            )
    spec = table.get(chosen, Taker())
    for name in spec.needs:
        if not getattr(options, name):
            raise ValueError(f"{what} {chosen} needs {' and '.join(spec.needs)}; got no {name}. Add --{name}.")
    for name, default in spec.takes.items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What an option may be, beside its type; it stands in the annotation, as in `Annotated[int, Rule(low=1)]`.

    Not in the field's metadata: `HfArgumentParser` hands that to `argparse`, which refuses what it does not know.

    Attributes:
        low: Smallest value.
        high: Largest value.
        above: Values are larger than this.
        below: Values are smaller than this.
        choices: Texts that it may be; any if empty.
        may_be_number: Whether it is a text or a number.
        keys: Of an option that holds named values: the names that are read, any if empty; None for other options.
        may_be_file: Whether named values may stand in a JSON file.
        identifies: Whether a run with another value is another run, which does not resume this one.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    may_be_number: bool = False
    keys: tuple[str, ...] | None = None
    may_be_file: bool = False
    identifies: bool = True

    def allows(self, number: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            (self.low is None or self.low <= number)
            and (self.above is None or self.above < number)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )

    @property
    def bounds(self) -> str:
        """The bounds as a message states them.

        Examples:
            >>> Rule(low=1).bounds, Rule(low=0, below=1).bounds
            ('1 or more', 'a number in [0, 1)')
        """
        if self.high is None and self.below is None:
            return f"{self.low} or more" if self.above is None else f"a number above {self.above}"
        if self.low is not None and self.high is not None:
            return f"a number from {self.low} to {self.high}"
        left = f"[{self.low}" if self.above is None else f"({self.above}"
        return f"a number in {left}, {self.high}]" if self.below is None else f"a number in {left}, {self.below})"


def rules_of(kind: type) -> Mapping[str, Rule]:
    """The rule of every option of a dataclass that has one.

    Those of inherited fields of a library stand in a mapping `library_rules` of the class.
    """
    found: dict[str, Rule] = dict(getattr(kind, "library_rules", {}))
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        rule = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Rule)), None)
        if rule is not None:
            found[name] = rule
    return MappingProxyType(found)


def identifying(options: Any) -> list[str]:
    """Names of the options with which another value makes another run."""
    rules = rules_of(type(options))
    return [one.name for one in fields(options) if one.name not in rules or rules[one.name].identifies]


def check_options(options: Any) -> None:
    """Check each option of a dataclass by itself: its type, its bounds, its choices.

    Named values that were written as JSON become a mapping, and whole numbers of an option with a fraction a float: 1
    and 1.0 are one value, of one digest.

    Args:
        options: An instance.

    Raises:
        ValueError: If an option has no value and needs one, is of another type, a number without end, out of bounds or
            not among its choices.
    """
    kind = type(options)
    hints, rules = _kinds(kind), rules_of(kind)
    check_values({one.name: getattr(options, one.name) for one in fields(kind)}, kind)
    for name in (one.name for one in fields(kind)):
        rule, value = rules.get(name, Rule()), getattr(options, name)
        if hints[name] - {NoneType} == {float} and value is not None:
            setattr(options, name, float(value))
        if rule.keys is not None:
            value = read_object(name, value, may_be_file=rule.may_be_file)
            setattr(options, name, value)
            if rule.keys and isinstance(value, dict):
                check_keys(name, value, rule.keys)


def check_values(given: Mapping[str, Any], kind: type) -> None:
    """Check values by the annotations of a dataclass of options.

    Texts are checked of our own classes only: what libraries call a text may be more.

    Raises:
        ValueError: As `check_options`.
    """
    defaults = {one.name: one.default for one in fields(kind)}
    hints, rules, own = _kinds(kind), rules_of(kind), _own_fields(kind)
    for name, value in given.items():
        kinds, rule = hints[name], rules.get(name, Rule())
        if value is None and (NoneType in kinds or defaults[name] is None):
            continue
        if rule.may_be_number and is_number(value):
            kinds = frozenset({float})
        needs = _what_it_needs(value, kinds - {NoneType}, is_own=name in own)
        if needs:
            raise ValueError(f"{name} needs {needs}; got {str(value)[:SHOWN] if is_number(value) else short(value)}.")
    for name, value in given.items():
        rule = rules.get(name, Rule())
        if rule.choices and value is not None:
            check_choice(name, value, rule.choices)
        if is_number(value) and not rule.allows(value):
            raise ValueError(f"{name} needs {rule.bounds}; got {value}.")


def _own_fields(kind: type) -> set[str]:
    """Names of the fields that no library has defined."""
    ours = (one for one in kind.__mro__ if not one.__module__.startswith("transformers"))
    return {name for one in ours for name in inspect.get_annotations(one)}


def _kinds(options: type) -> dict[str, frozenset[Any]]:
    hints = typing.get_type_hints(options)
    unions = (typing.Union, UnionType)
    return {
        name: frozenset(typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,))
        for name, hint in hints.items()
    }


def _what_it_needs(value: Any, kinds: frozenset[Any], *, is_own: bool) -> str:
    """What the option needs that this value is not, or nothing."""
    if kinds == {bool}:
        return "" if isinstance(value, bool | np.bool_) else "true or false"
    if kinds == {int}:
        return "" if is_number(value) and isinstance(value, Integral) else "a whole number"
    if kinds <= {int, float}:
        if not is_number(value):
            return "a number"
        return "" if is_finite(value) else "a finite number"
    if kinds == {str} and is_own:
        return "" if isinstance(value, str | os.PathLike) else "one text"
    return ""


def check_folder(name: str, value: str | os.PathLike[str]) -> None:
    """Refuse a folder to write to that can be none.

    Raises:
        ValueError: If it, or a folder above it, is a file or must not be written.
    """
    path = Path(value).expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{name} needs a folder; got {value}, and {there} is a file. Use another one.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name} needs a folder that may be written; got {value}, and {there} may not. Use another.")


def choices_of(kind: type[Enum]) -> tuple[str, ...]:
    """The values of an enumeration."""
    return tuple(one.value for one in kind)
