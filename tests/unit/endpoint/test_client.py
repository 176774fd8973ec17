"""One request: what is tried again, what ends at once, how long it may take, and where the key must never be."""

import contextlib
import email.utils
import errno
import gzip
import http.server
import json
import logging
import pickle
import random
import shutil
import socket
import subprocess
import threading
import time
import traceback

import pytest

from ropo.endpoint.address import Endpoint
from ropo.endpoint.client import EndpointError, _tls, post_json

KEY = "sk-test/0123456789abcdef+secret"
OK = (200, {"answer": "yes"})


@pytest.fixture
def start(serve):
    """Starts servers that give the answers they were told, the last one for ever."""

    def start(certificate=None):
        def answer(_):
            return server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]

        server = serve(answer, certificate)
        server.answers = [OK]
        server.url += "/v1/chat/completions"
        return server

    return start


@pytest.fixture
def server(start):
    return start()


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    return KEY


class Waits(list):
    """Stands in for `time.sleep` and notes what it was asked."""

    def __call__(self, seconds):
        self.append(seconds)


def post(url, sleep=None, **options):
    options = {"api_key_env": "TEST_KEY", "timeout_seconds": 5.0, **options}
    sleep = Waits() if sleep is None else sleep
    return post_json(Endpoint(url=url, model="m", **options), "chat/completions", {"q": 1}, sleep=sleep)


def test_an_answer(server, key):
    assert post(server.url) == {"answer": "yes"}
    (request,) = server.requests
    assert request.body == {"q": 1}
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("name", [None, "", "TEST_KEY_THAT_IS_NOT_SET"])
def test_no_key_no_header(server, key, name):
    post(server.url, api_key_env=name)
    assert "Authorization" not in server.requests[0].headers


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_tried_again(server, status):
    server.answers = [(status, b"busy"), (status, b"busy"), OK]
    waits = Waits()
    assert post(server.url, waits) == {"answer": "yes"}
    assert len(server.requests) == 3
    assert 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0  # doubled, with a random part


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 405])
def test_a_refusal_ends_at_once(server, status):
    server.answers = [(status, b"you shall not pass"), OK]
    with pytest.raises(EndpointError, match=f"status {status}: 'you shall") as caught:
        post(server.url)
    assert len(server.requests) == 1
    assert (caught.value.status, caught.value.is_final) == (status, True)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"<html>", b'{"answer": "y', b"[1, 2]", b'{"answer": "\xff"}', b"[" * 100_000, b"9" * 5000],
    ids=["empty", "html", "cut short", "a list", "not UTF-8", "deep", "huge number"],
)
def test_garbage_is_tried_again(server, garbage):
    server.answers = [(200, garbage), OK]
    assert post(server.url) == {"answer": "yes"}
    server.answers = [(200, garbage)]
    with pytest.raises(EndpointError, match=r"status 200 .*JSON object") as caught:
        post(server.url)
    assert (caught.value.status, caught.value.is_final) == (200, False)
    assert len(str(caught.value)) < 600


def test_a_body_cut_short_is_tried_again(server):
    server.answers = [(200, b'{"answer": "y', {"Content-Length": "1000"}), OK]
    assert post(server.url) == {"answer": "yes"}
    server.answers = [(200, b"5\r\nab", {"Transfer-Encoding": "chunked"}), OK]
    assert post(server.url) == {"answer": "yes"}


def test_a_reset_connection_is_tried_again(server):
    def reset(handler):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        handler.connection.close()

    server.answers = [reset, lambda handler: handler.wfile.write(b"HELLO? WHO IS THERE?\r\n\r\n"), OK]
    assert post(server.url) == {"answer": "yes"}
    assert len(server.requests) == 3


def test_nobody_listens(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits = Waits()
    with pytest.raises(EndpointError, match=r"3 attempts and 300 seconds; .* attempt 3, none \(Conn.*ref"):
        post(f"http://127.0.0.1:{port}/v1", waits, max_retries=2)
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("error", "text", "is_final"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "name cannot be looked up", True),
        (socket.gaierror(socket.EAI_AGAIN, "later"), "name cannot be looked up", False),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "(Network is unreachable)", False),
        (UnicodeError("label too long"), "(UnicodeError)", False),
    ],
)
def test_the_network_fails(monkeypatch, key, error, text, is_final):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("socket.getaddrinfo", fail)
    waits = Waits()
    with pytest.raises(EndpointError) as caught:
        post("https://example.invalid/v1", waits, max_retries=1)
    assert text in str(caught.value)
    assert caught.value.is_final == is_final == (not waits)


def test_a_reply_that_is_not_http(server, key):
    """The client's error repeats what was sent; here that is the key."""
    server.answers = [lambda handler: handler.wfile.write(KEY.encode() + b"\r\n\r\n")]
    with pytest.raises(EndpointError, match=r"none \(RemoteProtocolError\)") as caught:
        post(server.url, max_retries=0)
    assert "0123456789" not in str(caught.value)


