"""Replicas that lie or keep dying end the run, in one line; what is resumed continues and completes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dprlhf_ray import pipeline
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.errors import DprlhfError, RolloutFailed, SyncFailed
from tests.chaos import oracle
from tests.chaos.oracle import Seen
from tests.chaos.plan import Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks


def corrupt(name: str) -> str:
    return f"call:tests.chaos.corrupt:{name}"


@dataclass(frozen=True)
class End:
    """A fault of the next attempt and how the run ends (None: it goes on, and the attempt is lost)."""

    fault: Fault
    error: type[DprlhfError] | None
    says: str = ""


RUNS = {
    "answers": [
        End(Fault("replica-answers-one-row-less", "replica.generate", "after", corrupt("fewer_rows")), RolloutFailed),
        End(Fault("replica-answers-from-another-version", "replica.generate", "after", corrupt("other_version")),
            RolloutFailed, "another weight version"),
        End(Fault("replica-answers-outside-the-vocabulary", "replica.generate", "after", corrupt("outside_vocabulary")),
            None),
        End(Fault("replica-answers-a-completion-too-many", "replica.generate", "after", corrupt("one_more_completion")),
            RolloutFailed, "another number of completions"),
        End(Fault("replica-answers-a-completion-less", "replica.generate", "after", corrupt("one_completion_less")),
            RolloutFailed, "another number of completions"),
    ],
    "weights": [
        End(Fault("replica-loads-other-weights", "replica.load", "after", corrupt("other_weights")), SyncFailed,
            "sync_tolerance"),
        End(Fault("replica-checks-with-nan", "replica.check", "after", corrupt("nan_log_probs")), SyncFailed),
        End(Fault("replica-keeps-the-old-weights", "replica.load", "before", corrupt("keep_old_weights")), SyncFailed,
            "log-probabilities"),
    ],
    "deaths": [
        End(Fault("replicas-that-keep-dying", "replica.generate", "before", "signal:SIGKILL", times=99), RolloutFailed,
            "restarts were used up"),
        End(Fault("replicas-that-die-at-every-start", "replica.start", "before", "signal:SIGKILL", times=99),
            RolloutFailed, "restarts were used up"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """By what the run ended, how often the fault struck, which attempt it hit, charges after."""

    error: BaseException | None
    struck: int
    attempt: int
    charged: int


Done = tuple[dict[str, Ended], Seen]


@pytest.fixture(scope="module")
def done(chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """By name, a run directory that is ended by some of them in turn, resumed after each, and completed."""
    return functools.cache(lambda name: made(name, chaos, world, tmp_path_factory.mktemp(name) / "out"))


def made(name: str, chaos: Chaos, world: World, root: Path) -> Done:
    case, found, together = chaos.begin([]), dict[str, Ended](), list[End]()
    config = configured(world, name, len(RUNS[name]) + 1, stage__algorithm__kind="rloo",
                        stage__algorithm__completions_per_prompt=2)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Fleet", functools.partial(Fleet, recovery_timeout_s=60.0, max_restarts=2))
        for end in [*RUNS[name], None]:
            together += [end] if end else []
            if end and end.error is None:  # the run goes on: its end is the next one's
                continue
            before = len(oracle.charges(root / "ledger.db")) if (root / "ledger.db").exists() else 0
            hit = {e.fault.id: before + 1 + i for i, e in enumerate(together)}
            case.plan([_at(e.fault, hit[e.fault.id]) for e in together])
            ended = run(config, root, resume=before > 0)
            after = len(check(case, config, root, world, done=end is None).charged)
            for e in together:
                own = ended if e is end else None
                found[e.fault.id] = Ended(own, case.struck(e.fault), hit[e.fault.id], after)
            together = []
    chaos.end()
    return found, check(case, config, root, world)


def _at(fault: Fault, attempt: int) -> Fault:
    """Where it strikes: replicas that die at every start do so from the bring-up on."""
    return fault if fault.point == "replica.start" else replace(fault, attempt=attempt)


@pytest.mark.parametrize(
    ("name", "end"), [pytest.param(n, end, id=end.fault.id) for n, ends in RUNS.items() for end in ends]
)
def test_a_lying_replica(name: str, end: End, done: Callable[[str], Done]) -> None:
    """False: what it said went into an update, the run ended with anything but one line of its own, or an attempt was
    charged for nothing or not at all."""
    ended = done(name)[0][end.fault.id]
    assert 1 <= ended.struck <= 3 if end.fault.times > 1 else ended.struck == 1
    if end.error is not None:
        assert type(ended.error) is end.error and "\n" not in str(ended.error) and end.says in str(ended.error)
        assert ended.charged == ended.attempt - (end.fault.point == "replica.start")


@pytest.mark.parametrize("name", RUNS)
def test_lies_were_not_released(name: str, done: Callable[[str], Done]) -> None:
    """False: an attempt with a lie in it has a released row, or noise; or one without has none."""
    found, seen = done(name)
    hit = {found[e.fault.id].attempt for e in RUNS[name] if e.fault.point != "replica.start"}
    assert set(seen.released) == set(seen.charged) - hit
    assert all(seen.noises[found[e.fault.id].attempt] == 0 for e in RUNS[name] if e.fault.point == "replica.generate")


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
