"""A permit is random, single-use and bound to one learner incarnation; a repeated message gets the same answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dprlhf_ray.actors.accountant import AccountantActor
from dprlhf_ray.errors import BudgetExhausted
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.permit import PermitOffice, PermitRefused

STEP = DPStep("record", "zero_out", 10_000, 0.04, 2.0, 0.5, 3, 2, 5.0)


def test_a_permit_carries_what_was_charged_and_is_used_k_times() -> None:
    """K updates at sigma C and one metric release at sigma_m, no more of either."""
    office = PermitOffice()
    permit = office.redeem(office.issue("rl", 1, STEP, "learner-1"), "learner-1", "m1")
    assert (permit.stage, permit.attempt, permit.updates) == ("rl", 1, 3)
    assert [permit.spend_update() for _ in range(3)] == [1.0] * 3  # sigma C = 2.0 * 0.5
    assert permit.spend_metrics() == 5.0
    with pytest.raises(PermitRefused):
        permit.spend_update()
    with pytest.raises(PermitRefused):
        permit.spend_metrics()
    assert permit.token not in repr(permit) + permit.tag


def test_metrics_that_were_not_charged_cannot_be_released() -> None:
    office = PermitOffice()
    step = replace(STEP, metric_noise_multiplier=None)
    permit = office.redeem(office.issue("rl", 1, step, "learner-1"), "learner-1", "m1")
    with pytest.raises(PermitRefused):
        permit.spend_metrics()


def test_using_one_answer_does_not_refill_or_drain_the_office_copy() -> None:
    """What the learner spends is its own copy; the office hands out nothing to another message either way."""
    office = PermitOffice()
    token = office.issue("rl", 1, STEP, "learner-1")
    permit = office.redeem(token, "learner-1", "m1")
    permit.spend_update()
    with pytest.raises(PermitRefused):
        office.redeem(token, "learner-1", "m2")
    assert permit.updates_left == 2


def test_only_the_same_message_gets_the_same_answer() -> None:
    office = PermitOffice()
    token = office.issue("rl", 1, STEP, "learner-1")
    first = office.redeem(token, "learner-1", "m1")
    assert office.redeem(token, "learner-1", "m1") == first
    with pytest.raises(PermitRefused, match="redeemed before"):
        office.redeem(token, "learner-1", "m2")
    for stranger, message in (("learner-2", "m1"), ("", "m1"), ("learner-2", "m3")):
        with pytest.raises(PermitRefused):
            office.redeem(token, stranger, message)
    with pytest.raises(PermitRefused):
        office.redeem("0" * 32, "learner-1", "m1")
    with pytest.raises(PermitRefused):
        office.redeem(office.issue("rl", 2, STEP, "learner-1"), "learner-1", "")


def test_tokens_do_not_repeat_for_the_same_attempt() -> None:
    office = PermitOffice()
    assert len({office.issue("rl", 1, STEP, "learner-1") for _ in range(100)}) == 100


def test_a_replaced_learner_is_refused_and_its_permits_are_void() -> None:
    office = PermitOffice()
    old = office.issue("rl", 1, STEP, "learner-1")
    office.issue("rl", 2, STEP, "learner-2")
    with pytest.raises(PermitRefused):
        office.redeem(old, "learner-1", "m1")
    with pytest.raises(PermitRefused):
        office.issue("rl", 3, STEP, "learner-1")


def test_the_accountant_charges_before_it_permits_and_forgets_permits_not_charges(tmp_path: Path) -> None:
    url = str(tmp_path / "ledger.db")
    accountant = AccountantActor(url)
    accountant.declare([Declaration("reviews", "rl", STEP, 8.0, 1e-5)])
    reservation = accountant.reserve("rl", "learner-1")
    assert reservation.attempt == 1
    assert accountant.status()["stages"]["rl"]["attempts"] == 1
    assert accountant.redeem(reservation.token, "learner-1", "m1").attempt == 1
    with pytest.raises(PermitRefused):
        accountant.reserve("rl", "")
    assert accountant.status()["stages"]["rl"]["attempts"] == 1

    restarted = AccountantActor(url, anchor=accountant.head())
    assert restarted.status()["epoch"] == 2
    assert restarted.status()["stages"]["rl"]["attempts"] == 1
    with pytest.raises(PermitRefused):
        restarted.redeem(reservation.token, "learner-1", "m1")
    restarted.declare([Declaration("reviews", "rl", STEP, 8.0, 1e-5)])
    last = restarted.reserve("rl", "learner-2")
    cumulative = restarted.composition("reviews", 1e-5, {}).bound
    assert reservation.epsilon_spent is not None and last.epsilon_spent is not None and cumulative is not None
    assert reservation.epsilon_spent < last.epsilon_spent == cumulative.epsilon <= 8.0
    with pytest.raises(BudgetExhausted):
        restarted.reserve("rl", "learner-2")


def test_a_clip_only_stage_is_counted_but_has_no_epsilon(tmp_path: Path) -> None:
    accountant = AccountantActor(str(tmp_path / "ledger.db"))
    accountant.declare(
        [Declaration("reviews", "control", DPStep("record", "zero_out", 100, 0.5, 0.0, 1.0, 1, 3, None), None, 1e-5)]
    )
    assert accountant.reserve("control", "learner-1").epsilon_spent is None
    assert accountant.composition("reviews", 1e-5, {}).bound is None
