"""Where requests go and which key may go with them. Nothing here opens a connection.

In: an address, the name of the environment variable that holds the key. Out: an `Endpoint`, or a refusal in one
sentence.

The one idea: addresses are logged and written to files, so no address may hold a key, and a key is read from the
environment only where it is needed.
"""

import ipaddress
import json
import os
import re
import urllib.parse
from dataclasses import dataclass

import httpx2

_SECRET_NAME = re.compile("key|token|secret|sig|password|auth", re.IGNORECASE)  # parameters of an address
_MAX_SHOWN = 200  # characters of a foreign text in a message
_ADVICE = "Give one like http://localhost:8000/v1."
_PUT_KEY = "Put the key into an environment variable."


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A model behind an OpenAI-compatible address, and how long to try.

    Attributes:
        url: Base address of the server, as `resource_url` takes it.
        model: Name of the model there.
        api_key_env: Environment variable with the key, sent as a bearer token. None, "" or an unset variable: no key is
            sent, as local servers like it.
        timeout_seconds: Longest time of one attempt, up to the last byte; looking up the host's name is not counted.
        max_retries: Most attempts after the first.
        max_total_seconds: Longest time of all attempts and waits together.
        max_response_bytes: Longest answer.

    Raises:
        ValueError: If the address or a limit cannot be used, or the key cannot be sent there.
    """

    url: str
    model: str
    api_key_env: str | None = "OPENAI_API_KEY"
    timeout_seconds: float = 60.0
    max_retries: int = 5
    max_total_seconds: float = 300.0
    max_response_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        check_url(self.url, what="Endpoint")
        check_key(self.url, self.api_key_env, what="Endpoint")
        if not 0 < self.timeout_seconds <= self.max_total_seconds or self.max_retries < 0:
            raise ValueError(
                "Endpoint needs 0 < timeout_seconds <= max_total_seconds and max_retries of 0 or more; got "
                f"{self.timeout_seconds}, {self.max_total_seconds} and {self.max_retries}. A longer attempt needs more "
                "time in all."
            )


def check_url(url: str, *, what: str) -> None:
    """Refuse an address that cannot be used or that holds a secret.

    Args:
        url: The address.
        what: The option or object that needs it, for the message.

    Raises:
        ValueError: If it is not http or https with a host, or holds white space, a fragment, a user name, a password or
            a parameter that looks like a key.

    Examples:
        >>> check_url("https://api.example.com/v1", what="judge_url")
        >>> check_url("file:///etc/passwd", what="judge_url")
        Traceback (most recent call last):
        ValueError: judge_url needs an http:// or https:// address; got 'file:///etc/passwd'. Give one like http://localhost:8000/v1.
    """
    bad = f"{what} needs an http:// or https:// address"
    if "://" not in url:  # it may be anything, even a key in the wrong place
        raise ValueError(f"{bad}; got {len(url)} characters without one. {_ADVICE}")
    try:
        parts = httpx2.URL(url)
        is_valid = parts.port is None or 0 < parts.port < 2**16
    except (httpx2.InvalidURL, ValueError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"{what} needs a valid address; got one with a bad host or port. {_ADVICE}")
    if parts.userinfo:
        raise ValueError(
            f"{what} needs an address without user name and password; got one for {parts.host}. {_PUT_KEY}"
        )
    if any(_SECRET_NAME.search(name) for name in parts.params):
        raise ValueError(
            f"{what} needs an address without a key in it; got one for {parts.host} with a key among its parameters. "
            f"{_PUT_KEY}"
        )
    if parts.scheme not in ("http", "https") or not parts.host or parts.fragment or not _is_plain(url):
        raise ValueError(f"{bad}; got {shown(without_query(url))!r}. {_ADVICE}")


def check_key(url: str, api_key_env: str | None, *, what: str) -> None:
    """Refuse a key that cannot be sent, or that others could read on its way.

    Args:
        url: The address.
        api_key_env: Environment variable that may hold a key.
        what: The option or object that needs it, for the message.

    Raises:
        ValueError: If the variable holds something that is no key, or the key would go unencrypted to another machine.
    """
    key = read_key(api_key_env)
    if not _is_plain(key):
        raise ValueError(
            f"{what} needs a key of plain characters; got {describe_key(api_key_env)}, with spaces, line ends or "
            "letters that no key has. Set it again."
        )
    if key and not url.startswith("https:") and not is_this_machine(url):
        raise ValueError(
            f"{what} needs https to send a key to another machine; got {without_query(url)} and "
            f"{describe_key(api_key_env)}. Use https; if the server needs no key, name a variable that is not set."
        )


def check_access(url: str | None, api_key_env: str | None, *, url_option: str, key_option: str) -> None:
    """Check the two options that say how a server is reached.

    Options are logged and written; a key that was put into one by mistake must not even be in the message.

    Args:
        url: The address; None if there is none.
        api_key_env: Name of an environment variable; None for no key.
        url_option: What the address is called.
        key_option: What the name of the variable is called.

    Raises:
        ValueError: If the name is none, or as `check_url` and `check_key`.
    """
    if api_key_env and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", api_key_env):
        raise ValueError(
            f"{key_option} needs the name of an environment variable in capitals, like OPENAI_API_KEY; got "
            f"{len(api_key_env)} other characters. Put the key into a variable and give its name."
        )
    if url is not None:
        check_url(url, what=url_option)
        check_key(url, api_key_env, what=url_option)


def resource_url(base_url: str, resource: str) -> str:
    """Address of a resource below a base address.

    Args:
        base_url: With or without `/v1`, a slash at its end, or the resource itself.
        resource: For example "chat/completions".

    Returns:
        The whole address; a query stays at its end.

    Examples:
        >>> resource_url("http://localhost:8000", "completions")
        'http://localhost:8000/v1/completions'
        >>> resource_url("http://localhost:8000/api/v2/", "completions")
        'http://localhost:8000/api/v2/completions'
        >>> resource_url("http://localhost:8000/v1/completions", "completions")
        'http://localhost:8000/v1/completions'
    """
    parts = urllib.parse.urlsplit(base_url)
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith(f"/{resource}"):
        path = f"{path}/{resource}"
    return urllib.parse.urlunsplit(parts._replace(path=path))


def is_this_machine(url: str) -> bool:
    """Whether the host is a loopback address."""
    host = httpx2.URL(url).host
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(api_key_env: str | None) -> str:
    """The key in an environment variable; empty for None, "" and a variable that is not set."""
    return os.environ.get(api_key_env, "").strip() if api_key_env else ""


def describe_key(api_key_env: str | None) -> str:
    """Where the key is kept, for messages."""
    if not api_key_env:
        return "the key, of which none was sent"
    return f"the key in the environment variable {api_key_env}" + (
        "" if read_key(api_key_env) else ", which is not set"
    )


def without_key(text: str, api_key_env: str | None, *, min_length: int = 1) -> str:
    """`text` with the key replaced, whether it stands there as it is, in JSON or in an address.

    Args:
        text: A foreign text.
        api_key_env: Environment variable with the key.
        min_length: Shorter keys are left alone: placeholders like EMPTY, which may be words of an answer.
    """
    key = read_key(api_key_env)
    if len(key) < min_length:
        return text
    for form in {key, json.dumps(key)[1:-1], key.replace("/", "\\/"), urllib.parse.quote(key, safe="")}:
        text = text.replace(form, "[key]")
    return text


def without_query(url: str) -> str:
    """The address without its query, which may hold a secret."""
    return url.partition("?")[0].partition("#")[0]


def shown(text: str) -> str:
    """The beginning of a foreign text, on one line and without control characters."""
    words = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in words[:_MAX_SHOWN])


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text
