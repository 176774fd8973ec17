"""One JSON request to an OpenAI-compatible server, repeated while there is hope, with the standard library alone.

In: an address, a JSON body, the name of the environment variable that holds the key. Out: the answer as a dict, or an
`EndpointError` that says in one sentence what was asked, what came back and what to do.

The one idea: what may pass is tried again within a stated time; what will not pass is said at once. The key is read
when a request is made, goes into its header and nowhere else: no object keeps it and no message holds it.
"""

import contextlib
import email.utils
import http.client
import ipaddress
import json
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import cache
from typing import Any

import ropo

ASKING = "ropo-asking"  # how threads are called that wait for an answer
_GRACE_SECONDS = 3.0  # for answers that are on their way when a user or a scheduler wants the process to end
_MAX_RESPONSE_BYTES = 32 * 2**20
_MAX_SHOWN = 200  # characters of an answer in a message
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
_MAY_PASS = frozenset({408, 409, 425, 429})  # and 5xx; every other status but 2xx is final
_MIN_SECRET = 12  # characters; shorter "keys" are placeholders like EMPTY, and may be words of an answer

_SECRET_NAME = re.compile("key|token|secret|sig|password|auth", re.IGNORECASE)  # parameters of an address

_RANDOM = random.Random()  # of our own: waiting must not move the seeded generator that training draws from

_ADVICE = {
    401: "Check {key}.",
    403: "Check that {key} may use this model.",
    404: "Check the address and the name of the model.",
    413: "Send shorter texts.",
}
_OTHER_ADVICE = "Correct the request; asking again will not help."


class EndpointError(RuntimeError):
    """A server gave no usable answer, and asking again now will not help.

    Attributes:
        status: HTTP status of the last answer; None if there was none.
        is_final: Whether the server refused; False if it was merely out of reach or out of order for too long.
    """

    def __init__(self, message: str, *, status: int | None = None, is_final: bool = False) -> None:
        super().__init__(message)
        self.status, self.is_final = status, is_final


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Why one attempt gave nothing, in words that fit after "got"."""

    what: str
    status: int | None = None
    is_final: bool = False
    retry_after_seconds: float = 0.0


def check_url(url: str, *, what: str) -> None:
    """Refuse an address that could not be asked, or that carries a secret: addresses are logged and written.

    Args:
        url: The address.
        what: Who needs it, for the message.

    Raises:
        ValueError: If it is not http or https with a host, or holds white space, a fragment, a user name, a password or
            a parameter that looks like a key.

    Examples:
        >>> check_url("https://api.example.com/v1", what="judge_url")
        >>> check_url("file:///etc/passwd", what="judge_url")
        Traceback (most recent call last):
        ValueError: judge_url needs an http:// or https:// address; got 'file:///etc/passwd'. Give one like http://localhost:8000/v1.
    """
    advice = "Give one like http://localhost:8000/v1."
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ValueError(f"{what} needs a valid address; got one with a bad host or port. {advice}") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"{what} needs an address without user name and password; got one for {parts.hostname}. Put the key into "
            "an environment variable."
        )
    if any(_SECRET_NAME.search(name) for name, _ in urllib.parse.parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError(
            f"{what} needs an address without a key in it; got one for {parts.hostname} with a key among its "
            "parameters. Put the key into an environment variable."
        )
    if parts.scheme not in ("http", "https") or not has_host or parts.fragment or not _is_plain(url):
        # What has no "://" may be anything, even a key in the wrong place.
        got = repr(_shown(_place(url))) if "://" in url else f"{len(url)} characters without one"
        raise ValueError(f"{what} needs an http:// or https:// address; got {got}. {advice}")


def check_key(url: str, api_key_env: str | None, *, what: str) -> None:
    """Refuse a key that could not be sent, or only where others can read it.

    Args:
        url: The address.
        api_key_env: Environment variable that may hold a key.
        what: Who needs it, for the message.

    Raises:
        ValueError: If the variable holds something that is no key, or the key would go unencrypted to another machine.
    """
    key = _key(api_key_env)
    if not _is_plain(key):
        raise ValueError(
            f"{what} needs a key of plain characters; got {_named(api_key_env)}, with spaces, line ends or letters "
            "that no key has. Set it again."
        )
    if key and urllib.parse.urlsplit(url).scheme != "https" and not _is_this_machine(url):
        raise ValueError(
            f"{what} needs https to send a key to another machine; got {_place(url)} and {_named(api_key_env)}. "
            "Use https; if the server needs no key, name a variable that is not set."
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
    """Address of a resource below a base address, in whichever of the usual ways the base was written.

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


