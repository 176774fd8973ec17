"""A parser that says what is wrong in one sentence, where `argparse` prints all options first.

In: the words of a command. Out: a namespace of values, or `ValueError`.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ropo.cli.words import name_of_option, refuse_unknown
from ropo.options import Rule


class SentenceParser(argparse.ArgumentParser):
    """`argparse` without abbreviations and without a help page; those are files."""

    def __init__(self, command: str, **options: Any) -> None:
        self.command = command
        self._rules: dict[str, Rule] = {}
        super().__init__(prog=f"ropo {command}", allow_abbrev=False, add_help=False, **options)

    def add(self, name: str, *others: str, rule: Rule | None = None, **how: Any) -> None:
        """Add an option, which may be spelled with hyphens, too, and what it may be beside its type."""
        self._rules |= {} if rule is None else {name: rule}
        spellings = dict.fromkeys((name, name.replace("_", "-"), *others))
        self.add_argument(*(f"--{spelling}" for spelling in spellings), **how)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse all words.

        Raises:
            ValueError: If an option is unknown, incomplete, of another type or out of range.
        """
        given, unknown = self.parse_known_args(list(words))
        refuse_unknown(unknown, self.names(), command=self.command)
        for name, rule in self._rules.items():
            value = getattr(given, name)
            if value is not None and not rule.allows(value):
                raise ValueError(f"{name} needs {rule.bounds}; got {value}.")
        return given

    def names(self) -> list[str]:
        """Every name that an option is called by, with underscores."""
        return [*dict.fromkeys(name_of_option(word) for word in self._option_string_actions)]

    def options(self) -> list[argparse.Action]:
        """The options and positional arguments, in order, each once."""
        return [*{action.dest: action for action in reversed(self._actions)}.values()][::-1]

    def error(self, message: str) -> NoReturn:
        """Raise a sentence about the option."""
        found = re.fullmatch(
            r"argument --(\w+)\S*: (?:invalid (\w+) value|Truthy value expected): (.*)", message, re.DOTALL
        )
        if found is None:
            raise ValueError(message.replace("argument --", "--", 1))
        name, kind, value = found.groups()
        if kind is None:
            value = repr(value.removeprefix("got ").partition(" but expected")[0])
        needs = {"int": "a whole number", "float": "a number", None: "true or false"}.get(kind, f"a {kind}")
        raise ValueError(f"{name} needs {needs}; got {value}.")
