"""Two learner ranks, one of which dies or hangs: the group comes back as a whole, and noise was drawn once or never."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

KILL = "signal:SIGKILL"
FAULTS = [
    Fault("rank-1-sigkill-before-the-sum", "learner.update", "before", KILL, 1, where={"rank": 1}, noises=0),
    Fault("rank-1-sigkill-between-noise-and-save", "learner.step", "after", KILL, 2, where={"rank": 1}, noises=1),
    Fault("rank-0-sigkill-between-redeem-and-noise", "learner.noise", "before", KILL, 3, noises=0),
    Fault("rank-1-sigkill-amid-a-checkpoint", "learner.save", "before", KILL, 4, where={"rank": 1}, noises=1),
]
STEPS = 5
Done = tuple[Case, Seen]


@pytest.fixture(scope="module")
def done(chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    case, root = chaos.begin(FAULTS), tmp_path_factory.mktemp("ranks") / "out"
    config = configured(world, "ranks", STEPS, learner__num_workers=2)
    ended = run(config, root)
    chaos.end()
    assert ended is None, (ended, case.lines()[-20:])
    yield case, check(case, config, root, world)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_one_of_two_ranks(fault: Fault, done: Done) -> None:
    """False: it did not strike, half a group went on, or each rank drew noise of its own."""
    case, seen = done
    assert case.struck(fault) == 1
    assert fault.attempt not in seen.released and seen.noises[fault.attempt or 0] == fault.noises


def test_the_attempt_that_nothing_hit_was_released(done: Done) -> None:
    """False: a death cost more than the attempt in flight."""
    assert done[1].released == [STEPS]


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
