"""The oracle of this folder sees what it is there for: each rule is broken once, on a real ledger and metrics file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray.config import TrackingConfig
from dprlhf_ray.observability.metrics import MetricsLog
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger import Ledger
from tests.chaos import oracle
from tests.chaos.oracle import Seen
from tests.privacy.ledger_place import LONG

GOOD = Seen([1, 2, 3], 3, Counter({1: 1, 2: 1}), [1, 2])


def passage(point: str, phase: str, attempt: int) -> dict[str, Any]:
    return {"point": point, "phase": phase, "attempt": attempt, "pid": 1}


def a_run(root: Path, charged: int, released: int) -> None:
    """What lies in a run's folder after so many charges and released rows."""
    ledger = Ledger.open(root / "ledger.db")
    ledger.declare([Declaration("notes", "rl", LONG, 8.0, 1e-5)])
    for _ in range(charged):
        ledger.charge("rl")
    ledger.close()
    log = MetricsLog(root, TrackingConfig(), "planted")
    for attempt in range(1, released + 1):
        log.write("rl", attempt, [])


def journal(draws: int, noised: list[int]) -> list[dict[str, Any]]:
    lines = [passage("driver.draw", "before", n + 1) for n in range(draws)]
    return lines + [passage("learner.noise", "after", n) for n in noised]


def test_what_is_in_order_passes(tmp_path: Path) -> None:
    """False: the oracle cries wolf, and nobody would listen."""
    a_run(tmp_path, charged=3, released=2)
    seen = oracle.look(journal(3, [1, 2]), tmp_path)
    assert seen == GOOD and oracle.problems(seen) == []


@pytest.mark.parametrize(
    ("draws", "noised", "released", "says"),
    [
        (4, [1, 2], 2, "4 draws, 3 charges"),
        (3, [1, 2, 4], 2, "noise without a charge"),
        (3, [1, 1, 2], 2, "noised 2 times"),
        (3, [1, 2, 3], 4, "released without a charge"),
        (3, [1], 2, "attempt 2 was released after 0"),
        (3, [1, 2, 3, 3], 2, "4 noises, 3 charges"),
    ],
)
def test_a_planted_under_count_is_caught(
    draws: int, noised: list[int], released: int, says: str, tmp_path: Path
) -> None:
    """False: a run that draws, noises or releases more than it pays for would pass every test of this folder."""
    a_run(tmp_path, charged=3, released=released)
    found = oracle.problems(oracle.look(journal(draws, noised), tmp_path))
    assert any(says in line for line in found), found


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda s: replace(s, charged=[1, 3, 4]), "1..n"),
        (lambda s: replace(s, charged=[1, 2, 2, 3]), "1..n"),
        (lambda s: replace(s, released=[1, 1]), "released twice"),
    ],
)
def test_numbers_with_a_gap_or_twice_are_caught(broken: Callable[[Seen], Seen], says: str) -> None:
    """False: a refunded or repeated attempt goes unseen."""
    assert any(says in line for line in oracle.problems(broken(GOOD)))


def test_two_updates_a_draw_are_two_noises_and_no_more() -> None:
    """False: with K updates the count of noises means nothing."""
    seen = replace(GOOD, noises=Counter({1: 2, 2: 2, 3: 1}))
    assert oracle.problems(seen, updates=2) == []
    assert oracle.problems(replace(seen, noises=Counter({1: 3, 2: 2})), updates=2)
    assert oracle.problems(replace(seen, noises=Counter({1: 1, 2: 2})), updates=2)


def test_no_ledger_is_no_charge(tmp_path: Path) -> None:
    """False: a ledger that is gone would count as one that agrees."""
    assert oracle.problems(oracle.look(journal(1, []), tmp_path)) == ["1 draws, 0 charges"]
    assert json.dumps(journal(1, []))
