"""The scorer dies, hangs, raises or answers nonsense: it is asked again, or the run ends and can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dprlhf_ray.errors import place_of
from tests.chaos import oracle
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

KILL = "signal:SIGKILL"
GOES_ON = [
    Fault("scorer-sigkill-at-bring-up", "scorer.start", "after", KILL, 0),
    Fault("scorer-sigkill-while-scoring", "scorer.score", "before", KILL, 1),
    Fault("scorer-sigkill-between-scoring-and-reply", "scorer.score", "after", KILL, 2),
    Fault("scorer-hangs-until-it-is-killed", "driver.draw", "after", "stop:scorer/5", 3),
    Fault("scorer-is-slow", "scorer.score", "before", "sleep:2", 4),
    Fault("scorer-values-not-finite", "scorer.function", "after", "call:tests.chaos.corrupt:nan_rewards", 5),
]
ENDS = [
    Fault("scorer-answers-too-few", "scorer.function", "after", "call:tests.chaos.corrupt:fewer_rewards"),
    Fault("scorer-answers-too-many", "scorer.function", "after", "call:tests.chaos.corrupt:more_rewards"),
    Fault("scorer-raises-quoting-records", "scorer.score", "before", "quote"),
]
STEPS = len(GOES_ON) + len(ENDS)


@pytest.fixture(scope="module")
def done(
    chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, Seen, dict[str, BaseException | None]]]:
    """One run directory: each fault at another attempt; those of ENDS end the run, which is resumed."""
    case, root = chaos.begin([]), tmp_path_factory.mktemp("scorer") / "out"
    config = configured(world, "scorer", STEPS)
    ended: dict[str, BaseException | None] = {}
    for i, last in enumerate(ENDS):
        attempt = len(GOES_ON) + 1 + i
        case.plan([*GOES_ON, replace(last, attempt=attempt)])
        ended[last.id] = run(config, root, resume=i > 0)
        assert oracle.charges(root / "ledger.db") == list(range(1, attempt + 1)), ended
    assert run(config, root, resume=True) is None
    chaos.end()
    yield case, check(case, config, root, world), ended


@pytest.mark.parametrize("fault", GOES_ON, ids=lambda f: f.id)
def test_it_is_asked_again(fault: Fault, done: tuple[Case, Seen, dict[str, BaseException | None]]) -> None:
    """False: the fault did not strike, or the attempt that it hit was lost."""
    case, seen, _ = done
    assert case.struck(fault) == 1 and (fault.attempt == 0 or fault.attempt in seen.released)
    if "killed" in fault.id or "sigkill" in fault.id:
        assert case.came_back(fault, "scorer")


@pytest.mark.parametrize("fault", ENDS, ids=lambda f: f.id)
def test_nonsense_ends_the_run_without_its_text(
    fault: Fault, done: tuple[Case, Seen, dict[str, BaseException | None]], world: World
) -> None:
    """False: rewards of one record go to another, or what is printed of the error quotes a record."""
    case, seen, ended = done
    error = ended[fault.id]
    assert case.struck(fault) == 1 and error is not None
    assert isinstance(error, ValueError) and not any(mark in place_of(error) for mark in world.marks)
    lost = len(GOES_ON) + 1 + ENDS.index(fault)
    assert lost not in seen.released and lost in seen.charged and not seen.noises[lost]


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
