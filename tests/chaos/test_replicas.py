"""Replicas die, hang or fail at each point of a step: the same attempt is served by others, and none is lost."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import pipeline
from dprlhf_ray.actors import control
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.stage_run import Roles
from tests.chaos import points
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

KILL, STOP = "signal:SIGKILL", "signal:SIGSTOP"
FAULTS = [
    Fault("replica-sigkill-at-bring-up", "replica.start", "after", KILL, 0),
    Fault("replica-sigkill-between-load-and-check-at-bring-up", "replica.check", "before", KILL, 0),
    Fault("replica-sigkill-while-generating", "replica.generate", "before", KILL, 1),
    Fault("replica-sigkill-between-generating-and-reply", "replica.generate", "after", KILL, 2),
    Fault("replica-sigkill-while-loading", "replica.load", "before", KILL, 3),
    Fault("replica-sigkill-between-load-and-check", "replica.load", "after", KILL, 4),
    Fault("replica-hangs-while-generating", "replica.generate", "before", STOP, 5),
    Fault("replica-is-slow", "replica.generate", "before", "sleep:2", 6),
    Fault("replica-raises-quoting-its-prompts", "replica.generate", "before", "quote", 7),
    Fault("replica-hangs-while-loading", "replica.load", "before", STOP, 8),
    Fault("replicas-sigkill-all-at-once", "driver.generate", "before", "kill:replica", 9),
    Fault("weights-damaged-on-the-way", "weights.unpack", "after", "call:tests.chaos.corrupt:damaged", 10),
    Fault("replica-added-while-generating", "replica.generate", "before", "call:tests.chaos.corrupt:ask_for_three", 10),
    Fault("scale-request-is-garbage", "driver.generate", "before", "call:tests.chaos.corrupt:scale_garbage", 11),
    Fault("replicas-sigkill-before-the-last-evaluation", "driver.generate", "before", "kill:replica", 12,
          where={"public": True}),
]  # fmt: skip
STEPS = 12
# restarts of replicas that each fault causes, at least
RESTARTS = {n: 1 for n in (1, 2, 3, 4, 5, 7, 8)} | {0: 2, 9: 2}


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether processes have ended, after a while."""
    deadline = time.monotonic() + seconds
    while any(map(points.alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(points.alive, pids))


@pytest.fixture(scope="module")
def done(
    chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, Seen, dict[int, dict[str, Any]], Path]]:
    """One run with all of them, each at another attempt, and the fleet's status after each."""
    case, root = chaos.begin(FAULTS), tmp_path_factory.mktemp("replicas") / "out"
    (chaos.folder / "run_dir").write_text(str(root))
    config = configured(world, "replicas", STEPS, rollout__replicas=2)
    after: dict[int, dict[str, Any]] = {}

    def look(attempt: int, roles: Roles) -> None:
        assert roles.fleet is not None
        hung = [
            e["pid"] for f in FAULTS if f.attempt == attempt and f.action == STOP for e in case.passages("fault", f.id)
        ]
        after[attempt] = roles.fleet.status() | {"hung": gone(hung)}

    with pytest.MonkeyPatch.context() as patch:
        impatient = functools.partial(Fleet, chunk_timeout_s=8.0, recovery_timeout_s=45.0, max_restarts=40)
        patch.setattr(pipeline, "Fleet", impatient)
        ended = run(config, root, on_step=look)
    chaos.end()
    assert ended is None, (ended, case.lines()[-20:])
    yield case, check(case, config, root, world), after, root


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_a_replica_s_fault(fault: Fault, done: tuple[Case, Seen, dict[int, dict[str, Any]], Path]) -> None:
    """False: it did not strike or changed nothing, or the attempt that it hit was lost or repeated."""
    case, seen, after, root = done
    assert case.struck(fault) == 1
    assert seen.released == seen.charged == list(range(1, STEPS + 1))
    attempt = fault.attempt or 0
    if attempt in RESTARTS or attempt == STEPS or "damaged" in fault.id:
        assert case.came_back(fault, "replica") and after[STEPS]["restarts"] >= sum(RESTARTS.values())
    assert after[max(1, attempt)]["hung"], "a replica that hung and was replaced still holds its memory"
    if fault.id == "replica-is-slow":
        assert after[attempt]["restarts"] == after[attempt - 1]["restarts"]
    if fault.id == "replica-added-while-generating":
        assert (after[9]["replicas"], after[11]["replicas"]) == (2, 3)
    if fault.id == "scale-request-is-garbage":
        assert json.loads((root / control.ANSWER).read_text())["asked"] == 3 and after[STEPS]["replicas"] == 3


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
