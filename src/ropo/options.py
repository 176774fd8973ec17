"""Options as users write them: words of a command line, a YAML file, values in Python.

In: what was written. Out: values of the type that the option has, or one sentence that names the option.

The one idea: a value means the same wherever it is written. A YAML file is read by the core schema of YAML 1.2, where
`no` is text and `010` is no octal number, and its options pass through the same conversion as the command line's.
"""

import json
import math
import os
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import numpy as np
import yaml

from ropo.provenance import file_kind
from ropo.spelling import did_you_mean

_SHOWN = 100  # characters of a value in a message


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not in a table.

    Args:
        name: The option.
        value: What was given.
        choices: What there is.

    Raises:
        ValueError: If `value` is none of them.
    """
    known = list(choices)
    if value not in known:
        raise ValueError(f"{name} needs one of {', '.join(known)}; got {value!r}.{did_you_mean(value, known)}")


def check_mapping(name: str, value: Any) -> None:
    """Refuse what holds no named values.

    Args:
        name: The option.
        value: What was given.

    Raises:
        ValueError: If `value` is no mapping.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} needs named values; got {short(value)}.")


def check_keys(name: str, value: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse an object with a key that nothing reads.

    Args:
        name: The option.
        value: What was given.
        known: The keys that are read.

    Raises:
        ValueError: If `value` has another one.
    """
    for key in value:
        if key not in known:
            raise ValueError(f"{name} needs keys of {', '.join(known)}; got {key!r}.{did_you_mean(key, known)}")


def check_types(options: Any, *, either: Collection[str] = ()) -> None:
    """Check every number, switch and text of a dataclass of options against its annotation.

    Args:
        options: An instance.
        either: Options that are a text or a number.

    Raises:
        ValueError: If an option has no value and needs one, is of another type, or is a number without end.
    """
    kind = type(options)
    given = {field.name: getattr(options, field.name) for field in fields(kind)}
    check_values(given, kind, either=either)
    kinds = _kinds(kind)
    for name, value in given.items():
        is_float = kinds[name] - {NoneType} == {float} and name not in either
        if is_float and value is not None:
            setattr(options, name, float(value))  # 1 and 1.0 are one value, of one digest


def check_values(given: Mapping[str, Any], kind: type, *, either: Collection[str] = ()) -> None:
    """Check values by the annotations of a dataclass of options.

    Texts are checked of the class itself only: what libraries call a text may be more.

    Args:
        given: Values by the names of options.
        kind: The dataclass.
        either: Options that are a text or a number.

    Raises:
        ValueError: As `check_types`.
    """
    own, defaults = kind.__annotations__, {field.name: field.default for field in fields(kind)}
    hints = _kinds(kind)
    for name, value in given.items():
        kinds = hints[name]
        if value is None and (NoneType in kinds or defaults[name] is None):
            continue
        if name in either and _is_number(value):
            kinds = frozenset({float})
        needs = _what_it_needs(value, kinds - {NoneType}, is_own=name in own)
        if needs:
            raise ValueError(f"{name} needs {needs}; got {str(value)[:_SHOWN] if _is_number(value) else short(value)}.")


def _kinds(options: type) -> dict[str, frozenset[Any]]:
    hints = typing.get_type_hints(options)
    unions = (typing.Union, UnionType)
    return {
        name: frozenset(typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,))
        for name, hint in hints.items()
    }


def is_finite(value: Any) -> bool:
    """Whether it is a number that has an end; a switch is none."""
    return _is_number(value) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _what_it_needs(value: Any, kinds: frozenset[Any], *, is_own: bool) -> str:
    """What the option needs that this value is not, or nothing."""
    if kinds == {bool}:
        return "" if isinstance(value, bool | np.bool_) else "true or false"
    if kinds == {int}:
        return "" if _is_number(value) and isinstance(value, Integral) else "a whole number"
    if kinds <= {int, float}:
        if not _is_number(value):
            return "a number"
        return "" if is_finite(value) else "a finite number"
    if kinds == {str} and is_own:
        return "" if isinstance(value, str | os.PathLike) else "one text"
    return ""


def short(value: Any) -> str:
    """A value for a message, of any length."""
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


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


def check_folder(name: str, value: str | os.PathLike[str]) -> None:
    """Refuse a folder to write to that can be none.

    Args:
        name: The option.
        value: What was given; need not exist.

    Raises:
        ValueError: If it, or a folder above it, is a file or must not be written.
    """
    path = Path(value).expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{name} needs a folder; got {value}, and {there} is a file. Use another one.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name} needs a folder that may be written; got {value}, and {there} may not. Use another.")


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


def read_yaml(path: Path, *, as_text: bool = False) -> dict[str, Any]:
    """Options from a file; an empty one holds none.

    Args:
        path: The file.
        as_text: Whether single values stay as they are written, for a conversion that knows the option's type.

    Raises:
        ValueError: If it is not there, or is no YAML file of options.
    """
    if not path.is_file():
        raise ValueError(f"--config needs a YAML file; {path} is {file_kind(path)}.")
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
        raise ValueError(f"--config needs a YAML file; {path}{where}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"--config needs a YAML file; {path} is none: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"--config needs a YAML file of `option: value` lines; {path} holds a {type(found).__name__}.")
    return found


def _is_written(node: Any) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null"


def choices_of(kind: type[Enum]) -> tuple[str, ...]:
    """The values of an enumeration."""
    return tuple(one.value for one in kind)
