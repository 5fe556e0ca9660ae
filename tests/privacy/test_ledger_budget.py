"""Adaptive schedules are bounded by their filter, data sets by their budget, and neither grows by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.actors.accountant import AccountantActor
from dprlhf_ray.errors import BudgetExhausted, ConfigError, LedgerDamaged
from dprlhf_ray.privacy import accounting, budget, chain, filter
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.chain import Budget, Entry, Schedule
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.ledger_key import read_key
from dprlhf_ray.privacy.mechanism import DPStep
from tests.privacy.ledger_place import SMALL, Place

PLAN = replace(SMALL, steps=4)


# ------------------------------------------------------------------------------------------------------- adaptive


def test_adaptive_charges_stop_at_the_filter_and_never_above_the_target(place: Place) -> None:
    """Any mixture of draws that was let through costs at most the target, by PLDs of what they were."""
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", PLAN, 1.0, 1e-5, adaptive=True)])
    chosen = [PLAN, replace(PLAN, noise_multiplier=1.8, sampling_rate=0.02), replace(PLAN, sampling_rate=0.06)]
    let_through: list[DPStep] = []
    with pytest.raises(BudgetExhausted, match="too little"):
        for n in range(10_000):
            charge = ledger.charge("rl", chosen[n % 3])
            assert (charge.attempt, charge.step) == (n + 1, chosen[n % 3])
            let_through.append(charge.step)
    assert len(let_through) > 4  # not the plan's number but the filter ends it
    schedule = ledger.schedule("rl")
    assert schedule.alpha is not None
    assert sum(filter.rho(s, schedule.alpha) for s in let_through) <= schedule.rho <= schedule.rho_budget
    assert accounting.compose([replace(s, steps=1) for s in let_through], 1e-5).pld <= 1.0
    ledger.close()
    assert place.open().schedule("rl") == schedule  # replayed to the last bit
    bodies = [json.loads(e.body) for e in place.entries() if e.kind == "charge"]
    assert [DPStep(**b["step"]) for b in bodies] == [replace(s, steps=1) for s in let_through]


def test_a_refused_adaptive_charge_spends_nothing_and_a_cheaper_one_still_fits(place: Place) -> None:
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", PLAN, 1.0, 1e-5, adaptive=True)])
    before = ledger.schedule("rl")
    with pytest.raises(BudgetExhausted):
        ledger.charge("rl", replace(PLAN, noise_multiplier=0.1, sampling_rate=1.0))
    assert ledger.schedule("rl") == before
    assert ledger.charge("rl").attempt == 1


def test_what_has_no_divergence_or_other_neighbours_is_no_adaptive_charge(place: Place) -> None:
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", PLAN, 8.0, 1e-5, adaptive=True)])
    for step in (
        replace(PLAN, noise_multiplier=0.0),
        replace(PLAN, population=5_000),
        replace(PLAN, adjacency="add_remove"),
        replace(PLAN, unit="user"),
    ):
        with pytest.raises(ConfigError):
            ledger.charge("rl", step)
    with pytest.raises(ConfigError):
        ledger.declare([Declaration("reviews", "clip", replace(PLAN, noise_multiplier=0.0), None, 1e-5, adaptive=True)])
    assert ledger.spent("rl") == 0


def test_a_fixed_schedule_takes_its_own_step_only(place: Place) -> None:
    """Less noise than declared would break the certificate, which states the schedule."""
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    assert ledger.charge("rl", SMALL).attempt == 1
    for step in (replace(SMALL, noise_multiplier=1.0), replace(SMALL, sampling_rate=0.01)):
        with pytest.raises(ConfigError, match="fixed"):
            ledger.charge("rl", step)
    assert ledger.spent("rl") == 1


def test_fixed_and_adaptive_are_not_taken_for_each_other_after_a_restart(place: Place) -> None:
    place.open().declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    ledger = place.open()
    with pytest.raises(ConfigError, match="other parameters"):
        ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5, adaptive=True)])
    ledger.declare([Declaration("reviews", "second", SMALL, 8.0, 1e-5, adaptive=True)])
    ledger.charge("second")
    again = place.open()
    again.declare([Declaration("reviews", "second", SMALL, 8.0, 1e-5, adaptive=True)])
    with pytest.raises(ConfigError, match="other parameters"):
        again.declare([Declaration("reviews", "second", SMALL, 8.0, 1e-5)])
    assert again.spent("second") == 1


def _forged(place: Place, change: Callable[[Entry], str]) -> list[Entry]:
    """The place's entries, each body changed and the chain linked anew with the right key: only rules can tell."""
    key, state, forged = read_key(place.key), chain.ChainState(), []
    for e in place.entries():
        new = chain.seal(key, state, e.epoch, e.kind, e.dataset, e.stage, change(e))
        forged.append(new)
        state.seq, state.head = new.seq, new.hash
    return forged


