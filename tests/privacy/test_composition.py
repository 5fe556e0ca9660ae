"""Stages on one data set: parallel only where no unit is read twice, and never less than what a unit really pays."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting, filter
from dprlhf_ray.privacy.composition import NO_IDS, OTHER_RUN, Part, compose, sequential
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.partitions import Units, assign, spans, units

DELTA = 1e-5
STEP = DPStep("record", "zero_out", 1000, 0.05, 1.0, 1.0, 1, 10, None)
NOISIER = replace(STEP, noise_multiplier=1.2, steps=8)
NONE = replace(STEP, noise_multiplier=0.0)
KEY, IDS = bytes(range(32)), [f"u{i}" for i in range(400)]


def readers(text: str) -> Units:
    """One unit for each letter."""
    return Units(frozenset(letter.encode() * 16 for letter in text))


def part(name: str, who: str | None, step: DPStep = STEP) -> Part:
    return Part(name, step, None if who is None else readers(who))


def pld(*steps: DPStep) -> float:
    return accounting.compose(steps, DELTA).pld


def test_disjoint_stages_cost_what_the_dearest_costs() -> None:
    found = compose([part("a", "xy"), part("b", "z", NOISIER)], DELTA)
    assert found.bound is not None and found.bound.epsilon == max(pld(STEP), pld(NOISIER)) == pld(STEP)
    assert [g.stages for g in found.groups] == [("a",), ("b",)] and found.reason.startswith("parallel: no unit")


def test_stages_that_share_one_single_unit_are_composed_sequentially() -> None:
    """That unit pays for both, however many others do not."""
    found = compose([part("a", "abcdef"), part("b", "fghijk", NOISIER)], DELTA)
    assert found.bound is not None and found.bound.epsilon == pld(STEP, NOISIER) > pld(STEP) * 1.01
    assert [g.stages for g in found.groups] == [("a", "b")] and found.reason.startswith("sequential")


def test_in_a_chain_of_three_a_unit_pays_for_the_two_that_read_it() -> None:
    """The outer two share nobody: all three together would be too much, one alone too little."""
    found = compose([part("a", "xy"), part("b", "yz", NOISIER), part("c", "z")], DELTA)
    assert [g.stages for g in found.groups] == [("a", "b"), ("b", "c")]
    assert found.bound is not None and found.bound.epsilon == pld(STEP, NOISIER)


def test_one_unit_in_all_three_pays_for_all_three() -> None:
    found = compose([part("a", "xy"), part("b", "yz"), part("c", "y")], DELTA)
    assert found.bound is not None and found.bound.epsilon == pytest.approx(pld(replace(STEP, steps=30)), rel=1e-3)


def test_two_partitions_and_a_stage_that_overlaps_both() -> None:
    a, b = (
        units(KEY, "d", [IDS[i] for i in assign(KEY, "d", IDS, s)], s) for s in spans({"a": 0.5, "b": 0.5}).values()
    )
    both = units(KEY, "d", IDS)
    found = compose([Part("a", STEP, a), Part("b", NOISIER, b), Part("c", STEP, both)], DELTA)
    assert [g.stages for g in found.groups] == [("a", "c"), ("b", "c")] and "groups" in found.reason
    assert found.bound is not None and found.bound.epsilon == pld(STEP, STEP) > pld(NOISIER, STEP)


def test_every_unit_is_within_the_figure_by_brute_force() -> None:
    """Each unit's own stages, composed one unit at a time, for all ways in which three stages can share four units."""
    steps = (STEP, NOISIER, replace(NOISIER, steps=2))
    for sets in itertools.product(("wx", "xy", "yz", "w", "wxyz"), repeat=3):
        found = compose([part(f"s{i}", who, steps[i]) for i, who in enumerate(sets)], DELTA)
        own = [[s for s, who in zip(steps, sets, strict=True) if u in who] for u in "wxyz"]
        assert found.bound is not None
        assert found.bound.epsilon == max(pld(*s) for s in own if s), sets


def test_a_stage_without_ids_counts_for_everybody_and_the_reason_says_so() -> None:
    found = compose([part("a", "x"), part("b", None), part("c", "z", NOISIER)], DELTA)
    assert [g.stages for g in found.groups] == [("a", "b"), ("b", "c")]
    assert found.bound is not None and found.bound.epsilon == pld(STEP, STEP)
    assert NO_IDS.format("b") in found.reason


def test_a_stage_of_another_run_counts_for_everybody() -> None:
    found = compose([part("a", "x"), replace(part("old/b", None), unknown=OTHER_RUN)], DELTA)
    assert found.bound is not None and found.bound.epsilon == pld(STEP, STEP)
    assert "another run" in found.reason and found.reason.startswith("sequential")


def test_replace_one_is_sequential_because_the_replacement_may_be_in_the_other_partition() -> None:
    swap = replace(STEP, adjacency="replace_one")
    found = compose([part("a", "x", swap), part("b", "z", swap)], DELTA)
    assert [g.stages for g in found.groups] == [("a", "b")] and "replace_one" in found.reason
    assert found.bound is not None and found.bound.epsilon == pld(swap, swap) and found.bound.rdp is None


