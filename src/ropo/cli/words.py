"""The words of a command line, before anything is parsed.

In: the words as the shell gave them. Out: nothing, or one sentence on what is wrong; the words without secrets.

Imports the standard library only, so that a typing mistake is answered at once.
"""

import os
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from ropo.spelling import did_you_mean

TRAINING = ("train", "audit")  # commands with the options of `ROPOConfig`, more than one page shows
_SHOWN = 100  # characters of a word in a message


def name_of_option(word: str) -> str:
    """The option that a word of the command line names.

    Examples:
        >>> name_of_option("--max-length=512")
        'max_length'
    """
    return word.lstrip("-").split("=")[0].replace("-", "_")


def options_in(words: Sequence[str]) -> list[str]:
    """The words that name an option; after a lone `--` none does.

    Examples:
        >>> options_in(["pairs.jsonl", "--beta", "-1", "--", "--x"])
        ['--beta']
    """
    end = words.index("--") if "--" in words else len(words)
    return [word for word in words[:end] if word.startswith("--")]


def check_words(words: Sequence[str]) -> None:
    """Refuse what a command line can say by mistake and a parser takes: options given twice, without value, not text.

    Raises:
        ValueError: If there is any.
    """
    for word in words:
        if not _is_text(word):
            shown = word.encode("utf-8", "backslashreplace").decode()
            raise ValueError(
                f"The command line needs UTF-8 text; got {shown[:_SHOWN]!r}. Rename the file, or quote it."
            )
    named = [
        (place, name_of_option(word)) for place, word in enumerate(words) if word.startswith("--") and word != "--"
    ]
    for name, count in Counter(name for _, name in named).items():
        if count > 1:
            raise ValueError(f"--{name} needs one value; got it {count} times. Leave all but one out.")
    for place, name in named:
        if words[place].endswith("=") or words[place + 1 : place + 2] == [""]:
            raise ValueError(f"--{name} needs a value; got an empty one. Leave it out for the default.")


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_unknown(
    unknown: Sequence[str], known: Collection[str], *, command: str, instead: Callable[[str], str] = lambda _: ""
) -> None:
    """Refuse the first of the words that no option of a command is called by.

    Args:
        unknown: Words that the command does not understand.
        known: Names of its options.
        command: The command.
        instead: Gives a sentence on what there is in place of a name, or nothing.

    Raises:
        ValueError: If there is any.
    """
    if unknown:
        name = name_of_option(unknown[0])
        every = "--help_all" if command in TRAINING else "--help"
        raise ValueError(
            f"unknown option {unknown[0]}.{instead(name) or did_you_mean(name, known)} `ropo {command} {every}` lists "
            "all."
        )


def typed_as(command: str, words: Sequence[str]) -> str:
    """The command line as it can be typed again, without secrets."""
    return shlex.join(["ropo", command, *without_secrets(words)])


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words with `...` in place of a token: the report shows what was typed."""
    found: list[str] = []
    is_value = False
    for word in words:
        name, is_joined, _ = word.partition("=")
        is_secret = name.replace("-", "_").startswith("__") and name.replace("-", "_").endswith("_token")
        if is_secret and is_joined:
            found.append(f"{name}=...")
        else:
            found.append("..." if is_value else word)
        is_value = is_secret and not is_joined
    return found


def secrets_in(words: Sequence[str]) -> list[str]:
    """Values of tokens that stand on the command line, and of keys in the environment; longest first."""
    hidden = [given for given, shown in zip(words, without_secrets(words), strict=True) if given != shown]
    named = [value for name, value in os.environ.items() if name.endswith(("_KEY", "_TOKEN"))]
    found = [*(word.rpartition("=")[2] if word.startswith("--") else word for word in hidden), *named]
    return sorted({secret for secret in found if len(secret) >= 4}, key=len, reverse=True)
