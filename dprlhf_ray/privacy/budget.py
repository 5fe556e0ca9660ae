"""What may be declared: one stage against its target, and everything on one data set against that data set's budget.

Guarantee: what is declared on a budgeted data set, by all runs that share the ledger, costs at most the budget,
composed sequentially: PLDs at the budget's delta (with an adaptive stage: Renyi divergences at one order). Stages of
other runs may read the same units, so nothing is composed in parallel here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from dprlhf_ray.errors import BudgetExhausted, ConfigError
from dprlhf_ray.privacy import accounting, composition, filter
from dprlhf_ray.privacy.chain import Budget, Schedule
from dprlhf_ray.privacy.mechanism import DPStep, check_positive

ROUNDING = 1 + 1e-9  # one part in 10^9 over a target is rounding


def part(schedule: Schedule) -> composition.Part:
    """A schedule as composition counts it, its units unknown."""
    s = schedule
    return composition.Part(s.stage, s.step, None, composition.OTHER_RUN, s.alpha, s.rho_budget)


def cost(schedules: Iterable[Schedule], delta: float) -> float:
    """Epsilon of several schedules on one data set at one delta; infinite when one of them is clip only."""
    parts = [part(s) for s in schedules]
    if not parts:
        return 0.0
    bound = composition.sequential(parts, delta)
    return math.inf if bound is None else bound.epsilon


def check_stage(
    stage: str, step: DPStep, epsilon: float | None, delta: float, large: bool, adaptive: bool
) -> dict[str, Any]:
    """The ledger's body of a new schedule.

    Raises:
        ConfigError: no target; a schedule that costs more than its target; a delta that is refused.
    """
    body: dict[str, Any] = {"step": step.parameters(), "epsilon": epsilon, "delta": delta, "guarantee": "dp"}
    if step.noise_multiplier == 0:
        if epsilon is not None:
            raise ConfigError(f"stage {stage!r}: noise_multiplier 0 guarantees no epsilon; noise, or no target")
        if adaptive:
            raise ConfigError(f"stage {stage!r}: adaptive accounting needs noise; a noise_multiplier above 0")
        accounting.check_delta(delta, step.population, large)
        return body | {"guarantee": "none"}
    if epsilon is None:
        raise ConfigError(f"{stage}.epsilon: not set; a target such as 8.0 (a missing epsilon never means no limit)")
    if not (isinstance(epsilon, int | float) and math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"{stage}.epsilon: {epsilon!r} is refused; a finite number above 0")
    if adaptive:
        accounting.check_delta(delta, step.population, large)
        kept = filter.choose_order(step, epsilon, delta)
        return body | {"alpha": kept.alpha, "rho_budget": kept.rho_budget}
    planned = accounting.epsilon(step, delta, allow_large_delta=large)
    if planned.pld > epsilon * ROUNDING:
        raise ConfigError(f"{stage}.epsilon: the schedule costs {planned.pld:.6g}, over {epsilon:.6g}; more noise")
    return body | {"planned": asdict(planned)}


def check_fits(dataset: str, budget: Budget, schedules: Iterable[Schedule]) -> None:
    """Refuse schedules on a data set that cost more than its budget.

    Raises:
        BudgetExhausted: they do. ConfigError: one of them guarantees nothing.
    """
    declared = list(schedules)
    for s in declared:
        if s.step.noise_multiplier == 0:
            raise ConfigError(f"stage {s.stage!r}: clip only is refused on {dataset!r}, which has a budget; add noise")
        accounting.check_delta(budget.delta, s.step.population, s.delta * s.step.population >= 1)
    total = cost(declared, budget.delta)
    if total > budget.epsilon * ROUNDING:
        names = ", ".join(s.stage for s in declared)
        raise BudgetExhausted(
            f"data set {dataset!r}: its budget is epsilon {budget.epsilon:.6g} at delta {budget.delta:g}, but {names} "
            f"together cost {total:.6g}; a smaller target, or a budget raised on purpose (`dprlhf ledger budget`)"
        )


def meter(schedule: Schedule) -> float | None:
    """Epsilon of what is charged so far, never above the target; None for clip only. For progress, never certified.

    Attempts of a fixed schedule are rounded up to seven bits: never too low, and however many attempts there are,
    only a few hundred different figures are computed.
    """
    if schedule.step.noise_multiplier == 0 or schedule.epsilon is None:
        return None
    if schedule.alpha is not None:
        spent = filter.epsilon_at(schedule.rho, schedule.alpha, schedule.delta)
    else:
        grain = 1 << max(0, schedule.spent.bit_length() - 7)
        attempts = min(-(-schedule.spent // grain) * grain, schedule.step.steps)
        spent = accounting.spent(schedule.step, attempts, schedule.delta)
    return min(spent, schedule.epsilon)


def checked(dataset: str, epsilon: float, delta: float) -> Budget:
    """A budget; ConfigError for what is not finite and positive, or no probability."""
    check_positive(f"data.{dataset}.budget.epsilon", epsilon)
    accounting.check_delta(delta, 1)
    return Budget(float(epsilon), float(delta))
