"""No space left on the device, at everything that a run writes: the attempt is lost, or the run ends and is resumed."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from dprlhf_ray.actors.learner_group import LearnersFailed
from dprlhf_ray.errors import place_of
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

FULL = "enospc"
GOES_ON = [
    Fault("disk-full-before-a-checkpoint", "learner.save", "before", FULL, 1),
    Fault("disk-full-amid-a-checkpoint", "learner.half_saved", "before", FULL, 2),
]
EXPORT = Fault("disk-full-at-the-export-once", "learner.export", "before", FULL, 4)
ENDS = [
    (Fault("disk-full-at-the-metrics", "driver.metrics", "before", FULL, 3), OSError),
    (Fault("disk-full-at-the-export-for-good", "learner.export", "before", FULL, 4, times=99), LearnersFailed),
    (Fault("disk-full-at-the-stage-s-end", "driver.finish", "before", FULL, 4), OSError),
    (Fault("disk-full-at-the-certificate", "driver.certificate", "before", FULL, 4), OSError),
    (Fault("disk-full-at-the-report", "driver.report", "before", FULL, 4), OSError),
]
STEPS, FAILURES = 4, 2
Done = tuple[Case, Seen, dict[str, BaseException | None]]


@pytest.fixture(scope="module")
def done(chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """One run directory on a disk that is full again and again."""
    case, root = chaos.begin([]), tmp_path_factory.mktemp("disk") / "out"
    config = configured(world, "disk", STEPS, learner__max_failures=FAILURES)
    ended: dict[str, BaseException | None] = {}
    for i, (last, _) in enumerate(ENDS):
        once = [EXPORT] if last.point == "driver.finish" else []
        case.plan([*GOES_ON, *once, last])
        ended[last.id] = run(config, root, resume=i > 0)
        check(case, config, root, world, done=False)
        assert not (root / "certificate.json").exists() or last.point == "driver.report"
    case.plan([])
    assert run(config, root, resume=True) is None
    chaos.end()
    yield case, check(case, config, root, world), ended


@pytest.mark.parametrize("fault", [*GOES_ON, EXPORT], ids=lambda f: f.id)
def test_once_costs_an_attempt_at_most(fault: Fault, done: Done) -> None:
    """False: it did not strike, ended the run, or its attempt was released though its checkpoint was not written."""
    case, seen, _ = done
    assert case.struck(fault) == 1
    if fault in GOES_ON:
        assert fault.attempt not in seen.released and seen.noises[fault.attempt or 0] == 1


@pytest.mark.parametrize(("fault", "error"), ENDS, ids=[f.id for f, _ in ENDS])
def test_for_good_ends_the_run_and_says_so(fault: Fault, error: type[Exception], done: Done) -> None:
    """False: a run goes on that could not write what it released, or ends without a word on the disk."""
    case, seen, ended = done
    found = ended[fault.id]
    assert isinstance(found, error) and case.struck(fault) == (FAILURES + 1 if fault.times > 1 else 1)
    if isinstance(found, OSError):
        assert found.errno == errno.ENOSPC and place_of(found)
    else:
        assert "No space left" in str(found)
    assert seen.charged == list(range(1, STEPS + 1))


def test_a_full_disk_at_the_export_is_one_line(done: Done) -> None:
    """False: the operator reads a page of Ray's traceback to find that the disk is full."""
    assert "\n" not in str(done[2]["disk-full-at-the-export-for-good"])


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
