"""Options: how they are read (`read`), and what they may be (`rules`)."""

from ropo.options.read import (
    check_mapping,
    is_finite,
    read_numbers,
    read_yaml,
    short,
)
from ropo.options.rules import (
    Rule,
    Taker,
    check_choice,
    check_folder,
    check_options,
    check_taker,
    check_values,
    choices_of,
    identifying,
    option,
    rules_of,
    takers_of,
)

__all__ = [
    "Rule",
    "Taker",
    "check_choice",
    "check_folder",
    "check_mapping",
    "check_options",
    "check_taker",
    "check_values",
    "choices_of",
    "identifying",
    "is_finite",
    "option",
    "read_numbers",
    "read_yaml",
    "rules_of",
    "short",
    "takers_of",
]
