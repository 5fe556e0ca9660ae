"""Epsilon of schedules, and the noise that a target epsilon needs.

PLD figures are pessimistic (upper bounds) on a grid of 1e-4 (Doroshenko et al. 2022, "Connect the Dots"), coarser only
where the loss range is so wide that the grid would not fit in memory, which can only raise them. RDP figures are by
Mironov, Talwar and Zhang 2019. Both are dp_accounting's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import dp_accounting
from dp_accounting import NeighboringRelation, pld, rdp
from dp_accounting.pld import privacy_loss_distribution as distributions
from scipy.optimize import brentq

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy.mechanism import DPStep, check_count, check_positive

DISCRETIZATION = 1e-4
COARSE_DISCRETIZATION = 1e-3
SMALLEST_NOISE, LARGEST_NOISE = 0.02, 1e5
SMALLEST_DELTA = 1e-12  # below it the truncated tails (1e-15 each) would no longer be negligible
_MAX_GRID_POINTS = 2e6
_HALF_WINDOW = 3e-4  # of log sigma: calibration stops when the root lies within this much of its guess
_INTEGER_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)  # fast: enough to guess the range of the loss

_RELATION = {
    "zero_out": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": NeighboringRelation.REPLACE_ONE,
}

_Draws = tuple[tuple[float, float, int], ...]  # (sampling_rate, sigma_eff, number of draws) for each schedule


@dataclass(frozen=True)
class EpsilonReport:
    """Upper bounds on epsilon at one delta: by PLD (the one certified) and by RDP.

    rdp is None under replace_one: dp_accounting has no RDP bound for the Poisson-subsampled Gaussian there, and
    doubling the add/remove figure is a different statement.
    """

    pld: float
    rdp: float | None


def epsilon(step: DPStep, delta: float, *, allow_large_delta: bool = False) -> EpsilonReport:
    """Epsilon of one whole schedule.

    Raises:
        ConfigError: the schedule has no noise; delta is not in [1e-12, 1), or is 1/N or more without the override.
    """
    return compose([step], delta, allow_large_delta=allow_large_delta)


def compose(steps: Sequence[DPStep], delta: float, *, allow_large_delta: bool = False) -> EpsilonReport:
    """Epsilon of several schedules on one data set: sequential composition, PLDs convolved and read at one delta.

    Raises:
        ConfigError: as `epsilon`; or no schedule; or schedules that differ in unit or adjacency (their guarantees are
            about different neighbours, so no single figure covers both).
    """
    if not steps:
        raise ConfigError("stages: nothing to account for; at least one schedule")
    if len({(s.unit, s.adjacency) for s in steps}) > 1:
        raise ConfigError("adjacency: stages that compose must have the same unit and adjacency; declare them alike")
    for step in steps:
        check_delta(delta, step.population, allow_large_delta)
        step.event()  # refuses schedules without noise
    relation = _RELATION[steps[0].adjacency]
    draws = tuple(sorted((s.sampling_rate, s.effective_noise_multiplier, s.steps) for s in steps))
    bound = _pld_epsilon(relation, draws, delta, DISCRETIZATION)
    if not math.isfinite(bound):
        raise ConfigError(f"delta: {delta!r} is too small for these schedules; a larger delta or more noise")
    return EpsilonReport(pld=bound, rdp=_rdp_epsilon(relation, draws, delta))


def spent(step: DPStep, attempts: int, delta: float) -> float:
    """PLD epsilon of the first `attempts` draws of a schedule, for a progress meter (on a coarser grid: a little high).

    It is never what a fixed schedule certifies: a run that stops early still certifies the planned epsilon.
    """
    if attempts == 0:
        return 0.0
    check_count("attempts", attempts)
    draws = ((step.sampling_rate, step.effective_noise_multiplier, attempts),)
    if attempts >= step.steps:
        return _pld_epsilon(_RELATION[step.adjacency], draws, delta, DISCRETIZATION)
    return _pld_epsilon(_RELATION[step.adjacency], draws, delta, COARSE_DISCRETIZATION)


def calibrate(step: DPStep, epsilon: float, delta: float, *, allow_large_delta: bool = False) -> float:
    """Smallest noise_multiplier (within 0.1 %, never too small) whose PLD epsilon is at most the target.

    Args:
        step: the schedule; its own noise_multiplier is ignored; its metric noise is kept, as part of the target.
        epsilon: the target.
        delta: at which the target is read.

    Returns:
        sigma of one update, in [0.02, 1e5]; 0.02 also where even less noise would do.

    Raises:
        ConfigError: a bad target or delta, or a target that no gradient noise can reach.
    """
    check_positive("epsilon", epsilon)
    check_delta(delta, step.population, allow_large_delta)
    relation = _RELATION[step.adjacency]

    def excess(log_sigma: float, interval: float) -> float:
        noisy = replace(step, noise_multiplier=math.exp(log_sigma))
        draws = ((noisy.sampling_rate, noisy.effective_noise_multiplier, noisy.steps),)
        found = _pld_epsilon(relation, draws, delta, interval)
        return math.log(min(max(found, 1e-300), 1e300) / epsilon)

    low, high = math.log(SMALLEST_NOISE), math.log(LARGEST_NOISE)
    if excess(high, COARSE_DISCRETIZATION) > 0 and excess(high, DISCRETIZATION) > 0:
        metrics = "" if step.metric_noise_multiplier is None else " (the released metrics may already exceed it)"
        raise ConfigError(f"epsilon: {epsilon!r} cannot be reached{metrics}; more metric noise or fewer steps")
    if excess(low, COARSE_DISCRETIZATION) <= 0:
        return SMALLEST_NOISE
    coarse = _root(lambda x: excess(x, COARSE_DISCRETIZATION), 0.0, math.log(2.0), 1e-4, (low, high))
    if not excess(coarse - _HALF_WINDOW, DISCRETIZATION) > 0 >= excess(coarse + _HALF_WINDOW, DISCRETIZATION):
        coarse = _root(lambda x: excess(x, DISCRETIZATION), coarse, 0.002, 1e-4, (low, high))
    sigma = math.exp(coarse + _HALF_WINDOW)
    while excess(math.log(sigma), DISCRETIZATION) > 0:  # the last word is always the fine bound, on the safe side
        sigma *= 1.0001
    return sigma


def check_delta(delta: float, population: int, allow_large_delta: bool = False) -> None:
    """Refuse a delta that is no probability, too small to compute, or 1/N or more (that allows releasing a record)."""
    check_positive("delta", delta)
    if not SMALLEST_DELTA <= delta < 1:
        raise ConfigError(f"delta: {delta!r} is refused; a number in [{SMALLEST_DELTA:g}, 1)")
    if delta * population >= 1 and not allow_large_delta:
        raise ConfigError(
            f"delta: {delta!r} is not below 1/N = {1 / population:.3g}; a smaller delta, or allow_large_delta: true"
        )


def _root(
    f: Callable[[float], float], start: float, width: float, tolerance: float, limits: tuple[float, float]
) -> float:
    """Root of a decreasing function near `start`, bracketed by doubling steps inside `limits`."""
    low = high = start
    while f(low) <= 0 and low > limits[0]:
        low, width = max(low - width, limits[0]), 2 * width
    while f(high) > 0 and high < limits[1]:
        high, width = min(high + width, limits[1]), 2 * width
    if f(low) <= 0 or f(high) > 0:  # a coarser grid may never cross; the fine search starts from the limit
        return low if f(low) <= 0 else high
    return float(brentq(f, low, high, xtol=tolerance, rtol=1e-12))


def _interval(relation: NeighboringRelation, draws: _Draws, floor: float) -> float:
    """Grid of the privacy loss: `floor`, or as fine as two million points over the likely range allow."""
    scale = 0.5 if relation is NeighboringRelation.REPLACE_ONE else 1.0
    single = max(0.5 / (scale * sigma) ** 2 + 9 / (scale * sigma) for _, sigma, _ in draws)
    accountant = rdp.RdpAccountant(_INTEGER_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
    for q, sigma, count in draws:
        accountant.compose(_event(q, scale * sigma, count))
    return max(floor, single / _MAX_GRID_POINTS, accountant.get_epsilon(SMALLEST_DELTA) / _MAX_GRID_POINTS)


@lru_cache(maxsize=64)
def _one_draw(
    relation: NeighboringRelation, sampling_rate: float, sigma: float, interval: float
) -> distributions.PrivacyLossDistribution:
    return distributions.from_gaussian_mechanism(
        standard_deviation=sigma,
        value_discretization_interval=interval,
        sampling_prob=sampling_rate,
        neighboring_relation=relation,
    )


@lru_cache(maxsize=4096)
def _pld_epsilon(relation: NeighboringRelation, draws: _Draws, delta: float, floor: float) -> float:
    interval = _interval(relation, draws, floor)
    if len(draws) == 1:
        q, sigma, count = draws[0]
        if count > 1:
            return float(_one_draw(relation, q, sigma, interval).self_compose(count).get_epsilon_for_delta(delta))
        return float(_one_draw(relation, q, sigma, interval).get_epsilon_for_delta(delta))
    accountant = pld.PLDAccountant(relation, value_discretization_interval=interval)
    for q, sigma, count in draws:
        accountant.compose(_event(q, sigma, count))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def _rdp_epsilon(relation: NeighboringRelation, draws: _Draws, delta: float) -> float | None:
    if relation is NeighboringRelation.REPLACE_ONE:
        return None
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about each order that it leaves out, which is safe: others remain
    try:
        for q, sigma, count in draws:
            accountant.compose(_event(q, sigma, count))
    finally:
        log.setLevel(level)
    return float(accountant.get_epsilon(delta))


def _event(sampling_rate: float, sigma: float, count: int) -> dp_accounting.DpEvent:
    return DPStep("record", "zero_out", 1, sampling_rate, sigma, 1.0, 1, count, None).event()
