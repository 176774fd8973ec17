"""Which addresses are refused, and that no message shows what may be a secret."""

import re

import pytest

from ropo.endpoint.address import check_url, is_this_machine, resource_url

KEY = "sk-test/0123456789abcdef+secret"


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host/x", "http://", "http://host:99999999/v1", "http://host/a b", "http://host/#x"],
)
def test_bad_addresses(url):
    with pytest.raises(ValueError, match=r"^judge_url needs "):
        check_url(url, what="judge_url")


def test_secrets_in_addresses_are_not_shown():
    for url, match in (
        ("https://me:0123456789@host/v1", "without user name and password; got one for host"),
        ("https://0123456789@host/v1", "without user name and password; got one for host"),
        (f"https://me:{KEY}@host/v1", "needs a valid address"),  # its slash ends the host
        ("sk-0123456789", "got 13 characters without one"),
        ("ftp://host/?q=0123456789", "got 'ftp://host/'"),
        ("https://host/?api_key=0123456789", "without a key in it; got one for host"),
        ("https://host/?a=1&Sig=0123456789", "without a key in it; got one for host"),
    ):
        with pytest.raises(ValueError, match=re.escape(match)) as caught:
            check_url(url, what="judge_url")
        assert "0123456789" not in str(caught.value)


def test_resources():
    assert resource_url("http://h/v1/", "chat/completions") == "http://h/v1/chat/completions"
    assert resource_url("http://h?api-version=1", "completions") == "http://h/v1/completions?api-version=1"


@pytest.mark.parametrize(
    ("url", "is_local"),
    [
        ("http://localhost:8000/v1", True),
        ("http://model.localhost/v1", True),
        ("http://127.0.0.5/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost.example.com/v1", False),
        ("http://192.168.0.1/v1", False),
    ],
)
def test_this_machine(url, is_local):
    assert is_this_machine(url) == is_local
