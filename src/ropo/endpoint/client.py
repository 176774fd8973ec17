"""One JSON request to an OpenAI-compatible server, repeated while that can help.

In: an `Endpoint`, a JSON body. Out: the answer as a dict, or an `EndpointError` that says in one sentence what was
asked, what came back and what to do.

The one idea: a failure that may pass is tried again within a stated time; any other ends the call at once. The key is
read when a request is made and goes into its header and nowhere else: no object keeps it, no message or log holds it.
"""

import asyncio
import email.utils
import json
import logging
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx2

import ropo
from ropo.endpoint.address import (
    Endpoint,
    check_key,
    describe_key,
    is_this_machine,
    read_key,
    resource_url,
    shown,
    without_key,
    without_query,
)

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
_MAY_PASS = frozenset({408, 409, 425, 429})  # and 5xx; every other status but 2xx is final
_MIN_SECRET = 12  # characters; shorter keys are placeholders like EMPTY
_RANDOM = random.Random()  # waiting must not move the seeded generator that training draws from
_ADVICE = {
    401: "Check {key}.",
    403: "Check that {key} may use this model.",
    404: "Check the address and the name of the model.",
    413: "Send shorter texts.",
}
_OTHER_ADVICE = "Correct the request; asking again will not help."

# At level DEBUG the client logs headers, in which a server may repeat the key.
_is_ours: ContextVar[bool] = ContextVar("is_ours", default=False)
for _name in ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "proxy", "socks"))):
    logging.getLogger(_name).addFilter(lambda _: not _is_ours.get())


class EndpointError(RuntimeError):
    """A server gave no usable answer, and asking again now will not help.

    Attributes:
        status: HTTP status of the last answer; None if there was none.
        is_final: Whether the server refused; False if it could not be reached or was out of order for too long.
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


def post_json(
    endpoint: Endpoint, resource: str, body: Mapping[str, Any], *, sleep: Callable[[float], object] = time.sleep
) -> dict[str, Any]:
    """Post a JSON object and return the JSON object that comes back. Not for a thread that runs an event loop.

    Tried again, after waits that double from half a second to 30 and differ at random: refused, reset and silent
    connections, status 408, 409, 425, 429 and 5xx, answers that are cut short or not a JSON object. A longer wait that
    the server asks for (`Retry-After`) is granted if it fits into the time left. Anything else ends at once. Redirects
    are not followed, so the key goes to no other host. The proxies of the environment are used, but not for this
    machine itself.

    Args:
        endpoint: Where to, and how long to try.
        resource: For example "chat/completions".
        body: What to post.
        sleep: Waits between attempts; what it raises ends the call.

    Returns:
        The answer.

    Raises:
        EndpointError: If the server refuses, or gives no usable answer in the time and attempts it has.
        ValueError: If `body` is not JSON, or the key has become unusable.
    """
    url, content = resource_url(endpoint.url, resource), json.dumps(body, allow_nan=False).encode()
    until = time.monotonic() + endpoint.max_total_seconds
    number = 0
    while True:
        seconds = min(endpoint.timeout_seconds, max(until - time.monotonic(), 1e-3))
        answer = _attempt(endpoint, url, content, seconds)
        if not isinstance(answer, _Failure):
            return answer
        pause = max(answer.retry_after_seconds, _wait_seconds(number))
        number += 1
        if answer.is_final or number > endpoint.max_retries or pause >= until - time.monotonic():
            raise _error(endpoint, url, answer, num_attempts=number)
        sleep(pause)


def _error(endpoint: Endpoint, url: str, failure: _Failure, *, num_attempts: int) -> EndpointError:
    if failure.is_final:
        advice = _ADVICE.get(failure.status or 0, _OTHER_ADVICE).format(key=describe_key(endpoint.api_key_env))
        text = f"POST {without_query(url)} needs an answer; got {failure.what}. {advice}"
    else:
        asks = f" and the wish to wait {failure.retry_after_seconds:.0f} seconds" if failure.retry_after_seconds else ""
        text = (
            f"POST {without_query(url)} needs an answer within {endpoint.max_retries + 1} attempts and "
            f"{endpoint.max_total_seconds:g} seconds; got, at attempt {num_attempts}, {failure.what}{asks}. Check that "
            "the server is up, or ask again later."
        )
    return EndpointError(text, status=failure.status, is_final=failure.is_final)


def _attempt(endpoint: Endpoint, url: str, content: bytes, seconds: float) -> dict[str, Any] | _Failure:
    key_env, limit = endpoint.api_key_env, endpoint.max_response_bytes
    headers, tls = _headers(url, key_env), _tls()
    try:
        client = httpx2.AsyncClient(headers=headers, verify=tls, trust_env=not is_this_machine(url), timeout=None)
    except (ImportError, ValueError, httpx2.InvalidURL):  # their texts can hold the password of a proxy
        raise EndpointError(
            f"POST {without_query(url)} needs a proxy that can be used; got none in the environment variable "
            "HTTPS_PROXY, HTTP_PROXY or ALL_PROXY. Correct or unset it; one with SOCKS needs the package socksio.",
            is_final=True,
        ) from None
    try:
        status, headers, raw = asyncio.run(_exchange(client, url, content, seconds=seconds, max_bytes=limit))
    except (OSError, UnicodeError, httpx2.HTTPError) as error:
        return _no_answer(error, seconds)
    if len(raw) > limit:
        return _Failure(what=f"an answer of more than {limit} bytes", status=status, is_final=True)
    text = shown(without_key(raw.decode("utf-8", errors="replace"), key_env))
    if 200 <= status < 300:
        try:
            answer = json.loads(without_key(raw.decode("utf-8"), key_env, min_length=_MIN_SECRET))
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            return answer
        return _Failure(what=f"status {status} with something else than a JSON object: {text!r}", status=status)
    if 300 <= status < 400:
        target = shown(without_query(without_key(headers.get("Location") or "nowhere", key_env)))
        return _Failure(what=f"status {status}, a redirect to {target}, not followed", status=status, is_final=True)
    return _Failure(
        what=f"status {status}: {text!r}",
        status=status,
        is_final=status not in _MAY_PASS and status < 500,
        retry_after_seconds=_retry_after(headers.get("Retry-After")),
    )


async def _exchange(
    client: httpx2.AsyncClient, url: str, content: bytes, *, seconds: float, max_bytes: int
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of one answer; a body longer than `max_bytes` is not read to its end."""
    _is_ours.set(True)
    # One limit for everything: the client's own begin anew with every byte that trickles in.
    async with asyncio.timeout(seconds), client, client.stream("POST", url, content=content) as response:
        raw = bytearray()
        async for part in response.aiter_raw():
            raw += part
            if len(raw) > max_bytes:
                break
        return response.status_code, response.headers, bytes(raw)


