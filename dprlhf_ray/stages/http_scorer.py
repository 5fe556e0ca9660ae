"""Rewards by an endpoint: one record per request. The text leaves the cluster, beyond the guarantee."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from dprlhf_ray.errors import ConfigError, DprlhfError
from dprlhf_ray.network import travels_open

TOKEN = "DPRLHF_SCORER_TOKEN"  # environment variable of the scorer's process, sent as a bearer token
TIMEOUT = 60.0  # seconds of silence
PAUSES = (0.5, 2.0, 8.0)  # seconds before each repetition
_AT_ONCE = 8
PROBE = ("Is anybody there?", " Yes.")  # public: tells a dead endpoint from a record that it cannot take
_OF_THE_RECORD = {400, 413, 414, 422}


class ScorerGone(DprlhfError):
    """An endpoint or a device gives no answer, whatever the record: the step is abandoned."""


class _NoRedirect(HTTPRedirectHandler):
    """The text goes to the declared URL and nowhere else; so no proxy of the environment is used either."""

    def redirect_request(self, *_: Any) -> None:
        return None


class HttpScorer:
    """POST {"prompt", "completion"} as JSON; the answer is {"reward": number}.

    A record is refused (None) by one of the statuses 400, 413, 414 and 422, or by an answer of another form. Silence,
    no connection and every other status are repeated. Where they stay, the record is asked once more between two fixed
    public ones: if the endpoint answers both of these and not the record, it is the record's own failure (None). If it
    does not answer them, ScorerGone is raised. One answer would not do: the endpoint may have come back just then.
    """

    def __init__(self, url: str) -> None:
        self._url, self._opener = url, build_opener(ProxyHandler({}), _NoRedirect)
        self._headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            self._headers["Authorization"] = f"Bearer {token}"

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._score, pairs))

    def _score(self, pair: tuple[str, str]) -> float | None:
        reward, reason = self._ask(pair)
        if reason is None:
            return reward
        before = self._ask(PROBE)[1]
        reward, again = self._ask(pair) if before is None else (None, reason)
        if again is not None and (before is not None or self._ask(PROBE)[1] is not None):
            raise ScorerGone(f"scorer.url: {urlsplit(self._url).hostname} gives no reward ({reason})") from None
        return reward

    def _ask(self, pair: tuple[str, str]) -> tuple[float | None, str | None]:
        """(reward, None), (None, None) where the record was refused, or (None, why there is no answer)."""
        body = json.dumps({"prompt": pair[0], "completion": pair[1]}).encode()
        reason = "no answer"
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            try:
                request = Request(self._url, body, self._headers)
                with self._opener.open(request, timeout=TIMEOUT) as answer:
                    return _reward(answer.read()), None
            except HTTPError as e:
                e.close()
                if e.code in _OF_THE_RECORD:
                    return None, None
                reason = f"status {e.code}"
            except (OSError, HTTPException) as e:
                reason = type(e).__name__  # never its text
        return None, reason


def _reward(answer: bytes) -> float | None:
    try:
        return float(json.loads(answer)["reward"])
    except Exception:  # whatever the endpoint makes of this record
        return None


def check_url(url: str) -> None:
    """Refuse what is no http(s) URL, and http to another machine.

    Raises:
        ConfigError: without the URL, which may hold a password.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        good = good and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            "scorer.url: no URL of an endpoint: write https://host/path, or http://127.0.0.1:port/path on this machine"
        )
    if travels_open(url):
        raise ConfigError(
            f"scorer.url: prompts and completions would travel to {parts.hostname} unencrypted: use https (http is for "
            "this machine only)"
        )
