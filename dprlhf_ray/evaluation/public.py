"""Reward on public prompts: what a run gained, at no cost to anyone's privacy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Evaluation:
    """Rewards of one completion per public prompt, and those completions' text."""

    rewards: tuple[float, ...]
    texts: tuple[str, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.rewards))


@dataclass(frozen=True)
class Comparison:
    """After against before on the same prompts: means, and the 95 % interval of the mean difference."""

    prompts: int
    before: float
    after: float
    difference: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Paired difference with a normal 95 % interval (1.96 standard errors). Needs two prompts or more."""
    b, a = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    d = a - b
    half = 1.96 * d.std(ddof=1) / len(d) ** 0.5
    mean = float(d.mean())
    return Comparison(len(d), float(b.mean()), float(a.mean()), mean, mean - half, mean + half)
