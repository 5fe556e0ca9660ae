"""Addresses: what stays on this machine, what passes by proxies, and URLs that hold a secret."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import parse_qsl, urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SECRET = re.compile(r"(pass(word|wd|phrase)?|pwd|secret|token|key|(^|[-_])sig(nature)?)$", re.IGNORECASE)
_PASSWORD = re.compile(r"[^:/]*:[^@]+@")  # of SQLAlchemy: a password may hold a slash
_DATABASE_PASSWORDS = ("password", "sslpassword")


def is_loopback(host: str) -> bool:
    """Whether what goes there stays on this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def past_proxies() -> None:
    """No proxy of the environment carries what goes to this machine itself, for this process and those that it
    starts."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in LOOPBACK if host not in hosts]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


def holds_secret(url: str) -> bool:
    """Whether an endpoint's URL has a user, a password, or a parameter that is called like one."""
    address, _, query = url.partition("?")
    return "@" in address or any(_SECRET.search(name) for name, _ in parse_qsl(query, keep_blank_values=True))


def holds_database_password(url: str) -> bool:
    """Whether a database's URL has a password, in its place or as a parameter."""
    address, _, query = url.partition("://")[2].partition("?")
    parameters = {name for name, value in parse_qsl(query) if value}
    return bool(_PASSWORD.match(address)) or not parameters.isdisjoint(_DATABASE_PASSWORDS)


def travels_open(url: str) -> bool:
    """Whether whoever is on the way can read what is sent to an http(s) URL."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")
