"""What the stages on one declared data set cost together.

A neighbouring data set differs in one unit, so a stage that does not read this unit has the same law on both, given
what was released before it. Only the stages that do read it cost anything. They compose sequentially: PLDs convolved
and read at one delta (adaptive composition of dominating pairs: Zhu, Dong and Wang 2022, "Optimal accounting of
differential privacy via characteristic function"). The data set's epsilon is the largest over all units, which is
parallel composition (McSherry 2009, "Privacy integrated queries") where no unit is read twice.

Guarantee: the figure bounds every unit's loss. Assumes that ids are real. Whatever is not known counts as read: a stage
whose units are not known here (no ids, another run) is composed sequentially with everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting, filter
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.partitions import WHOLE, Units

NO_IDS = "the rows of stage {} have no unit ids, so that it counts for every unit"
OTHER_RUN = "stage {} is of another run, whose units are not known here, so that it counts for every unit"


@dataclass(frozen=True)
class Part:
    """One stage's share of the cost.

    units: None when not known, and `unknown` says why. alpha, rho_budget: of an adaptive stage (alpha None: fixed).
    """

    stage: str
    step: DPStep
    units: Units | None
    unknown: str = NO_IDS
    alpha: float | None = None
    rho_budget: float = 0.0


@dataclass(frozen=True)
class Bound:
    """Upper bounds at one delta: epsilon is the certified one (PLD, or the filter's where a stage is adaptive).

    pld: None where a stage is adaptive. rdp: None under replace_one.
    """

    epsilon: float
    pld: float | None
    rdp: float | None


@dataclass(frozen=True)
class Group:
    """Stages that may read one and the same unit, and what they cost it (None: one of them guarantees nothing)."""

    stages: tuple[str, ...]
    bound: Bound | None


@dataclass(frozen=True)
class Composition:
    """The largest bound over all groups at one delta, and in words why they are these groups."""

    bound: Bound | None
    delta: float
    groups: tuple[Group, ...]
    reason: str

    @staticmethod
    def largest(groups: Sequence[Group]) -> Bound | None:
        """The largest bound of some groups; None when one of them has none."""
        known = [g.bound for g in groups if g.bound is not None]
        if len(known) < len(groups):
            return None
        plds, rdps = [b.pld for b in known], [b.rdp for b in known]
        return Bound(
            max(b.epsilon for b in known),
            None if None in plds else max(x for x in plds if x is not None),
            None if None in rdps else max(x for x in rdps if x is not None),
        )


def compose(parts: Sequence[Part], delta: float) -> Composition:
    """Compose the stages of one data set.

    Raises:
        ConfigError: as `accounting.compose`; no stage at all.
    """
    if not parts:
        raise ConfigError("data: nothing was declared on this data set; a stage that charges it")
    patterns, reason = _patterns(parts)
    groups = tuple(
        Group(tuple(parts[i].stage for i in sorted(p)), sequential([parts[i] for i in sorted(p)], delta))
        for p in sorted(patterns, key=sorted)
    )
    return Composition(Composition.largest(groups), delta, groups, reason)


def sequential(parts: Sequence[Part], delta: float) -> Bound | None:
    """Bound for a unit that all these stages read; None when one of them has no noise.

    An adaptive stage is known by its filter only: at order alpha it spends at most rho_budget. Renyi divergence does
    not decrease with the order, so at the smallest alpha of all filters every budget still holds, and they add up, with
    the divergence of the fixed stages. Where one of these has no Renyi bound, the two kinds are composed at half of
    delta each, and their epsilons add up.
    """
    if any(p.step.noise_multiplier == 0 for p in parts):
        return None
    adaptive = [(p.alpha, p.rho_budget) for p in parts if p.alpha is not None]
    fixed = [p.step for p in parts if p.alpha is None]
    report = accounting.compose(fixed, delta, allow_large_delta=True) if fixed else None
    if report is not None and not adaptive:
        return Bound(report.pld, report.pld, report.rdp)
    alpha, rho = min(a for a, _ in adaptive), sum(r for _, r in adaptive)
    if report is not None and report.rdp is None:
        half = accounting.compose(fixed, delta / 2, allow_large_delta=True).pld
        return Bound(filter.epsilon_at(rho, alpha, delta / 2) + half, None, None)
    epsilon = filter.epsilon_at(rho + sum(s.steps * filter.rho(s, alpha) for s in fixed), alpha, delta)
    return Bound(epsilon, None, epsilon)


def _patterns(parts: Sequence[Part]) -> tuple[set[frozenset[int]], str]:
    """The largest sets of stages (by index) that may read one unit, and why."""
    everything = frozenset(range(len(parts)))
    if len(parts) == 1:
        return {everything}, "one stage"
    if any(p.step.adjacency == "replace_one" for p in parts):
        why = "under replace_one a unit may be replaced by one of another partition, so that both are affected"
        return {everything}, f"sequential: {why}"
    found = _largest_sets(_readers(parts))
    unknown = frozenset(i for i in everything if parts[i].units is None)
    patterns = _largest_sets({p | unknown for p in found})
    why = "".join(f"; {parts[i].unknown.format(parts[i].stage)}" for i in sorted(unknown))
    if patterns == {everything}:
        return patterns, f"sequential: one unit may be in every stage{why}"
    if all(len(p) == 1 for p in patterns):
        return patterns, "parallel: no unit is in two stages, by keyed digests of their real ids"
    return patterns, (
        "parallel over groups, sequential inside each: no unit is in stages that are not together in a group, by keyed "
        f"digests of their real ids{why}"
    )


def _readers(parts: Sequence[Part]) -> set[frozenset[int]]:
    """For each unit, and under add_remove for each that could be added, the stages that read it."""
    readers: dict[bytes, set[int]] = {}
    for i, part in enumerate(parts):
        for digest in part.units.digests if part.units else ():
            readers.setdefault(digest, set()).add(i)
    found = {frozenset(r) for r in readers.values()} | {frozenset([i]) for i in range(len(parts))}
    if any(p.step.adjacency == "add_remove" for p in parts):
        # A unit that is not there yet has a place in [0, 1) too: who reads it is known from the intervals alone.
        known = {i: p.units.span for i, p in enumerate(parts) if p.units is not None}
        for start in {low for low, _ in known.values()} | {WHOLE[0]}:
            found.add(frozenset(i for i, (low, high) in known.items() if low <= start < high))
    return found


def _largest_sets(sets: set[frozenset[int]]) -> set[frozenset[int]]:
    """Those that no other one contains: fewer stages never cost more."""
    return {s for s in sets if not any(s < other for other in sets)}