def test_replay_refuses_charges_over_the_filter_and_silent_raises(place: Place) -> None:
    """Even with the right hashes: replay is a second check of the gate, not of the writer's arithmetic."""
    ledger = place.open()
    ledger.set_budget("reviews", 9.0, 1e-5)
    ledger.set_budget("reviews", 8.5, 1e-5)
    ledger.declare([Declaration("reviews", "rl", PLAN, 8.0, 1e-5, adaptive=True)])
    ledger.charge("rl")
    ledger.close()
    key = read_key(place.key)
    assert chain.replay(key, _forged(place, lambda e: e.body), {}).seq == 5
    for kind, field, value in (
        ("charge", "rho", 1e6), ("charge", "rho", -1.0), ("charge", "attempt", 2), ("schedule", "rho_budget", 1e-9),
        ("budget", "epsilon", 10.0),
    ):  # fmt: skip
        forged = _forged(
            place,
            lambda e, k=kind, f=field, v=value: (  # type: ignore[misc]
                chain.canonical(json.loads(e.body) | {f: v}) if e.kind == k and e.seq != 2 else e.body
            ),
        )
        with pytest.raises(LedgerDamaged):
            chain.replay(key, forged, {})


# -------------------------------------------------------------------------------------------------------- budgets


def test_what_is_declared_on_a_data_set_over_all_runs_fits_its_budget(place: Place) -> None:
    """Each stage is within its own target; together they are not within the data set's."""
    one = accounting.epsilon(SMALL, 1e-5).pld
    two = accounting.compose([SMALL, SMALL], 1e-5).pld
    ledger = place.open()
    ledger.set_budget("reviews", two, 1e-5)
    ledger.declare([Declaration("reviews", "run-1/rl", SMALL, one, 1e-5)])
    ledger.close()
    ledger = place.open()  # another run
    ledger.set_budget("reviews", two, 1e-5)
    ledger.declare([Declaration("reviews", "run-2/rl", SMALL, one, 1e-5)])
    with pytest.raises(BudgetExhausted, match="reviews"):
        ledger.declare([Declaration("reviews", "run-3/rl", SMALL, one, 1e-5)])
    with pytest.raises(BudgetExhausted):
        ledger.declare([Declaration("reviews", "run-3/rl", SMALL, 8.0, 1e-5, adaptive=True)])
    ledger.declare([Declaration("letters", "run-3/rl", SMALL, one, 1e-5)])  # another data set has its own
    ledger.declare([Declaration("reviews", "run-2/rl", SMALL, one, 1e-5)])  # a resumed run is not declared twice
    assert BudgetExhausted.exit_code == 3
    assert [e.kind for e in place.entries()] == ["open", "budget", "schedule", "open", "schedule", "schedule"]


def test_of_the_stages_of_a_run_all_are_declared_or_none(place: Place) -> None:
    """False: a run whose last stage is refused has spent the budget of the ones before it, and never runs them."""
    one = accounting.epsilon(SMALL, 1e-5).pld
    ledger = place.open()
    ledger.set_budget("reviews", one * 1.05, 1e-5)
    first, second = (Declaration("reviews", name, SMALL, one, 1e-5) for name in ("first", "second"))
    loud = replace(first, stage="loud", dataset="letters", step=replace(SMALL, noise_multiplier=0.1))
    changed = replace(first, step=replace(SMALL, steps=2))
    for refused, error in (
        ([first, second], BudgetExhausted),  # each fits by itself
        ([first, loud], ConfigError),
        ([first, changed], ConfigError),
    ):
        with pytest.raises(error):
            ledger.declare(refused)
        assert ledger.schedules() == {} == place.read().schedules
    ledger.declare([first, replace(second, dataset="letters"), first])
    ledger.declare([first])
    ledger.verify()
    assert [e.stage for e in place.entries() if e.kind == "schedule"] == ["first", "second"]
    assert place.read().schedules == ledger.schedules()


def test_a_budget_goes_down_freely_up_on_purpose_and_never_below_what_is_declared(place: Place) -> None:
    cost = accounting.epsilon(SMALL, 1e-5).pld
    ledger = place.open()
    ledger.set_budget("reviews", 8.0, 1e-5)
    ledger.declare([Declaration("reviews", "rl", SMALL, 4.0, 1e-5)])
    ledger.set_budget("reviews", 5.0, 1e-5)
    for epsilon, delta in ((6.0, 1e-5), (5.0, 1e-4), (4.0, 1e-4)):
        with pytest.raises(ConfigError, match="on purpose"):
            ledger.set_budget("reviews", epsilon, delta)
    ledger.set_budget("reviews", 6.0, 1e-5, raise_it=True)
    with pytest.raises(BudgetExhausted):
        ledger.set_budget("reviews", cost * 0.99, 1e-5)
    for epsilon, delta in ((0.0, 1e-5), (float("inf"), 1e-5), (float("nan"), 1e-5), (8.0, 0.0), (8.0, 1.0)):
        with pytest.raises(ConfigError):
            ledger.set_budget("letters", epsilon, delta)
    ledger.close()
    raised = [json.loads(e.body)["raised"] for e in place.entries() if e.kind == "budget"]
    assert raised == [False, False, True]
    assert place.open().budgets() == {"reviews": Budget(6.0, 1e-5)}


