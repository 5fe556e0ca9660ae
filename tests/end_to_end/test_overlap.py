"""A run whose draws are generated ahead: real engine, real learner, real ledger, and a learner killed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import pipeline
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.observability.metrics import read_metrics
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.stage_run import Roles
from tests.end_to_end.runs import World, attempts
from tests.end_to_end.test_faults import learner_processes

STEPS, STALENESS = 7, 1


@pytest.mark.slow
def test_draws_ahead_are_paid_for_and_what_was_in_flight_at_a_death_stays_paid(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: a draw is generated before its charge, with weights of another version than its number says, or a death
    with two draws in flight refunds one of them, uses one twice or ends the run."""
    events: list[tuple[str, int]] = []  # ("sync", version), ("draw", charges on disk)
    plain_sync, plain_generate = Fleet.sync, Fleet.generate

    def sync(fleet: Fleet, handle: Any, reference: Any) -> None:
        plain_sync(fleet, handle, reference)
        events.append(("sync", handle.version))

    def generate(fleet: Fleet, prompts: Any, count: int) -> Any:
        if len(prompts) != 8:  # not the public ones
            events.append(("draw", len(attempts(root))))
        return plain_generate(fleet, prompts, count)

    def kill(attempt: int, roles: Roles) -> None:
        if attempt == 3:
            for process in learner_processes():
                process.kill()

    root = tmp_path / "run"
    monkeypatch.setattr(Fleet, "sync", sync)
    monkeypatch.setattr(Fleet, "generate", generate)
    pipeline.run(world.config(STEPS, rollout__staleness=STALENESS), root, on_step=kill)

    released = [row["attempt"] for row in read_metrics(root) if row["stage"] == "rl"]
    lost = set(range(1, STEPS + 1)) - set(released)
    assert 1 <= len(lost) <= 1 + STALENESS and released[:3] == [1, 2, 3] and released[-1] == STEPS
    assert Ledger.read(root / "ledger.db").schedules["rl"].spent == STEPS
    draws = [n for what, n in events if what == "draw"]
    assert draws == list(range(1, STEPS + 1))  # each after its own charge, and none twice
    before = events[: events.index(("draw", 4)) + 1]
    assert before == [("sync", 0), ("draw", 1), ("draw", 2), ("sync", 1), ("draw", 3), ("sync", 2), ("draw", 4)]
    versions = [n for what, n in events if what == "sync"]
    assert versions[-1] == STEPS - len(lost)
