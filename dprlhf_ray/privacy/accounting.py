"""Epsilon of schedules, and the noise that a target epsilon needs.

PLD figures are pessimistic (upper bounds) on a grid of 1e-4 (Doroshenko et al. 2022, "Connect the Dots"), coarser only
where the loss range is so wide that the grid would not fit in memory, which can only raise them. RDP figures are by
Mironov, Talwar and Zhang 2019. Both are dp_accounting's (privacy/distributions.py makes the PLD of one draw).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import dp_accounting
from dp_accounting import NeighboringRelation, rdp
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from scipy.optimize import brentq

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy.distributions import PrivacyLossDistribution, largest_loss, one_draw
from dprlhf_ray.privacy.mechanism import DPStep, check_count, check_positive

DISCRETIZATION = 1e-4
COARSE_DISCRETIZATION = 1e-3
SMALLEST_NOISE, LARGEST_NOISE = 0.02, 1e5
SMALLEST_DELTA = 1e-12  # below it the truncated tails (1e-15 each) would no longer be negligible
_MAX_GRID_POINTS = 2e6
_ROUGH_GRID_POINTS = 2e4  # to guess the range where there is no RDP bound
_HALF_WINDOW = 3e-4  # of log sigma: calibration stops when the root lies within this much of its guess
_INTEGER_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)  # fast: enough to guess the range of the loss

_RELATION = {
    "zero_out": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": NeighboringRelation.REPLACE_ONE,
}

_Draws = tuple[tuple[dp_accounting.DpEvent, int], ...]  # (one draw, how many of them) for each schedule


@dataclass(frozen=True)
class EpsilonReport:
    """Upper bounds on epsilon at one delta: by PLD (the one certified) and by RDP.

    rdp is None where dp_accounting has no RDP bound: under replace_one (doubling the add/remove figure is a different
    statement), with a capped draw, and with several records per user.
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
    relation = _RELATION[steps[0].adjacency]
    draws = tuple(sorted(((s.draw(), s.steps) for s in steps), key=repr))  # one order, so that it is computed once
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
    draws = ((step.draw(), attempts),)
    if attempts >= step.steps:
        return _pld_epsilon(_RELATION[step.adjacency], draws, delta, DISCRETIZATION)
    return _pld_epsilon(_RELATION[step.adjacency], draws, delta, COARSE_DISCRETIZATION)


def selected_epsilon(step: DPStep, delta: float, tries: float, *, allow_large_delta: bool = False) -> float:
    """RDP epsilon of a hyper-parameter search: run the schedule K ~ Poisson(tries) times, release the best run only.

    Papernot and Steinke 2022, "Hyperparameter tuning with Rényi differential privacy", theorem 6. Assumes that K is
    drawn secretly and afresh, that every run has this schedule (or a cheaper one) and is kept secret unless it is the
    best, and that runs are compared by what they would release, a score charged in the schedule, or public data.

    Args:
        tries: mean of K, at least 1. (K = 0 happens: then nothing is released.)

    Raises:
        ConfigError: as `epsilon`; a mean below 1; a schedule without an RDP bound.
    """
    check_positive("tries", tries)
    if tries < 1:
        raise ConfigError(f"tries: {tries!r} is refused; a mean of at least 1")
    check_delta(delta, step.population, allow_large_delta)
    if not _has_rdp(_RELATION[step.adjacency], ((step.draw(), step.steps),)):
        raise ConfigError("tries: a search has no figure under replace_one, max_batch or records_per_user; without it")
    return float(renyi(((RepeatAndSelectDpEvent(step.event(), tries, math.inf), 1),)).get_epsilon(delta))


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
        found = _pld_epsilon(relation, ((noisy.draw(), noisy.steps),), delta, interval)
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


def renyi(draws: _Draws, orders: Sequence[float] | None = None) -> rdp.RdpAccountant:
    """dp_accounting's RDP accountant after these draws; orders at which a divergence is not known stand at infinity."""
    accountant = rdp.RdpAccountant(orders)
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about each order that it leaves out, which is safe: others remain
    try:
        for event, count in draws:
            accountant.compose(event, count)
    finally:
        log.setLevel(level)
    return accountant


def _has_rdp(relation: NeighboringRelation, draws: _Draws) -> bool:
    plain = all(isinstance(event, dp_accounting.PoissonSampledDpEvent) for event, _ in draws)
    return plain and relation is not NeighboringRelation.REPLACE_ONE


def _interval(relation: NeighboringRelation, draws: _Draws, floor: float) -> float:
    """Grid of the privacy loss: `floor`, or as fine as two million points over the likely range allow."""
    single = max(largest_loss(relation, event) for event, _ in draws)
    grid = max(floor, single / _MAX_GRID_POINTS)
    if _has_rdp(relation, draws):
        likely = float(renyi(draws, _INTEGER_ORDERS).get_epsilon(SMALLEST_DELTA))
    else:
        likely = _composed(relation, draws, max(grid, single / _ROUGH_GRID_POINTS)).get_epsilon_for_delta(
            SMALLEST_DELTA
        )
    return max(grid, likely / _MAX_GRID_POINTS)


@lru_cache(maxsize=64)
def _one_draw(relation: NeighboringRelation, event: dp_accounting.DpEvent, interval: float) -> PrivacyLossDistribution:
    return one_draw(relation, event, interval)


def _composed(relation: NeighboringRelation, draws: _Draws, interval: float) -> PrivacyLossDistribution:
    each = [(_one_draw(relation, event, interval), count) for event, count in draws]
    return reduce(lambda a, b: a.compose(b), [p.self_compose(count) if count > 1 else p for p, count in each])


@lru_cache(maxsize=4096)
def _pld_epsilon(relation: NeighboringRelation, draws: _Draws, delta: float, floor: float) -> float:
    return float(_composed(relation, draws, _interval(relation, draws, floor)).get_epsilon_for_delta(delta))


@lru_cache(maxsize=4096)
def _rdp_epsilon(relation: NeighboringRelation, draws: _Draws, delta: float) -> float | None:
    return float(renyi(draws).get_epsilon(delta)) if _has_rdp(relation, draws) else None
