"""Permits and writers that are old, used or superseded: refused, and nothing is charged or given for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from dprlhf_ray.actors.accountant import AccountantActor
from dprlhf_ray.actors.mailbox import Mailbox
from dprlhf_ray.errors import DprlhfError, LedgerDamaged
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.permit import PermitRefused
from tests.chaos import oracle
from tests.privacy.ledger_place import LONG

DECLARED = [Declaration("notes", "rl", LONG, 8.0, 1e-5)]


def accountant(folder: Path) -> AccountantActor:
    found = AccountantActor(str(folder / "ledger.db"))
    found.declare(DECLARED)
    return found


def redeemed_twice(folder: Path) -> Callable[[], object]:
    office = accountant(folder)
    reserved = office.reserve("rl", "first")
    office.redeem(reserved.token, "first", "message-1")
    return lambda: office.redeem(reserved.token, "first", "message-2")


def of_an_old_incarnation(folder: Path) -> Callable[[], object]:
    office = accountant(folder)
    old = office.reserve("rl", "first")
    office.reserve("rl", "second")
    return lambda: office.redeem(old.token, "first", "message")


def taken_over_by_a_new_incarnation(folder: Path) -> Callable[[], object]:
    office = accountant(folder)
    old = office.reserve("rl", "first")
    office.reserve("rl", "second")
    return lambda: office.redeem(old.token, "second", "message")


def of_an_accountant_that_died(folder: Path) -> Callable[[], object]:
    old = accountant(folder).reserve("rl", "first")
    again = accountant(folder)
    return lambda: again.redeem(old.token, "first", "message")


def reserved_by_a_replaced_learner(folder: Path) -> Callable[[], object]:
    office = accountant(folder)
    office.reserve("rl", "first")
    office.reserve("rl", "second")
    return lambda: office.reserve("rl", "first")


def made_up(folder: Path) -> Callable[[], object]:
    office = accountant(folder)
    office.reserve("rl", "first")
    return lambda: office.redeem("0" * 32, "first", "message")


def reserved_at_a_fenced_accountant(folder: Path) -> Callable[[], object]:
    first = accountant(folder)
    first.reserve("rl", "first")
    accountant(folder)
    return lambda: first.reserve("rl", "first")


def declared_at_a_fenced_accountant(folder: Path) -> Callable[[], object]:
    first = accountant(folder)
    accountant(folder)
    return lambda: first.declare([Declaration("notes", "another", LONG, 8.0, 1e-5)])


REFUSED = [
    ("permit-redeemed-twice", redeemed_twice, PermitRefused, "redeemed before"),
    ("permit-of-an-old-incarnation", of_an_old_incarnation, PermitRefused, "no such permit"),
    ("permit-taken-over-by-a-new-incarnation", taken_over_by_a_new_incarnation, PermitRefused, "no such permit"),
    ("permit-of-an-accountant-that-died", of_an_accountant_that_died, PermitRefused, "no such permit"),
    ("permit-reserved-by-a-replaced-learner", reserved_by_a_replaced_learner, PermitRefused, "replaced"),
    ("permit-made-up", made_up, PermitRefused, "no such permit"),
    ("accountant-fenced-at-reserve", reserved_at_a_fenced_accountant, LedgerDamaged, "fenced"),
    ("accountant-fenced-at-declare", declared_at_a_fenced_accountant, LedgerDamaged, "fenced"),
]


@pytest.mark.parametrize(("fault", "error", "says"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_is_refused_in_one_line_and_charges_nothing(
    fault: Callable[[Path], Callable[[], object]], error: type[DprlhfError], says: str, tmp_path: Path
) -> None:
    """False: noise is drawn twice for one charge, for none, or by a learner that was replaced."""
    act = fault(tmp_path)
    before = oracle.charges(tmp_path / "ledger.db")
    with pytest.raises(error, match=says) as raised:
        act()
    assert "\n" not in str(raised.value)
    assert oracle.charges(tmp_path / "ledger.db") == before


# -------------------------------------------------------------------------------------------------------- mailbox


async def _old_reply(mailbox: Mailbox) -> None:
    await mailbox.register("first", {})
    seq = await mailbox.submit("first", "update", [()])
    await mailbox.register("second", {})
    await mailbox.reply("first", seq, "stale")
    assert await mailbox.result("first", seq, 0.1) == ("restarted", None)


async def _old_number(mailbox: Mailbox) -> None:
    await mailbox.register("first", {})
    old = await mailbox.submit("first", "update", [()])
    new = await mailbox.submit("first", "update", [()])
    await mailbox.reply("first", old, "stale")
    assert await mailbox.result("first", new, 0.1) == ("waiting", None)


async def _old_rank(mailbox: Mailbox) -> None:
    await mailbox.register("first", {})
    await mailbox.register("second", {})
    await mailbox.submit("second", "update", [()])
    assert await mailbox.next("first", 0, 0) is None


async def _old_driver(mailbox: Mailbox) -> None:
    await mailbox.register("first", {})
    await mailbox.register("second", {})
    assert await mailbox.submit("first", "update", [()]) == -1


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(_old_reply, id="mailbox-reply-of-an-old-incarnation"),
        pytest.param(_old_number, id="mailbox-reply-to-an-old-command"),
        pytest.param(_old_rank, id="mailbox-read-by-an-old-incarnation"),
        pytest.param(_old_driver, id="mailbox-command-for-an-old-incarnation"),
    ],
)
def test_a_stale_message_changes_nothing(fault: Callable[[Mailbox], object]) -> None:
    """False: an answer of a dead group is taken for that of the present one: a release that nobody made."""

    async def act() -> None:
        await fault(Mailbox())  # type: ignore[misc]

    asyncio.run(act())
