"""Whole runs over each way that weights can take, with a learner killed on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import pipeline
from dprlhf_ray.stage_run import Roles
from tests.end_to_end.runs import World, attempts
from tests.end_to_end.test_faults import learner_processes, released_attempts

STEPS = 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__transport": "gloo", "rollout__replicas": 2},
        {"rollout__transport": "gloo", "rollout__staleness": 1},
        {"rollout__weights": "adapter", "rollout__engine": "vllm"},
    ],
    ids=["gloo", "gloo-ahead", "adapter"],
)
def test_a_run_goes_on_over_a_learner_that_was_killed(world: World, tmp_path: Path, changes: dict[str, Any]) -> None:
    """False: engines wait for a publisher that is dead, or take its weights for the new one's."""
    root, killed = tmp_path / "out", []

    def kill(attempt: int, roles: Roles) -> None:
        if attempt == 2:
            for process in learner_processes():
                killed.append(process.pid)
                process.kill()

    pipeline.run(world.config(STEPS, **changes), root, on_step=kill)
    released = released_attempts(root)
    assert killed and attempts(root) == list(range(1, STEPS + 1))
    assert released[:2] == [1, 2] and released[-1] == STEPS and len(released) < STEPS