def stop_asking(pool: Executor, futures: Iterable[Future[Any]], error: BaseException) -> None:
    """Begin no further request, and let those that run come to their end; not for long where someone waits.

    Args:
        pool: Whose threads ask.
        futures: Everything that was submitted to it.
        error: Why.
    """
    pool.shutdown(wait=False, cancel_futures=True)
    running = [future for future in futures if not future.cancelled()]  # `wait` would wait for the others, too
    wait(running, timeout=_GRACE_SECONDS if isinstance(error, KeyboardInterrupt) else None)


def post_json(
    url: str,
    body: Mapping[str, Any],
    *,
    api_key_env: str | None = "OPENAI_API_KEY",
    timeout_seconds: float = 60.0,
    max_retries: int = 5,
    max_total_seconds: float = 300.0,
    max_response_bytes: int = _MAX_RESPONSE_BYTES,
    sleep: Callable[[float], object] = time.sleep,
) -> dict[str, Any]:
    """Post a JSON object and return the JSON object that comes back.

    Tried again, after waits that double from half a second to 30 and differ at random: refused, reset and silent
    connections, status 408, 409, 425, 429 and 5xx, answers that are cut short or not a JSON object. A longer wait that
    the server asks for (`Retry-After`) is granted if it fits into the time left. Anything else ends at once. Redirects
    are not followed, so the key goes to no other host. The proxies of the environment are used, but not for this
    machine itself.

    Args:
        url: Whole address, http or https.
        body: What to post.
        api_key_env: Environment variable with the key, sent as a bearer token. None, "" or an unset variable: no key is
            sent, as local servers like it.
        timeout_seconds: Longest time of one attempt, from the connection (looking up the name not counted) to the last
            byte.
        max_retries: Most attempts after the first.
        max_total_seconds: Longest time of all attempts and waits together.
        max_response_bytes: Longest answer.
        sleep: Waits between attempts; what it raises ends the call.

    Returns:
        The answer.

    Raises:
        EndpointError: If the server refuses, or gives no usable answer in the time and attempts it has.
        ValueError: If the address or a limit is unusable, `body` is not JSON, or a key would go unencrypted to another
            machine.
    """
    check_url(url, what="post_json")
    if not 0 < timeout_seconds <= max_total_seconds or max_retries < 0:
        raise ValueError(
            "post_json needs 0 < timeout_seconds <= max_total_seconds and max_retries of 0 or more; got "
            f"{timeout_seconds}, {max_total_seconds} and {max_retries}. A longer attempt needs more time in all."
        )
    data = json.dumps(body, allow_nan=False).encode()
    until = time.monotonic() + max_total_seconds
    for number in range(max_retries + 1):
        seconds = min(timeout_seconds, max(until - time.monotonic(), 1e-3))
        found = _attempt(url, data, api_key_env, seconds=seconds, max_bytes=max_response_bytes)
        if not isinstance(found, _Failure):
            return found
        failure = found
        if failure.is_final:
            advice = _ADVICE.get(failure.status or 0, _OTHER_ADVICE).format(key=_named(api_key_env))
            raise EndpointError(
                f"POST {_place(url)} needs an answer; got {failure.what}. {advice}",
                status=failure.status,
                is_final=True,
            )
        wait = max(failure.retry_after_seconds, _wait_seconds(number))
        if number == max_retries or wait >= until - time.monotonic():
            break
        sleep(wait)
    asks = f" and the wish to wait {failure.retry_after_seconds:.0f} seconds" if failure.retry_after_seconds else ""
    raise EndpointError(
        f"POST {_place(url)} needs an answer within {max_retries + 1} attempts and {max_total_seconds:g} seconds; got, "
        f"at attempt {number + 1}, {failure.what}{asks}. Check that the server is up, or ask again later.",
        status=failure.status,
    )


def _attempt(
    url: str, data: bytes, api_key_env: str | None, *, seconds: float, max_bytes: int
) -> dict[str, Any] | _Failure:
    try:
        status, headers, raw = _exchange(url, data, api_key_env, seconds=seconds, max_bytes=max_bytes)
    except (OSError, http.client.HTTPException) as error:
        return _no_answer(error, seconds)
    if len(raw) > max_bytes:
        return _Failure(what=f"an answer of more than {max_bytes} bytes", status=status, is_final=True)
    text = _shown(_without_key(raw.decode("utf-8", errors="replace"), api_key_env))
    if 200 <= status < 300:
        try:
            answer = json.loads(_without_key(raw.decode("utf-8"), api_key_env, spare_shorter_than=_MIN_SECRET))
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            return answer
        return _Failure(what=f"status {status} with something else than a JSON object: {text!r}", status=status)
    if 300 <= status < 400:
        target = _shown(_place(_without_key(headers.get("Location") or "nowhere", api_key_env)))
        return _Failure(what=f"status {status}, a redirect to {target}, not followed", status=status, is_final=True)
    return _Failure(
        what=f"status {status}: {text!r}",
        status=status,
        is_final=status not in _MAY_PASS and status < 500,
        retry_after_seconds=_retry_after(headers.get("Retry-After")),
    )