def test_what_guarantees_nothing_is_refused_on_a_budgeted_data_set(place: Place) -> None:
    clip_only = replace(SMALL, noise_multiplier=0.0, metric_noise_multiplier=None)
    ledger = place.open()
    ledger.set_budget("reviews", 8.0, 1e-5)
    with pytest.raises(ConfigError, match="clip only"):
        ledger.declare([Declaration("reviews", "control", clip_only, None, 1e-5)])
    ledger.declare([Declaration("letters", "control", clip_only, None, 1e-5)])
    with pytest.raises(ConfigError, match="clip only"):
        ledger.set_budget("letters", 8.0, 1e-5)


def test_fixed_and_adaptive_stages_on_one_data_set_add_up() -> None:
    """The sum is at least what the fixed stages cost alone, and at least the adaptive target."""
    kept = filter.choose_order(PLAN, 2.0, 1e-5)
    adaptive = Schedule("reviews", "a", PLAN, 2.0, 1e-5, alpha=kept.alpha, rho_budget=kept.rho_budget)
    fixed = Schedule("reviews", "f", SMALL, 8.0, 1e-5)
    assert budget.cost([adaptive], 1e-5) == pytest.approx(2.0, rel=1e-6)
    assert budget.cost([adaptive, fixed], 1e-5) > max(2.0, budget.cost([fixed], 1e-5))
    assert budget.cost([], 1e-5) == 0.0


def test_a_config_gives_one_budget_to_a_data_set_and_none_to_clip_only() -> None:
    stage = {"data": "a", "privacy": {"epsilon": 4.0}}
    two = {"a": {"dataset": "x", "budget": {"epsilon": 8, "delta": 1e-5}}, "b": {"dataset": "x"}}
    budgets = config_file.parse({"data": two, "stages": [stage]}).budgets()
    assert {k: b.epsilon for k, b in budgets.items()} == {"x": 8.0}
    two["b"]["budget"] = {"epsilon": 9, "delta": 1e-5}
    with pytest.raises(ConfigError, match="has another one"):
        config_file.parse({"data": two, "stages": [stage]})
    with pytest.raises(ConfigError, match="clip_only is refused"):
        config_file.parse({"data": {"a": {"budget": {"epsilon": 8, "delta": 1e-5}}},
                           "stages": [{"data": "a", "privacy": {"mode": "clip_only"}}]})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- meter


def test_the_meter_is_never_too_low_and_computes_few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure for each of a million attempts would make every charge slower than the one before."""
    step = replace(SMALL, steps=1_000_000, noise_multiplier=50.0, metric_noise_multiplier=None)
    schedule = Schedule("reviews", "rl", step, 100.0, 1e-5)
    asked: set[int] = set()
    monkeypatch.setattr(accounting, "spent", lambda s, attempts, delta: asked.add(attempts) or attempts * 1e-5)
    last = 0.0
    for n in range(0, 1_000_001, 101):
        schedule.spent = n
        figure = budget.meter(schedule)
        assert figure is not None and max(last, n * 1e-5) <= figure <= n * 1e-5 * (1 + 1 / 64)
        last = figure
    assert len(asked) < 1100
    schedule.spent = step.steps
    assert budget.meter(schedule) == 10.0


def test_an_adaptive_permit_carries_the_step_that_was_charged(tmp_path: Path) -> None:
    """A permit for the plan's noise under a charge for more noise would release more than was paid for."""
    accountant = AccountantActor(str(tmp_path / "ledger.db"))
    accountant.declare([Declaration("reviews", "rl", PLAN, 8.0, 1e-5, adaptive=True)])
    with pytest.raises(ConfigError, match="may change"):  # the learner clips to the declared norm
        accountant.reserve("rl", "learner-1", replace(PLAN, noise_multiplier=6.0, clip_norm=0.25))
    noisier = replace(PLAN, noise_multiplier=6.0)
    reserved = accountant.reserve("rl", "learner-1", noisier)
    permit = accountant.redeem(reserved.token, "learner-1", "m1")
    assert permit.spend_update() == 6.0 * PLAN.clip_norm
    first = reserved.epsilon_spent
    second = accountant.reserve("rl", "learner-1").epsilon_spent
    assert first is not None and second is not None and 0 < first < second <= 8.0


def test_a_budget_at_a_delta_that_allows_anything_is_refused(tmp_path: Path) -> None:
    """At delta 0.5 every stage would cost nothing."""
    ledger = Ledger.open(tmp_path / "ledger.db")
    ledger.set_budget("reviews", 1.0, 0.5)
    with pytest.raises(ConfigError, match="1/N"):
        ledger.declare([Declaration("reviews", "rl", PLAN, 8.0, 1e-5)])
    ledger.close()