def _no_answer(error: BaseException, seconds: float) -> _Failure:
    if isinstance(error, TimeoutError):
        return _Failure(what=f"none within {seconds:.3g} seconds")
    system = next((one for one in _causes(error) if isinstance(one, OSError) and one.errno), None)
    if isinstance(system, ssl.SSLCertVerificationError):
        return _Failure(what=f"a certificate that cannot be trusted ({system.verify_message})", is_final=True)
    if isinstance(system, socket.gaierror):
        is_unknown = system.errno == socket.EAI_NONAME
        return _Failure(what="none, since the host's name cannot be looked up", is_final=is_unknown)
    if system is None or isinstance(system, ssl.SSLError):  # a text can hold what was sent; its kind says enough
        return _Failure(what=f"none ({getattr(system, 'reason', None) or type(error).__name__})")
    return _Failure(what=f"none ({os.strerror(system.errno or 0)})")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception of the client and everything that it wraps."""
    while error is not None:
        yield error
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error.__context__


@cache
def _tls() -> ssl.SSLContext:
    try:
        return httpx2.create_ssl_context()
    except OSError as error:
        raise EndpointError(
            f"HTTPS needs certificates to trust; got {error.strerror or error} from the environment variable "
            "SSL_CERT_FILE or SSL_CERT_DIR. Correct or unset it.",
            is_final=True,
        ) from None


def _headers(url: str, api_key_env: str | None) -> Mapping[str, str]:
    check_key(url, api_key_env, what="post_json")  # the environment may have changed since the endpoint was made
    key = read_key(api_key_env)
    return {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "identity",  # the limit on an answer's length is one on what is read
        "User-Agent": f"ropo/{ropo.__version__}",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }


def _wait_seconds(number: int) -> float:
    longest: float = min(_FIRST_WAIT_SECONDS * 2**number, _LONGEST_WAIT_SECONDS)
    return longest * _RANDOM.uniform(0.5, 1.0)


def _retry_after(value: str | None) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or as a date; 0 for none or nonsense."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if 0.0 < seconds < 1e9 else 0.0
