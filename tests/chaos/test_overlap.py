"""Faults while draws are generated ahead of the learners: what was in flight is lost and paid for, and no more."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from dprlhf_ray import pipeline
from dprlhf_ray.actors.fleet import Fleet
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

KILL = "signal:SIGKILL"
FAULTS = [
    Fault(
        "ahead-log-probs-not-finite", "replica.generate", "after", "call:tests.chaos.corrupt:log_probs_not_finite", 1
    ),
    Fault("ahead-replica-sigkill-while-generating", "replica.generate", "before", KILL, 3),
    Fault("ahead-learner-sigkill-between-redeem-and-noise", "learner.noise", "before", KILL, 4),
    Fault("ahead-accountant-sigkill-between-charge-and-reply", "accountant.charge", "after", KILL, 8),
    Fault("ahead-learner-sigkill-before-a-checkpoint", "learner.save", "before", KILL, 11),
    Fault("ahead-replica-hangs-while-generating", "replica.generate", "before", "signal:SIGSTOP", 13),
]
STEPS, AHEAD = 14, 1
Done = tuple[Case, Seen]


@pytest.fixture(scope="module")
def done(chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    case, root = chaos.begin(FAULTS), tmp_path_factory.mktemp("ahead") / "out"
    config = configured(world, "ahead", STEPS, rollout__staleness=AHEAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Fleet", functools.partial(Fleet, chunk_timeout_s=8.0, recovery_timeout_s=60.0))
        ended = run(config, root)
    chaos.end()
    assert ended is None, (ended, case.lines()[-20:])
    yield case, check(case, config, root, world)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_a_fault_with_a_draw_ahead(fault: Fault, done: Done) -> None:
    """False: it did not strike."""
    case, _ = done
    assert case.struck(fault) == 1


def test_deaths_cost_what_was_in_flight_and_no_more(done: Done) -> None:
    """False: a death of learner or accountant refunds or repeats a draw, or costs more than was asked for; or a
    replica's costs one at all."""
    case, seen = done
    deaths = [f for f in FAULTS if "learner" in f.id or "accountant" in f.id]
    lost = sorted(set(seen.charged) - set(seen.released))
    assert len(deaths) <= len(lost) <= len(deaths) * (1 + AHEAD)
    assert 4 in lost and 8 in lost and {1, 2} <= set(seen.released)
    assert seen.noises[4] == 0 and all(seen.noises[n] <= 1 for n in lost)


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
