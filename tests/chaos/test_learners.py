"""A learner dies, lies or hangs at each point of a step: the attempt in flight is lost, paid for, never repeated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

KILL, GONE = "signal:SIGKILL", "call:tests.chaos.corrupt:weights_gone"
BRING_UP = [
    Fault("learner-sigkill-at-bring-up", "learner.start", "after", KILL, 0),
    Fault("learner-sigkill-at-first-publish", "learner.publish", "after", KILL, 0),
    Fault("learner-sigkill-before-redeem", "learner.update", "before", KILL, 1, noises=0),
    Fault("learner-sigkill-while-replicas-generate", "driver.generate", "before", "kill:learner", 2, noises=0),
]
NOISE = [
    Fault("learner-sigkill-between-redeem-and-noise", "learner.noise", "before", KILL, 1, noises=0),
    Fault("learner-sigkill-between-noise-and-step", "learner.noise", "after", KILL, 2, noises=1),
    Fault("learner-sigkill-between-step-and-publish", "learner.step", "after", KILL, 3, noises=1),
    Fault("learner-raises-quoting-a-record", "learner.update", "before", "quote", 4, noises=0),
]
PUBLISH = [
    Fault("learner-sigkill-between-publish-and-reply", "learner.publish", "after", KILL, 1, noises=1),
    Fault("learner-sigkill-between-reply-and-fetch", "driver.call", "after", "kill:learner", 2, noises=1,
          where={"method": "update"}),
    Fault("learner-noise-not-finite", "learner.noise", "after", "call:tests.chaos.corrupt:not_finite", 3, noises=1),
    Fault("learner-hangs-before-redeem", "learner.update", "before", "signal:SIGSTOP", 4, noises=0),
    Fault("weights-gone-before-a-replica-has-them", "weights.fetch", "before", GONE, 5, noises=1),
]  # fmt: skip
FILES = [
    Fault("learner-sigkill-before-a-checkpoint", "learner.save", "before", KILL, 2, noises=1),
    Fault("learner-sigkill-amid-a-checkpoint", "learner.half_saved", "before", KILL, 3, noises=1),
    Fault("learner-sigkill-while-restoring", "learner.restore", "after", KILL, 3, noises=1),
    Fault("learner-sigkill-between-checkpoint-and-reply", "learner.save", "after", KILL, 4, noises=1),
]
EXPORT = [
    Fault("learner-sigkill-before-the-export", "learner.export", "before", KILL, 1),
    Fault("learner-sigkill-between-export-and-reply", "learner.export", "after", KILL, 1),
]
RUNS = {"bring-up": BRING_UP, "noise": NOISE, "publish": PUBLISH, "files": FILES, "export": EXPORT}
Done = tuple[Case, Seen, int]


@pytest.fixture(scope="module")
def done(chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """By name, a run with a few of them, each at another attempt, and one attempt more; made when it is asked for."""

    @functools.cache
    def made(name: str) -> Done:
        faults = RUNS[name]
        steps = 1 + max(f.attempt or 0 for f in faults) - (name == "export")
        case, root = chaos.begin(faults), tmp_path_factory.mktemp(name) / "out"
        config = configured(world, name, steps)
        ended = run(config, root)
        chaos.end()
        assert ended is None, (ended, case.lines()[-20:])
        return case, check(case, config, root, world), steps

    return made


@pytest.mark.parametrize(("name", "fault"), [pytest.param(n, f, id=f.id) for n, faults in RUNS.items() for f in faults])
def test_a_learner_s_fault(name: str, fault: Fault, done: Callable[[str], Done]) -> None:
    """False: it did not strike, an attempt that it hit was released, or has another number of noises than it got to."""
    case, seen, _ = done(name)
    assert case.struck(fault) == 1
    if fault.noises is not None:
        assert fault.attempt not in seen.released and seen.noises[fault.attempt or 0] == fault.noises


@pytest.mark.parametrize("name", RUNS)
def test_attempts_that_nothing_hit_were_released(name: str, done: Callable[[str], Done]) -> None:
    """False: a death cost more than the attempt in flight."""
    _, seen, steps = done(name)
    assert seen.released == [
        n for n in range(1, steps + 1) if n not in {f.attempt for f in RUNS[name] if f.noises is not None}
    ]


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
