"""Stages on data declared public are counted and cost nothing; a data set is private or public, never both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dprlhf_ray.actors.accountant import AccountantActor
from dprlhf_ray.config import RLStage
from dprlhf_ray.errors import BudgetExhausted, ConfigError, LedgerDamaged
from dprlhf_ray.privacy import budget, chain
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger_key import read_key
from dprlhf_ray.privacy.planning import METRIC_NOISE_WITHOUT_EPSILON, plan_stage
from tests.privacy.ledger_place import SMALL, Place

FREE = replace(SMALL, noise_multiplier=0.0)
PUBLIC = Declaration("openings", "sft", FREE, None, 1e-5, public=True)
PRIVATE = Declaration("reviews", "rl", SMALL, 8.0, 1e-5)


def test_a_public_stage_is_counted_and_resumed_and_costs_nothing(tmp_path: Path) -> None:
    accountant = AccountantActor(str(tmp_path / "ledger.db"))
    accountant.declare([PUBLIC, PRIVATE])
    reserved = accountant.reserve("sft", "learner-1")
    assert reserved.attempt == 1 and reserved.epsilon_spent is None
    permit = accountant.redeem(reserved.token, "learner-1", "m1")
    assert permit.spend_update() == 0.0
    accountant.close()
    again = AccountantActor(str(tmp_path / "ledger.db"))
    again.declare([PUBLIC, PRIVATE])
    assert [again.reserve("sft", "learner-2").attempt for _ in range(2)] == [2, 3]
    with pytest.raises(BudgetExhausted):
        again.reserve("sft", "learner-2")
    assert again.spent("sft") == FREE.steps
    assert {k: s["guarantee"] for k, s in again.status()["stages"].items()} == {"sft": "public", "rl": "dp"}
    again.set_budget("reviews", 8.0, 1e-5)
    bound = again.composition("reviews", 1e-5, {"sft": None, "rl": None}).bound
    assert bound is not None and bound.epsilon == budget.cost([again._ledger.schedule("rl")], 1e-5)
    with pytest.raises(ConfigError, match="nothing was declared"):
        again.composition("openings", 1e-5, {})


@pytest.mark.parametrize("first", [PUBLIC, PRIVATE, replace(PRIVATE, step=FREE, epsilon=None)])
def test_a_data_set_is_never_private_and_public_under_one_name(place: Place, first: Declaration) -> None:
    """False: data that paid, or were controls, are declared public later, and are read without noise; or the other way
    round. Also by another run that shares the ledger, and inside one run."""
    private = PRIVATE if first.public else PUBLIC
    second = replace(private, dataset=first.dataset, stage="second")
    ledger = place.open()
    with pytest.raises(ConfigError, match=f"data.{first.dataset}.public"):
        ledger.declare([first, second])
    assert ledger.schedules() == {}
    ledger.declare([first])
    ledger = place.open()
    with pytest.raises(ConfigError, match=f"data.{first.dataset}.public") as refused:
        ledger.declare([second])
    assert "\n" not in str(refused.value)
    ledger.declare([replace(second, dataset="other")])
    with pytest.raises(ConfigError, match="other parameters"):
        ledger.declare([replace(first, public=not first.public)])


def test_a_data_set_with_a_budget_is_private(place: Place) -> None:
    ledger = place.open()
    ledger.set_budget("openings", 8.0, 1e-5)
    with pytest.raises(ConfigError, match="budget"):
        ledger.declare([PUBLIC])
    ledger.declare([replace(PUBLIC, dataset="other")])
    with pytest.raises(ConfigError, match="declared public"):
        ledger.set_budget("other", 8.0, 1e-5)
    assert set(place.read().budgets) == {"openings"}


@pytest.mark.parametrize(
    "change", [{"epsilon": 8.0}, {"step": SMALL}, {"step": SMALL, "epsilon": 8.0}, {"adaptive": True}]
)
def test_what_has_a_target_or_noise_is_not_declared_as_public(place: Place, change: dict[str, object]) -> None:
    """False: a private stage slips out of composition as a public one."""
    with pytest.raises(ConfigError, match="mode public"):
        place.open().declare([replace(PUBLIC, **change)])  # type: ignore[arg-type]


def test_what_was_declared_public_is_covered_by_the_chain(place: Place) -> None:
    """False: whoever edits the ledger turns a private stage into a public one, or replay lets both on one data set."""
    ledger = place.open()
    ledger.declare([PUBLIC])
    ledger.declare([replace(PRIVATE, dataset="openings2")])
    ledger.close()
    bodies = [json.loads(e.body) for e in place.entries() if e.kind == "schedule"]
    assert [b["guarantee"] for b in bodies] == ["public", "dp"] and bodies[0]["epsilon"] is None
    assert place.read().schedules["sft"].public
    key, state, forged = read_key(place.key), chain.ChainState(), []
    for e in place.entries():  # linked anew with the right key: only the rule can tell
        new = chain.seal(key, state, e.epoch, e.kind, e.dataset.removesuffix("2"), e.stage, e.body)
        forged.append(new)
        state.seq, state.head = new.seq, new.hash
    with pytest.raises(LedgerDamaged, match="both"):
        chain.replay(key, forged, {})
    public = chain.canonical(bodies[1] | {"guarantee": "public", "epsilon": None})
    place.alter(f"UPDATE entries SET body = '{public}' WHERE stage = 'rl'")
    with pytest.raises(LedgerDamaged):
        place.read()


def test_a_plan_on_public_data_has_no_target_and_no_noise_but_on_its_metrics() -> None:
    stage = RLStage.model_validate({"privacy": {"mode": "public", "expected_batch": 50, "delta": 0.5}})
    plan = plan_stage(stage, 100, dataset="openings")
    assert (plan.public, plan.guarantee, plan.target, plan.epsilon, plan.certified) == (True, "public", *[None] * 3)
    assert plan.step.noise_multiplier == 0 and plan.step.metric_noise_multiplier == METRIC_NOISE_WITHOUT_EPSILON
    declared = Declaration.of(stage, plan)
    assert declared == Declaration("openings", "rl", plan.step, None, 0.5, public=True)
    control = plan_stage(
        stage.model_copy(update={"privacy": stage.privacy.model_copy(update={"mode": "clip_only"})}), 100
    )
    assert (control.public, control.guarantee) == (False, "none")
