"""What stays on this machine is told from what does not, and goes past proxies; secrets in URLs are seen."""

from __future__ import annotations

import os

import pytest
import requests

from dprlhf_ray.network import holds_database_password, holds_secret, is_loopback, past_proxies, travels_open


def test_loopback_is_this_machine_and_nothing_that_looks_like_it() -> None:
    assert all(is_loopback(h) for h in ("127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost", "LOCALHOST"))
    others = ("", "0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", "host")
    assert not any(is_loopback(h) for h in others)
    assert travels_open("http://head:8265") and travels_open("http://0.0.0.0:8265")
    assert not travels_open("https://head:8265") and not travels_open("http://127.0.0.1:8265")


@pytest.mark.parametrize(
    ("variable", "given", "expected"),
    [
        (None, "", "127.0.0.1,localhost,::1"),
        ("NO_PROXY", "corp.example, localhost", "corp.example,localhost,127.0.0.1,::1"),
        ("no_proxy", "*", "*"),
    ],
)
def test_no_proxy_carries_what_stays_here(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, given: str, expected: str
) -> None:
    """False: a proxy of the environment gets the cluster's token from `dprlhf submit`."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    if variable:
        monkeypatch.setenv(variable, given)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    past_proxies()
    past_proxies()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected
    for url in ("http://127.0.0.1:8265/api", "http://localhost:8265/api"):
        assert requests.utils.get_environ_proxies(url) == {}
    assert bool(requests.utils.get_environ_proxies("http://head.example:8265")) == (expected != "*")


def test_secrets_in_urls_are_seen() -> None:
    for url in (
        "https://u:p@h/",
        "https://u@h/",
        "https://h/?Api-Key=x",
        "https://h/?access_token=x",
        "https://h/?sig=x",
        "https://h/?accessToken=x&passwd=y",
        "https://h/?db_passphrase=x",
        "https://h/?X-Amz-Signature=x",
    ):
        assert holds_secret(url), url
    fine = (
        "https://h:1/a?version=2&design=x",
        "http://127.0.0.1/",
        "https://h/?q=a@b",
        "https://h/?max_tokens=9&keywords=x",
    )
    for url in fine:
        assert not holds_secret(url), url
    for url in (
        "postgresql://u:p@h/n",
        "postgresql://u:p/q@h/n",
        "postgresql://h/n?password=p",
        "postgresql://u:p@/n?host=/s",
    ):
        assert holds_database_password(url), url
    for url in ("postgresql://u@h:5432/n", "postgresql://u:@/n?host=/s", "postgresql://u@[::1]:5432/n", "/a:b@c.db"):
        assert not holds_database_password(url), url