@pytest.fixture
def certificate(tmp_path):
    """Certificate and key of a server on this machine, signed by itself."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -days 2"
    where = ["-addext", "subjectAltName=DNS:localhost", "-out", paths[0], "-keyout", paths[1]]
    subprocess.run([*words.split(), *where], check=True, capture_output=True)
    return paths


@pytest.fixture
def tls_server(start, certificate):
    yield start(certificate)
    _tls.cache_clear()


def test_tls(tls_server, certificate, key, monkeypatch):
    """A certificate is trusted only if somebody says so, and the limits hold inside."""
    _tls.cache_clear()
    waits = Waits()
    with pytest.raises(EndpointError, match=r"certificate .*\(self.signed certificate\)"):
        post(tls_server.url, waits)
    assert waits == tls_server.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    _tls.cache_clear()
    assert post(tls_server.url) == {"answer": "yes"}
    assert tls_server.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    tls_server.answers = [trickle(threading.Event(), "body")]
    start = time.monotonic()
    with pytest.raises(EndpointError, match=r"none within 0\.3 seconds"):
        post(tls_server.url, timeout_seconds=0.3, max_retries=0)
    assert time.monotonic() - start < 2


def test_silence_has_a_limit(server):
    is_over = threading.Event()
    server.answers = [lambda _: is_over.wait(5), OK]
    start = time.monotonic()
    assert post(server.url, timeout_seconds=0.2) == {"answer": "yes"}
    server.answers = [lambda _: is_over.wait(5)]
    with pytest.raises(EndpointError, match=r"none within 0\.2 seconds"):
        post(server.url, timeout_seconds=0.2, max_retries=1)
    is_over.set()
    assert time.monotonic() - start < 2


def trickle(is_over, place):
    """An answer that never ends, byte by byte."""

    def answer(handler):
        if place == "body":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        with contextlib.suppress(OSError):
            while not is_over.wait(0.02):
                handler.wfile.write(b" " if place == "body" else b"X-Y: z\r\n")

    return answer


@pytest.mark.parametrize("place", ["body", "headers"])
def test_a_trickle_has_the_same_limit(server, place):
    """Each byte comes in time, so the client's own timeouts never end this."""
    is_over = threading.Event()
    server.answers = [trickle(is_over, place)]
    start = time.monotonic()
    with pytest.raises(EndpointError, match=r"none within 0\.2 seconds"):
        post(server.url, timeout_seconds=0.2, max_retries=0)
    is_over.set()
    assert time.monotonic() - start < 2


def test_the_wait_that_was_asked_for(server):
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    server.answers = [
        (429, b"", {"Retry-After": "7"}),
        (503, b"", {"Retry-After": date}),
        (429, b"", {"Retry-After": "soon"}),
        (429, b"", {"Retry-After": "-5"}),
        *[(429, b"", {"Retry-After": odd}) for odd in ("nan", "inf", "1e300")],
        OK,
    ]
    waits = Waits()
    assert post(server.url, waits, max_retries=7) == {"answer": "yes"}
    assert waits[0] == 7
    assert 15 < waits[1] <= 20
    assert waits[2] <= 2
    assert waits[3] <= 4
    assert max(waits[4:]) <= 30


def test_a_wait_longer_than_the_time_left_is_not_begun(server):
    server.answers = [(429, b"slow down", {"Retry-After": "3600"}), OK]
    waits = Waits()
    with pytest.raises(EndpointError, match=r"attempt 1, status 429: 'slow down' .*3600"):
        post(server.url, waits)
    assert waits == []


def test_the_time_of_all_attempts_is_limited(server):
    server.answers = [(500, b"")]
    start = time.monotonic()
    with pytest.raises(EndpointError, match=r"101 attempts and 0\.4 seconds"):
        post(server.url, sleep=time.sleep, timeout_seconds=0.4, max_total_seconds=0.4, max_retries=100)
    assert time.monotonic() - start < 2


def test_a_long_answer_is_not_read(server):
    server.answers = [(200, b" " * 5000)]
    with pytest.raises(EndpointError, match="more than 1000 bytes"):
        post(server.url, max_response_bytes=1000)
    assert len(server.requests) == 1
    server.answers = [(200, b'{"a": "' + b"b" * 991 + b'"}')]  # 1000 exactly
    assert len(post(server.url, max_response_bytes=1000)["a"]) == 991


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(start, server, key, status):
    other = start()
    server.answers = [(status, b"", {"Location": other.url + "?token=" + KEY})]
    with pytest.raises(EndpointError, match=f"status {status}, .*{other.url}, not followed") as caught:
        post(server.url)
    assert other.requests == []
    assert KEY not in str(caught.value)


def test_foreign_text_is_short_and_tame(server):
    server.answers = [(400, ("\x1b[31mred\n\nlines " + "x" * 500).encode())]
    with pytest.raises(EndpointError) as caught:
        post(server.url)
    text = str(caught.value)
    assert "?[31mred lines xxx" in text
    assert text.count("x") <= 200
    assert text.isprintable()