def _no_answer(error: Exception, seconds: float) -> _Failure:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return _Failure(what=f"none within {seconds:.3g} seconds")
    if isinstance(error, ssl.SSLCertVerificationError):
        return _Failure(what=f"a certificate that cannot be trusted ({error.verify_message})", is_final=True)
    if isinstance(error, socket.gaierror):
        is_unknown = error.errno == socket.EAI_NONAME
        return _Failure(what="none, since the host's name cannot be looked up", is_final=is_unknown)
    # The text of an HTTPException can hold what was sent; its kind says enough.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return _Failure(what=f"none ({reason})")


def _exchange(
    url: str, data: bytes, api_key_env: str | None, *, seconds: float, max_bytes: int
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of one answer; up to one byte more than `max_bytes` is read."""
    request = urllib.request.Request(url, data=data, headers=_headers(url, api_key_env), method="POST")
    watch = _Watch(seconds)
    # Neither error handling nor redirects: every status comes back as it is.
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler({} if _is_this_machine(url) else None))
    opener.add_handler(_WatchedHTTP(watch))
    opener.add_handler(_WatchedHTTPS(watch))
    try:
        with opener.open(request, timeout=seconds) as response:
            raw = bytearray()
            while len(raw) <= max_bytes and (part := response.read(min(2**16, max_bytes + 1 - len(raw)))):
                raw += part
            status, headers = response.status, response.headers
    except (OSError, http.client.HTTPException):
        if watch.has_ended:
            raise TimeoutError from None
        raise
    finally:
        watch.close()
    if watch.has_ended:
        raise TimeoutError
    return status, headers, bytes(raw)


class _Watch:
    """Ends an exchange at its deadline: a socket's own timeout begins anew with every byte that trickles in."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._timer: threading.Timer | None = None
        self.has_ended = False

    def attach(self, connection: http.client.HTTPConnection) -> http.client.HTTPConnection:
        """Watch the socket of `connection` from when it is connected."""
        connect = connection.connect

        def connect_watched() -> None:
            connect()
            self._timer = threading.Timer(max(self._until - time.monotonic(), 0.0), self._end, [connection.sock])
            self._timer.daemon = True
            self._timer.start()

        connection.connect = connect_watched  # type: ignore[method-assign]
        return connection

    def _end(self, connected: socket.socket) -> None:
        self.has_ended = True
        with contextlib.suppress(OSError):  # the exchange has just ended by itself
            socket.socket.shutdown(connected, socket.SHUT_RDWR)  # below TLS, which another thread is using

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class _WatchedHTTP(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        def make(host: str, **options: Any) -> http.client.HTTPConnection:
            return self._watch.attach(http.client.HTTPConnection(host, **options))

        return self.do_open(make, req)


class _WatchedHTTPS(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__(context=_tls())
        self._watch = watch

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        def make(host: str, **options: Any) -> http.client.HTTPConnection:
            return self._watch.attach(http.client.HTTPSConnection(host, context=_tls(), **options))

        return self.do_open(make, req)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _headers(url: str, api_key_env: str | None) -> dict[str, str]:
    check_key(url, api_key_env, what="post_json")
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": f"ropo/{ropo.__version__}",
    }
    key = _key(api_key_env)
    return {**headers, "Authorization": f"Bearer {key}"} if key else headers


def _key(api_key_env: str | None) -> str:
    return os.environ.get(api_key_env, "").strip() if api_key_env else ""


def _named(api_key_env: str | None) -> str:
    """Where the key is kept, for messages."""
    if not api_key_env:
        return "the key, of which none was sent"
    return f"the key in the environment variable {api_key_env}" + ("" if _key(api_key_env) else ", which is not set")


def _without_key(text: str, api_key_env: str | None, *, spare_shorter_than: int = 1) -> str:
    """`text` with the key struck out, whether written plainly, in JSON or in an address."""
    key = _key(api_key_env)
    if len(key) < spare_shorter_than:
        return text
    for form in {key, json.dumps(key)[1:-1], key.replace("/", "\\/"), urllib.parse.quote(key, safe="")}:
        text = text.replace(form, "[key]")
    return text


def _is_this_machine(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _place(url: str) -> str:
    """The address without its query, which may hold a secret."""
    return url.partition("?")[0].partition("#")[0]


def _shown(text: str) -> str:
    """The beginning of a foreign text, on one line and without control characters."""
    words = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in words[:_MAX_SHOWN])


def _wait_seconds(number: int) -> float:
    longest: float = min(_FIRST_WAIT_SECONDS * 2**number, _LONGEST_WAIT_SECONDS)
    return longest * _RANDOM.uniform(0.5, 1.0)


def _retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or as a date; 0 for none or nonsense."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if 0.0 < seconds < 1e9 else 0.0
