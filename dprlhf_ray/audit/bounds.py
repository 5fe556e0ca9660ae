"""From what an attacker guessed right to a lower bound on epsilon, and how large a bound to expect beforehand.

The attacker sees one number per repetition and says "present" where it is above a threshold. Any (epsilon, delta)-DP
mechanism has TPR <= e^epsilon FPR + delta (Kairouz, Oh and Viswanath 2015, thm 2.1), so rates that are surely on the
wrong side of it refute a smaller epsilon (Jagielski, Ullman and Oprea 2020; Nasr et al. 2021). For a mechanism that
claims to be a Gaussian one, the rates refute its whole trade-off curve at once, with far fewer repetitions (Nasr et al.
2023, section 4, after Dong, Roth and Su 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, norm

Curve = Literal["any", "gaussian"]
_LARGEST_MU = 100.0
Counts = int | np.ndarray


@dataclass(frozen=True)
class Reading:
    """How repetitions are read.

    curve: "any" assumes nothing about the mechanism; "gaussian" refutes the trade-off curve of a Gaussian mechanism,
    which a step at sampling rate 1 claims to be. confidence: probability that the bound does not exceed the true
    epsilon.
    """

    delta: float
    confidence: float = 0.95
    curve: Curve = "any"

    def __post_init__(self) -> None:
        if not (0 < self.delta < 1 and 0 < self.confidence < 1):
            raise ValueError(f"delta {self.delta!r} and confidence {self.confidence!r} are probabilities in (0, 1)")


def epsilon_at(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism with sensitivity / deviation = mu (Balle and Wang 2018, thm 8)."""
    if mu <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        second = epsilon + norm.logcdf(-epsilon / mu - mu / 2)
        return float(norm.cdf(-epsilon / mu + mu / 2) - math.exp(second) - delta)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def rates(hits: Counts, false_alarms: Counts, repetitions: int, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """(lower limit of the TPR, upper limit of the FPR), Clopper and Pearson 1934, jointly at `confidence`."""
    alpha, h, a = (1 - confidence) / 2, np.asarray(hits, dtype=float), np.asarray(false_alarms, dtype=float)
    low = np.where(h > 0, beta.ppf(alpha, np.maximum(h, 1), repetitions - h + 1), 0.0)
    high = np.where(a < repetitions, beta.ppf(1 - alpha, a + 1, np.maximum(repetitions - a, 1)), 1.0)
    return low, high


def lower_bound(hits: int, false_alarms: int, repetitions: int, reading: Reading) -> float:
    """Lower bound on epsilon at reading.delta.

    Args:
        hits: repetitions with the canary in which the attacker said "present".
        false_alarms: those without it in which he said so too.
        repetitions: of each of the two.
    """
    found = float(_strength(hits, false_alarms, repetitions, reading))
    return epsilon_at(min(found, _LARGEST_MU), reading.delta) if reading.curve == "gaussian" else found


def choose_threshold(present: np.ndarray, absent: np.ndarray, reading: Reading) -> float:
    """The threshold with the largest bound on these scores.

    They must not be the ones that are then judged with it.
    """
    pooled = np.sort(np.concatenate([present, absent]))
    between = (pooled[1:] + pooled[:-1]) / 2
    hits, alarms = ((scores > between[:, None]).sum(1) for scores in (present, absent))
    return float(between[np.argmax(_strength(hits, alarms, len(present), reading))])


def power(mu: float, claimed: float, repetitions: int, reading: Reading, simulations: int = 10_000) -> float:
    """Probability that the bound exceeds `claimed` when the mechanism is Gaussian with sensitivity / deviation = mu.

    Worked out before the audit is run, at the best threshold for this mu. For a mechanism that keeps its claim it is
    the rate of false alarms, at most 1 - confidence.
    """
    t = np.linspace(-4.0, 4.0 + mu, 161)
    tpr, fpr = norm.sf(t - mu), norm.sf(t)
    best = int(np.argmax(_strength(np.round(repetitions * tpr), np.round(repetitions * fpr), repetitions, reading)))
    generator = np.random.default_rng(0)
    hits, alarms = (generator.binomial(repetitions, rate[best], simulations) for rate in (tpr, fpr))
    enough = claimed
    if reading.curve == "gaussian":
        enough = float(brentq(lambda m: epsilon_at(m, reading.delta) - claimed, 0.0, _LARGEST_MU))
    return float(np.mean(_strength(hits, alarms, repetitions, reading) > enough))


def _strength(hits: Counts, false_alarms: Counts, repetitions: int, reading: Reading) -> np.ndarray:
    """Lower bound in the curve's own parameter: epsilon for any, mu for gaussian. At least 0, element by element."""
    tpr, fpr = rates(hits, false_alarms, repetitions, reading.confidence)
    if reading.curve == "gaussian":
        return np.maximum(norm.ppf(tpr) - norm.ppf(fpr), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # "present", and its complement "absent"
        ratios = np.maximum((tpr - reading.delta) / fpr, (1 - fpr - reading.delta) / (1 - tpr))
        return np.maximum(np.log(np.maximum(ratios, 1.0)), 0.0)
