"""Rewards: public functions of one record's text.

A scorer is stateless: its value for a record depends on that record's prompt and completion only. Novelty bonuses,
caches and running normalisers would couple records and break the per-unit bound that clipping gives.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dprlhf_ray.config import ScorerConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy.private import PrivateNumber
from dprlhf_ray.stages.classifier_files import check_classifier
from dprlhf_ray.stages.http_scorer import HttpScorer, check_url


class Scorer(Protocol):
    """Rewards of (prompt, completion) texts, higher is better: one per pair, in their order.

    None: that pair made the scorer fail, which touches no other. What is nobody's record's fault raises.
    """

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]: ...


class PythonFunction:
    """A function (prompt, completion) -> float; it has to be stateless."""

    def __init__(self, function: Callable[[str, str], float]) -> None:
        self._function = function

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        return [_apply(self._function, prompt, completion) for prompt, completion in pairs]


class Ensemble:
    """The mean of several scorers, each shifted, scaled and clipped by its own constants."""

    def __init__(self, members: Sequence[tuple[Scorer, float]]) -> None:
        self._members = members

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        own = [[_bounded(x, bound) for x in scorer.score(pairs)] for scorer, bound in self._members]
        return [_mean(row) for row in zip(*own, strict=True)]


class Affine:
    """scale * (reward + shift), two public constants."""

    def __init__(self, scorer: Scorer, shift: float, scale: float) -> None:
        self._scorer, self._shift, self._scale = scorer, shift, scale

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        return [None if x is None else self._scale * (x + self._shift) for x in self._scorer.score(pairs)]


def build_scorer(config: ScorerConfig, models: Mapping[str, Path] | None = None) -> Scorer:
    """The scorer that the config names, shifted and scaled, not clipped.

    Args:
        models: exported (merged) reward models of this run by their stage's name.

    Raises:
        ConfigError: what it needs cannot be imported or loaded.
    """
    return Affine(_raw_scorer(config, models or {}), config.shift, config.scale)


def _raw_scorer(config: ScorerConfig, models: Mapping[str, Path]) -> Scorer:
    if config.kind == "sentiment_rule":
        return PythonFunction(_sentiment_rule())
    if config.kind == "python":
        return PythonFunction(load_function(config.function or ""))
    if config.kind == "ensemble":
        return Ensemble([(build_scorer(member, models), member.reward_bound) for member in config.members])
    if config.kind == "http":
        return HttpScorer(config.url or "")
    from dprlhf_ray.stages.model_scorer import ModelScorer  # torch, only where it is needed

    return ModelScorer(models[config.stage] if config.stage else config.model or "", config.label)


def check_scorer(config: ScorerConfig) -> None:
    """What can be known of a scorer before the run starts, cheaply; no torch.

    Raises:
        ConfigError: a function that cannot be imported, a local model that is not there or has no such label, a URL
            that is none, or settings that mean nothing for a member of an ensemble.
    """
    if config.kind == "python":
        load_function(config.function or "")
    elif config.kind == "http":
        check_url(config.url or "")
    elif config.model is not None:
        check_classifier(config.model, config.label)
    for member in config.members:
        if member.length_penalty or member.missing_eos_penalty:
            raise ConfigError("scorer.members: penalties are taken off the whole reward: set them on the ensemble")
        if member.standardise:
            raise ConfigError("scorer.members: the whole reward is standardised: set it on the ensemble")
        check_scorer(member)


def _sentiment_rule() -> Callable[[str, str], float]:
    """VADER's compound score of the completion, in [-1, 1] (Hutto and Gilbert, ICWSM 2014; about 1.6 ms a text)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda prompt, completion: analyzer.polarity_scores(completion)["compound"]


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
    try:
        inspect.signature(function).bind("prompt", "completion")
    except TypeError:
        raise ConfigError(f"scorer.function: {name} should take two arguments: (prompt, completion)") from None
    except ValueError:  # of some built-in functions the signature is not known
        pass
    return function


def score_records(
    scorer: Scorer, records: Sequence[tuple[str, str, float]], bound: float, zero: float = 0.0, one: float = 1.0
) -> list[PrivateNumber | None]:
    """Rewards of (prompt, completion, penalty): (value - zero) / one less the penalty, clipped to [-bound, bound].

    An error or a value that is not finite gives None for that record and touches no other; its unit then contributes
    exactly zero. Nothing about it is logged: an exception's text may quote the record.
    """
    values = scorer.score([(prompt, completion) for prompt, completion, _ in records])
    rewards = [
        None if x is None else _bounded((x - zero) / one - r[2], bound) for x, r in zip(values, records, strict=True)
    ]
    return [None if x is None else PrivateNumber(x) for x in rewards]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def clip(value: float, bound: float) -> float:
    """To [-bound, bound]."""
    return max(-bound, min(bound, value))


def _bounded(value: float | None, bound: float) -> float | None:
    return clip(value, bound) if value is not None and math.isfinite(value) else None


def _apply(function: Callable[[str, str], float], prompt: str, completion: str) -> float | None:
    try:
        return float(function(prompt, completion))
    except Exception:  # a user's function may raise anything on its record, and must not touch the others
        return None
