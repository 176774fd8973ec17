"""Options as users write them: words of a command line, a YAML file, JSON.

In: what was written. Out: plain values, or one sentence that names the option.

The one idea: a value means the same wherever it is written. A YAML file is read by the core schema of YAML 1.2, where
`no` is text and `010` is no octal number, and its options pass through the same conversion as the command line's.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ropo.provenance import file_kind
from ropo.spelling import did_you_mean

SHOWN = 100
"""Characters of a value in a message."""


def check_mapping(name: str, value: Any) -> None:
    """Refuse what holds no named values.

    Raises:
        ValueError: If `value` is no mapping.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} needs named values; got {short(value)}.")


def check_keys(name: str, value: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse an object with a key that nothing reads.

    Raises:
        ValueError: If `value` has another one.
    """
    for key in value:
        if key not in known:
            raise ValueError(f"{name} needs keys of {', '.join(known)}; got {key!r}.{did_you_mean(key, known)}")


def is_finite(value: Any) -> bool:
    """Whether it is a number that has an end; a switch is none."""
    return is_number(value) and math.isfinite(value)


def is_number(value: Any) -> bool:
    """Whether it is a number; a switch is none."""
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def short(value: Any) -> str:
    """A value for a message, of any length."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."


def read_object(name: str, value: Any, *, may_be_file: bool) -> Any:
    """The value of an option that holds named values.

    Args:
        name: The option.
        value: JSON as text, where it may be the name of a JSON file, or what it already is.
        may_be_file: Whether it may.

    Returns:
        A dictionary for a text; anything else as it is.

    Raises:
        ValueError: If the text is no object of JSON, or no file.
    """
    if not isinstance(value, str):
        if isinstance(value, list | tuple | int | float):
            raise ValueError(f"{name} needs named values; got {short(value)}.")
        return value
    is_json = value.lstrip().startswith("{")
    what = """JSON like '{"name": 1}'""" + (" or the name of a JSON file" if may_be_file else "")
    if not is_json and not (may_be_file and Path(value).is_file()):
        raise ValueError(f"{name} needs {what}; got {short(value)}.")
    try:
        found = json.loads(value if is_json else Path(value).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} needs {what}; got {short(value)}: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} needs {what} that holds named values; got a {type(found).__name__} in {value}.")
    return found


def read_numbers(name: str, value: Any) -> dict[str, float]:
    """The value of an option that holds named numbers.

    Args:
        name: The option.
        value: A mapping, JSON as text, or name=value with commas between several; None holds none.

    Returns:
        Numbers by name.

    Raises:
        ValueError: If it is none of these, or a value is no finite number.

    Examples:
        >>> read_numbers("loss_args", "mean_target_margin=0.5, evenness=1")
        {'mean_target_margin': 0.5, 'evenness': 1.0}
    """
    if isinstance(value, str) and not value.lstrip().startswith("{"):
        parts = [part.split("=") for part in value.split(",")]
        if any(len(part) != 2 for part in parts):
            raise ValueError(f"{name} needs name=value, several with commas between them, or JSON; got {short(value)}.")
        written = {key.strip(): number.strip() for key, number in parts}
        if len(written) < len(parts):
            raise ValueError(f"{name} needs each name once; got {short(value)}.")
        return {key: _number(name, key, number) for key, number in written.items()}
    found = read_object(name, {} if value is None else value, may_be_file=False)
    check_mapping(name, found)
    return {str(key): _number(name, str(key), number) for key, number in found.items()}


def _number(name: str, key: str, value: Any) -> float:
    """A number that was written as one or as text."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = value
    if not is_finite(number):
        raise ValueError(f"{name} needs a finite number for {key}; got {short(value)}.")
    return float(number)


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, every key once, everything written out."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as its parent has it; filled below

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias (*) is not read; write its value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - as its parent has it
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:place]):
                what = f"{key.value!r} is there twice; leave one out"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
        return super().construct_mapping(node, deep=deep)


_NUMBER = r"[-+]?(?:0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", rf"^{_NUMBER}$", list("-+0123456789")),
    (
        "float",
        rf"^(?:{_NUMBER}(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def read_yaml(path: Path, *, as_text: bool = False, option: str = "config") -> dict[str, Any]:
    """Options from a file; an empty one holds none.

    Args:
        path: The file.
        as_text: Whether single values stay as they are written, for a conversion that knows the option's type.
        option: That names the file.

    Raises:
        ValueError: If it is not there, or is no YAML file of options.
    """
    if not path.is_file():
        raise ValueError(f"--{option} needs a YAML file; {path} is {file_kind(path)}.")
    loader = None
    try:
        loader = _Loader(path.read_text("utf-8-sig"))
        node = loader.get_single_node()
        found = {} if node is None else loader.construct_document(node)
        if as_text and isinstance(node, yaml.MappingNode):
            written = zip(found, node.value, strict=True)
            found |= {name: one.value for name, (_, one) in written if _is_written(one)}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"--{option} needs a YAML file; {path}{where}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"--{option} needs a YAML file; {path} is none: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"--{option} needs a YAML file of `option: value` lines; {path} holds a {kind}.")
    return found


def _is_written(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null"
