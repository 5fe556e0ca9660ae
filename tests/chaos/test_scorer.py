"""The scorer dies, hangs, raises or answers nonsense: it is asked again, or the run ends and can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray.actors.scorer import ScorerActor
from dprlhf_ray.config import ScorerConfig
from dprlhf_ray.errors import place_of
from tests.chaos import oracle
from tests.chaos.corrupt import fewer_rewards, more_rewards
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

KILL = "signal:SIGKILL"
GOES_ON = [
    Fault("scorer-sigkill-at-bring-up", "scorer.start", "after", KILL, 0),
    Fault("scorer-sigkill-while-scoring", "scorer.score", "before", KILL, 1),
    Fault("scorer-sigkill-between-scoring-and-reply", "scorer.score", "after", KILL, 2),
    Fault("scorer-hangs", "driver.draw", "after", "hang:scorer", 3),
    Fault("scorer-is-slow", "scorer.score", "before", "sleep:2", 4),
    Fault("scorer-values-not-finite", "scorer.function", "after", "call:tests.chaos.corrupt:nan_rewards", 5),
]
QUOTES = Fault("scorer-raises-quoting-records", "scorer.score", "before", "quote", len(GOES_ON))
STEPS = len(GOES_ON) + 1
Done = tuple[Case, Seen, BaseException | None]


@pytest.fixture(scope="module")
def done(chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """One run, each fault at another attempt; the last one ends it, and it is resumed."""
    case, root = chaos.begin([*GOES_ON, QUOTES]), tmp_path_factory.mktemp("scorer") / "out"
    config = configured(world, "scorer", STEPS)
    ended = run(config, root)
    assert oracle.charges(root / "ledger.db") == list(range(1, len(GOES_ON) + 1)), ended
    assert run(config, root, resume=True) is None
    chaos.end()
    yield case, check(case, config, root, world), ended


@pytest.mark.parametrize("fault", GOES_ON, ids=lambda f: f.id)
def test_it_is_asked_again(fault: Fault, done: Done) -> None:
    """False: the fault did not strike, or the attempt that it hit was lost."""
    case, seen, _ = done
    assert case.struck(fault) == 1 and (fault.attempt == 0 or fault.attempt in seen.released)
    if "hangs" in fault.id or "sigkill" in fault.id:
        assert case.came_back(fault, "scorer")


def test_scorer_raises_quoting_records(done: Done, world: World) -> None:
    """False: what is printed of its error quotes a record, or its attempt was released, or is not paid for."""
    case, seen, error = done
    assert case.struck(QUOTES) == 1 and isinstance(error, ValueError)
    assert not any(mark in place_of(error) for mark in world.marks)
    assert QUOTES.attempt not in seen.released and QUOTES.attempt in seen.charged
    assert not seen.noises[QUOTES.attempt or 0]


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(fewer_rewards, id="scorer-answers-too-few"),
        pytest.param(more_rewards, id="scorer-answers-too-many"),
    ],
)
def test_another_number_of_rewards_is_no_answer(corrupt: Callable[[Any, list[Any]], Any]) -> None:
    """False: rewards of one record go to another."""
    actor = ScorerActor(ScorerConfig(kind="python", function="tests.end_to_end.rewards:score"))
    plain = actor._scorer.score
    records = [(f"the movie {i} was", "good", 0.0) for i in range(3)]
    assert len(actor.score(records)) == 3
    actor._scorer.score = lambda pairs: corrupt((), plain(pairs))  # type: ignore[method-assign]
    with pytest.raises(ValueError):
        actor.score(records)


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