def test_under_add_remove_only_partitions_are_disjoint_for_a_unit_that_is_not_there_yet() -> None:
    """Two sources that share nobody today: the neighbour has one person more, who may be in both."""
    more = replace(STEP, adjacency="add_remove")
    by_chance = compose([part("a", "x", more), part("b", "z", more)], DELTA)
    assert by_chance.bound is not None and by_chance.bound.epsilon == pld(more, more)
    halves = spans({"a": 0.5, "b": 0.5})
    parts = [Part(n, more, units(KEY, "d", [IDS[i] for i in assign(KEY, "d", IDS, s)], s)) for n, s in halves.items()]
    found = compose(parts, DELTA)
    assert found.bound is not None and found.bound.epsilon == pld(more) and found.reason.startswith("parallel")
    overlapping = [replace(parts[0], units=Units(parts[0].units.digests, (0.0, 0.6))), parts[1]]  # type: ignore[union-attr]
    assert [g.stages for g in compose(overlapping, DELTA).groups] == [("a", "b")]


def test_a_stage_without_noise_voids_whatever_it_touches() -> None:
    found = compose([part("a", "x"), part("b", "z", NONE)], DELTA)
    assert found.bound is None and [g.bound is None for g in found.groups] == [False, True]
    assert compose([part("a", "x"), part("b", None, NONE)], DELTA).bound is None


def test_an_adaptive_stage_is_composed_by_what_its_filter_lets_through() -> None:
    """Its planned schedule may change, so that a PLD of it bounds nothing: budgets add up at the smallest order."""
    first, second = (filter.choose_order(s, 3.0, DELTA) for s in (STEP, NOISIER))
    adaptive = [
        replace(part("a", "x"), alpha=first.alpha, rho_budget=first.rho_budget),
        replace(part("b", "x", NOISIER), alpha=second.alpha, rho_budget=second.rho_budget),
    ]
    alone = sequential(adaptive[:1], DELTA)
    assert alone is not None and alone.epsilon == pytest.approx(3.0, rel=1e-6) and alone.pld is None
    both, mixed = sequential(adaptive, DELTA), sequential([adaptive[0], part("c", "x", NOISIER)], DELTA)
    assert both is not None and both.epsilon > 3.0 and mixed is not None and mixed.epsilon > alone.epsilon
    order = min(first.alpha, second.alpha)
    assert both.epsilon == filter.epsilon_at(first.rho_budget + second.rho_budget, order, DELTA)


def test_nothing_declared_is_refused_not_free() -> None:
    with pytest.raises(ConfigError):
        compose([], DELTA)


def test_users_are_one_unit_in_all_sources_of_a_data_set() -> None:
    """Stages on two sources under one declared name: whoever has records in both pays for both, and nobody else."""
    user = replace(STEP, unit="user")
    letters = units(KEY, "people", ["ann", "ann", "bob", None, "ann"])
    pairs, others = units(KEY, "people", ["bob", "cid", "cid"]), units(KEY, "people", ["cid", "dan", "dan"])
    shared = compose([Part("sft", user, letters), Part("rm", user, pairs)], DELTA)
    assert shared.bound is not None and shared.bound.epsilon == pld(user, user)
    assert shared.reason.startswith("sequential")
    apart = compose([Part("sft", user, letters), Part("rl", user, others)], DELTA)
    assert apart.bound is not None and apart.bound.epsilon == pld(user) and apart.reason.startswith("parallel")
    chain = compose([Part("sft", user, letters), Part("rm", user, pairs), Part("rl", user, others)], DELTA)
    assert [g.stages for g in chain.groups] == [("sft", "rm"), ("rm", "rl")]
    assert not units(KEY, "strangers", ["ann", "bob"]).digests & letters.digests  # another data set: somebody else


def test_partitions_of_users_compose_in_parallel_however_they_are_sampled() -> None:
    """False: a user's records fall into two partitions, or the kind of sampling changes who is read."""
    rows = [u for u in IDS for _ in range(3)]
    found = {}
    for name, span in spans({"a": 0.5, "b": 0.5}).items():
        mine = [rows[i] for i in assign(KEY, "d", rows, span)]
        assert all(mine.count(u) == 3 for u in set(mine))
        found[name] = units(KEY, "d", mine, span)
    by_user = replace(STEP, unit="user", population=200)
    by_record = replace(by_user, population=600, records_per_user=3)
    split = compose([Part("a", by_user, found["a"]), Part("b", by_record, found["b"])], DELTA)
    assert split.bound is not None and split.bound.epsilon == max(pld(by_user), pld(by_record))
    again = compose([Part("a", by_user, found["a"]), Part("b", by_record, found["a"])], DELTA)
    assert again.bound is not None and again.bound.epsilon == pld(by_user, by_record) > split.bound.epsilon


def test_users_and_records_do_not_compose() -> None:
    """A data set whose stages protect different units has no one figure."""
    with pytest.raises(ConfigError, match="same unit"):
        compose([part("a", "x"), part("b", "x", replace(STEP, unit="user"))], DELTA)