@pytest.mark.parametrize("status", [400, 401, 429, 500, 200])
def test_the_key_is_in_no_message(server, key, status, caplog):
    caplog.set_level(logging.DEBUG)
    echo = f"bad key Bearer {KEY} or {json.dumps(KEY)} or sk-test\\/0123456789abcdef+secret or " + "y" * 150 + KEY
    server.answers = [(status, echo.encode(), {"X-Echo": KEY})]
    with pytest.raises(EndpointError) as caught:
        post(server.url + "?hidden=query")
    said = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(pickle.dumps(caught.value))
    assert "[key]" in said
    assert "0123456789" not in said  # not even its beginning, where a long text is cut
    assert "hidden" not in str(caught.value) + caplog.text
    assert "X-Echo" not in str(caught.value)


def test_a_cut_leaves_no_part_of_the_key(server, key):
    for before in range(170, 201, 5):
        server.answers = [(400, b"y" * before + KEY.encode() + b"z" * 50)]
        with pytest.raises(EndpointError) as caught:
            post(server.url)
        assert "sk-" not in str(caught.value)


def test_the_key_is_in_no_answer(server, key):
    server.answers = [(200, {"echo": f"Bearer {KEY}"})]
    assert post(server.url) == {"echo": "Bearer [key]"}


def test_a_placeholder_is_a_word_like_others(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "EMPTY")
    server.answers = [(200, {"text": "EMPTY"})]
    assert post(server.url) == {"text": "EMPTY"}


@pytest.mark.parametrize("bad", ["sk-0123456789abc\nX-Evil: 1", "sk-0123456789abc def", "sk-0123456789abcé"])
def test_a_broken_key_is_refused_unseen(server, monkeypatch, bad):
    monkeypatch.setenv("TEST_KEY", bad)
    with pytest.raises(ValueError, match="TEST_KEY, with spaces") as caught:
        post(server.url)
    assert "0123456789" not in "".join(traceback.format_exception(caught.value))
    assert server.requests == []


def test_a_key_goes_unencrypted_to_no_other_machine(key):
    for host in ("example.invalid", "192.0.2.7", "localhost.example.invalid", "127.0.0.1.example.invalid"):
        with pytest.raises(ValueError, match=f"needs https .*http://{host}/v1"):
            post(f"http://{host}/v1")


def test_advice_says_whether_there_was_a_key(server, key):
    server.answers = [(401, b"no")]
    with pytest.raises(EndpointError, match=r"variable TEST_KEY\.$"):
        post(server.url)
    with pytest.raises(EndpointError, match=r"variable NOT_SET, .* not set\.$"):
        post(server.url, api_key_env="NOT_SET")
    with pytest.raises(EndpointError, match=r"none was sent\.$"):
        post(server.url, api_key_env=None)


def test_certificates_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    _tls.cache_clear()
    with pytest.raises(EndpointError, match=r"^HTTPS .*SSL_CERT_FILE") as caught:
        post("https://example.invalid/v1")
    assert caught.value.is_final


def test_a_packed_answer_is_not_unpacked(server):
    """A megabyte of it could be a gigabyte of text."""
    server.answers = [(200, gzip.compress(b'{"answer": "yes"}'), {"Content-Encoding": "gzip"}), OK]
    assert post(server.url) == {"answer": "yes"}
    assert len(server.requests) == 2
    assert server.requests[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("proxy", ["socks5://me:0123456789@127.0.0.1:9", "odd://me:0123456789@h", "http://[::"])
def test_a_proxy_that_cannot_be_used(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(EndpointError, match="needs a proxy") as caught:
        post("https://example.invalid/v1")
    assert "0123456789" not in "".join(traceback.format_exception(caught.value))


def test_the_proxy_of_the_environment_is_asked(server, monkeypatch, key):
    """It sees a host, and no key."""
    lines = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            lines.append((self.path, str(self.headers)))
            self.send_error(403)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        with pytest.raises(EndpointError):
            post("https://example.invalid/v1", max_retries=0)
        proxy.shutdown()
    ((where, headers),) = lines
    assert where == "example.invalid:443"
    assert "0123456789" not in headers


def test_a_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    assert post(server.url, max_retries=0) == {"answer": "yes"}


def test_an_error_survives_another_process():
    error = pickle.loads(pickle.dumps(EndpointError("no", status=404, is_final=True)))
    assert (str(error), error.status, error.is_final) == ("no", 404, True)


def test_waiting_leaves_the_seeded_generator_alone(server):
    random.seed(1)
    expected = random.Random(1).random()
    server.answers = [(500, b""), OK]
    post(server.url)
    assert random.random() == expected


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://me:pw@host", "http://host:99999999"])
def test_bad_addresses(url):
    with pytest.raises(ValueError, match=r"^Endpoint needs .*address"):
        Endpoint(url=url, model="m")


@pytest.mark.parametrize("options", [{"timeout_seconds": 0}, {"timeout_seconds": 400}, {"max_retries": -1}])
def test_bad_limits(options):
    with pytest.raises(ValueError, match="0 < timeout_seconds <= max_total_seconds"):
        post("http://127.0.0.1:9/", **options)
