"""What may be declared: one stage against its target, and everything on one data set against that data set's budget.

Guarantee: what is declared on a budgeted data set, by all runs that share the ledger, costs at most the budget,
composed sequentially: PLDs at the budget's delta (with an adaptive stage: Renyi divergences at one order). Stages of
other runs may read the same units, so nothing is composed in parallel here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dprlhf_ray.errors import BudgetExhausted, ConfigError
from dprlhf_ray.privacy import accounting, chain, composition, filter
from dprlhf_ray.privacy.chain import Budget, Schedule
from dprlhf_ray.privacy.mechanism import DPStep, check_positive

if TYPE_CHECKING:
    from dprlhf_ray.config import AnyStage
    from dprlhf_ray.privacy.planning import StagePlan

ROUNDING = 1 + 1e-9  # one part in 10^9 over a target is rounding


@dataclass(frozen=True)
class Declaration:
    """What a stage asks leave for, before anything of it is charged.

    dataset: declared name of the data set that pays. stage: its name, unique in the ledger. step: what every attempt
    does, and how many there are (adaptive: the plan). epsilon: target; None only without noise (clip only, which
    guarantees nothing) and for public. adaptive: each charge may have its own parameters; a Renyi filter at one order
    bounds their sum. public: the data are declared public, so that attempts are counted and cost nothing.
    """

    dataset: str
    stage: str
    step: DPStep
    epsilon: float | None
    delta: float
    allow_large_delta: bool = False
    adaptive: bool = False
    public: bool = False

    @classmethod
    def of(cls, stage: AnyStage, plan: StagePlan) -> Declaration:
        """That of a run's stage."""
        large, adaptive = stage.privacy.allow_large_delta, plan.filter is not None
        return cls(
            plan.dataset, plan.ledger_stage, plan.step, plan.target, plan.delta, large, adaptive, plan.public
        )  # fmt: skip

    def matches(self, s: Schedule) -> bool:
        """Whether a schedule, however much of it is spent, is the one declared."""
        mine = (self.dataset, self.stage, self.step, self.epsilon, self.delta, self.adaptive, self.public)
        return mine == (s.dataset, s.stage, s.step, s.epsilon, s.delta, s.alpha is not None, s.public)


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


def check_new(d: Declaration, known: Mapping[str, Schedule], budget: Budget | None) -> dict[str, Any]:
    """The ledger's body of a stage that is not in it yet.

    Args:
        known: all schedules by stage. budget: of its data set.

    Raises:
        ConfigError: no name; a data set that is private here and public there; another unit or adjacency than the data
            set was charged with; as `check_stage`.
        BudgetExhausted: with this stage, all that is declared would cost more than the data set's budget.
    """
    if not d.dataset or not d.stage:
        raise ConfigError("data, stage: a schedule needs a data set name and a stage name")
    others = [s for s in known.values() if s.dataset == d.dataset]
    check_role(d.dataset, d.public, others, budget)
    if d.public:
        return check_stage(d)
    mine = (d.step.unit, d.step.adjacency)
    for theirs in ((s.step.unit, s.step.adjacency) for s in others):
        if mine != theirs:
            raise ConfigError(
                f"stage {d.stage!r}: unit and adjacency {mine}, but data set {d.dataset!r} was charged with {theirs}: "
                "guarantees about different neighbours do not compose; declare them alike"
            )
    body = check_stage(d)
    if budget is not None:
        check_fits(d.dataset, budget, [*others, chain.scheduled(d.dataset, d.stage, body)])
    return body


def check_role(dataset: str, public: bool, declared: Iterable[Schedule], budget: Budget | None) -> None:
    """Refuse a data set that is private in one place and public in another: ConfigError."""
    if public and budget is not None:
        raise ConfigError(f"data.{dataset}.public: the ledger has a budget for it, so it is private; public: false")
    for s in declared:
        if s.public != public:
            raise ConfigError(
                f"data.{dataset}.public: data set {dataset!r} is private in the ledger (stage {s.stage!r}), and what "
                "was private stays so; public: false"
                if public
                else f"data.{dataset}.public: data set {dataset!r} was declared public in the ledger (stage "
                f"{s.stage!r}), and cannot be protected afterwards; public: true, or a new name for other data"
            )


def check_stage(d: Declaration) -> dict[str, Any]:
    """The ledger's body of a new schedule, looked at by itself.

    Raises:
        ConfigError: no target; a schedule that costs more than its target; a delta that is refused.
    """
    stage, step, epsilon, delta, large = d.stage, d.step, d.epsilon, d.delta, d.allow_large_delta
    body: dict[str, Any] = {"step": step.parameters(), "epsilon": epsilon, "delta": delta, "guarantee": "dp"}
    if d.public:
        if epsilon is not None or step.noise_multiplier != 0 or d.adaptive:
            raise ConfigError(f"stage {stage!r}: mode public takes no epsilon, noise or adaptive accounting; without")
        return body | {"guarantee": "public"}
    if step.noise_multiplier == 0:
        if epsilon is not None:
            raise ConfigError(f"stage {stage!r}: noise_multiplier 0 guarantees no epsilon; noise, or no target")
        if d.adaptive:
            raise ConfigError(f"stage {stage!r}: adaptive accounting needs noise; a noise_multiplier above 0")
        accounting.check_delta(delta, step.population, large)
        return body | {"guarantee": "none"}
    if epsilon is None:
        raise ConfigError(f"{stage}.epsilon: not set; a target such as 8.0 (a missing epsilon never means no limit)")
    if not (isinstance(epsilon, int | float) and math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"{stage}.epsilon: {epsilon!r} is refused; a finite number above 0")
    if d.adaptive:
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
    """Epsilon of what is charged so far, never above the target; None where there is none. For progress only.

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
