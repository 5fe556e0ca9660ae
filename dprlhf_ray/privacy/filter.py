"""A Rényi filter: the gate of adaptive accounting, where sigma, q and the number of draws may follow released values.

Guarantee: draws whose parameters are chosen from what was released before, and which are let through only while
sum of rho(alpha) <= rho_budget, are together (alpha, rho_budget)-RDP (Feldman and Zrnic 2021, "Individual privacy
accounting via a Rényi filter", the composition theorem with adaptive parameters), so (epsilon, delta)-DP by Canonne,
Kamath and Steinke 2020, proposition 12. Assumes that alpha and the budget are fixed before the first draw, from public
numbers.

Rounding: rho is rounded up and the budget down by more than the error of the arithmetic, here and in a plain sum of up
to a million charges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import dp_accounting
from dp_accounting import rdp
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from scipy.optimize import brentq

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.mechanism import DPStep, check_positive

_UP = 1 + 1e-9  # relative: a million float additions lose less than 1e-10
_PAD = 1e-12  # absolute, per draw: where sampling is so rare that rho is of the size of rounding errors
_SMALLEST_ALPHA = 1.1  # dp_accounting's conversion is not stable nearer to 1
_LOG_SIGMA = (math.log(0.02), math.log(1e5))


@dataclass(frozen=True)
class Filter:
    """Admits draws while sum of rho(alpha) <= rho_budget; all that it admits is (epsilon, delta)-DP together."""

    alpha: float
    rho_budget: float
    epsilon: float
    delta: float


def rho(step: DPStep, alpha: float) -> float:
    """Rényi divergence of order alpha of ONE draw of `step` (all its updates and metrics), rounded up.

    Raises:
        ConfigError: no noise; replace_one, max_batch or records_per_user (no Rényi bound is known here); an alpha below
            1.1 or not finite, or one at which the divergence cannot be computed.
    """
    _check_alpha(alpha)
    found = _rdp(step, (alpha,))[0]
    if not math.isfinite(found):
        raise ConfigError(f"alpha: the divergence of order {alpha!r} cannot be computed for this step; another order")
    return found


def epsilon_at(rho: float, alpha: float, delta: float) -> float:
    """Epsilon at delta of what is (alpha, rho)-RDP, rounded up; rho 0 (nothing was spent) gives 0.

    Raises:
        ConfigError: rho negative or not finite; a bad alpha or delta.
    """
    _check_alpha(alpha)
    _check_delta(delta)
    if not isinstance(rho, int | float) or isinstance(rho, bool) or not math.isfinite(rho) or rho < 0:
        raise ConfigError(f"rho: {rho!r} is refused; a finite number of at least 0")
    return float(rdp.compute_epsilon([alpha], [rho], delta)[0]) * _UP


def choose_order(step: DPStep, epsilon: float, delta: float) -> Filter:
    """The filter for a target, at the order where most draws of the planned `step` fit.

    Raises:
        ConfigError: a bad target or delta, a step without a Rényi bound, or a target that no order can reach.
    """
    check_positive("epsilon", epsilon)
    _check_delta(delta)
    orders = tuple(float(a) for a in DEFAULT_RDP_ORDERS if a >= _SMALLEST_ALPHA)
    best: Filter | None = None
    most = 0.0
    for alpha, each in zip(orders, _rdp(step, orders), strict=True):
        budget = _budget(alpha, epsilon, delta)
        if budget > 0 and budget / each > most:
            best, most = Filter(alpha, budget, epsilon, delta), budget / each
    if best is None:
        raise ConfigError(f"epsilon: {epsilon!r} is too small for a Rényi filter at delta {delta!r}; a larger epsilon")
    return best


def calibrate(step: DPStep, epsilon: float, delta: float) -> float:
    """Smallest noise_multiplier (within 0.01 %, never too small) with which `step.steps` draws fit the filter.

    Raises:
        ConfigError: as `choose_order`; or the target cannot be reached with any noise.
    """

    def room(log_sigma: float) -> float:
        noisy = replace(step, noise_multiplier=math.exp(log_sigma))
        chosen = choose_order(noisy, epsilon, delta)
        return math.log(chosen.rho_budget / (step.steps * rho(noisy, chosen.alpha) * _UP))

    low, high = _LOG_SIGMA
    if room(high) < 0:
        raise ConfigError(f"epsilon: {epsilon!r} cannot be reached by any noise; a larger epsilon or fewer steps")
    if room(low) >= 0:
        return math.exp(low)
    found = brentq(room, low, high, xtol=1e-5)
    while room(found) < 0:
        found += 2e-5
    return math.exp(found)


def _rdp(step: DPStep, orders: tuple[float, ...]) -> list[float]:
    event = step.draw()
    if step.adjacency == "replace_one" or not isinstance(event, dp_accounting.PoissonSampledDpEvent):
        raise ConfigError(
            "accounting: adaptive has no Rényi bound under replace_one, max_batch or records_per_user; fixed_schedule"
        )
    return [float(r) * _UP + _PAD for r in accounting.renyi(((event, 1),), orders).rdp]


def _budget(alpha: float, epsilon: float, delta: float) -> float:
    """Largest rho (rounded down) with epsilon_at(rho) <= epsilon; not above 0 where there is none."""
    budget = epsilon - math.log1p(-1 / alpha) + math.log(delta * alpha) / (alpha - 1)
    budget = (budget - 1e-9 * (epsilon + abs(budget))) / _UP
    while budget > 0 and epsilon_at(budget, alpha, delta) > epsilon:
        budget *= 1 - 1e-9
    return budget


def _check_alpha(alpha: float) -> None:
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha < _SMALLEST_ALPHA:
        raise ConfigError(f"alpha: {alpha!r} is refused; a finite order of at least {_SMALLEST_ALPHA}")


def _check_delta(delta: float) -> None:
    check_positive("delta", delta)
    if delta >= 1:
        raise ConfigError(f"delta: {delta!r} is refused; a number below 1")
