"""Rewards: public functions of one record's text.

A scorer is stateless: its value for a record depends on that record's prompt and completion only. Novelty bonuses,
caches and running normalisers would couple records and break the per-unit bound that clipping gives.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from dprlhf_ray.config import ScorerConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy.private import PrivateNumber


class Scorer(Protocol):
    """The reward of one completion: a float, higher is better."""

    def score(self, prompt_text: str, completion_text: str) -> float: ...


class SentimentRule:
    """VADER's compound score of the completion, in [-1, 1] (Hutto and Gilbert, ICWSM 2014; about 1.6 ms a text)."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, prompt_text: str, completion_text: str) -> float:
        return float(self._analyzer.polarity_scores(completion_text)["compound"])


class PythonFunction:
    """A user's function (prompt, completion) -> float; it has to be stateless."""

    def __init__(self, function: Callable[[str, str], float]) -> None:
        self._function = function

    def score(self, prompt_text: str, completion_text: str) -> float:
        return float(self._function(prompt_text, completion_text))


def build_scorer(config: ScorerConfig) -> Scorer:
    """The scorer that the config names.

    Raises:
        ConfigError: kind python and the function cannot be imported or called.
    """
    if config.kind == "python":
        return PythonFunction(load_function(config.function or ""))
    return SentimentRule()


def load_function(name: str) -> Callable[[str, str], float]:
    """Import "package.module:function"; the working directory is searched too, after everything installed.

    Raises:
        ConfigError: the name has another form, the import fails, or there is no such function.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f'scorer.function: write {name!r} as "package.module:function"')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # the user's module runs here and may raise anything
        reason = " ".join(str(e).split())
        raise ConfigError(f"scorer.function: module {module_name!r} cannot be imported ({reason})") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"scorer.function: module {module_name!r} has no function {attribute!r}")
    return function


def score_records(scorer: Scorer, pairs: Sequence[tuple[str, str]], bound: float) -> list[PrivateNumber | None]:
    """Score (prompt, completion) pairs one by one, clipped to [-bound, bound].

    An error or a value that is not finite gives None for that pair and touches no other; its unit then contributes
    exactly zero. Nothing about it is logged: an exception's text may quote the record.
    """
    return [_score_one(scorer, prompt, completion, bound) for prompt, completion in pairs]


def _score_one(scorer: Scorer, prompt: str, completion: str, bound: float) -> PrivateNumber | None:
    try:
        value = float(scorer.score(prompt, completion))
    except Exception:  # a user's function may raise anything on its record, and must not touch the others
        return None
    return PrivateNumber(max(-bound, min(bound, value))) if math.isfinite(value) else None
