"""Replicas that lie or keep dying end the run, in one line; what is resumed continues and completes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
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


ENDS = [
    End(Fault("replica-answers-one-row-less", "replica.generate", "after", corrupt("fewer_rows")), RolloutFailed),
    End(Fault("replica-answers-from-another-version", "replica.generate", "after", corrupt("other_version")),
        RolloutFailed, "another weight version"),
    End(Fault("replica-answers-outside-the-vocabulary", "replica.generate", "after", corrupt("outside_vocabulary")),
        None),
    End(Fault("replica-answers-a-completion-too-many", "replica.generate", "after", corrupt("one_more_completion")),
        None),
    End(Fault("replica-loads-other-weights", "replica.load", "after", corrupt("other_weights")), SyncFailed,
        "sync_tolerance"),
    End(Fault("replica-checks-with-nan", "replica.check", "after", corrupt("nan_log_probs")), SyncFailed),
    End(Fault("replica-keeps-the-old-weights", "replica.load", "before", corrupt("keep_old_weights")), SyncFailed,
        "not at all"),
    End(Fault("replicas-that-keep-dying", "replica.generate", "before", "signal:SIGKILL", times=99), RolloutFailed,
        "restarts were used up"),
    End(Fault("replicas-that-die-at-every-start", "replica.start", "before", "signal:SIGKILL", times=99),
        RolloutFailed, "restarts were used up"),
]  # fmt: skip
STEPS = 12


@pytest.fixture(scope="module")
def done(
    chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, tuple[BaseException | None, int, int, int]], Seen]]:
    """One run directory: ended by each in turn, resumed after each. Per fault: (what ended it, how often it struck,
    charges before, charges after)."""
    case, root = chaos.begin([]), tmp_path_factory.mktemp("ends") / "out"
    config = configured(world, "replica-ends", STEPS, stage__algorithm__kind="rloo",
                        stage__algorithm__completions_per_prompt=2)  # fmt: skip
    found: dict[str, tuple[BaseException | None, int, int, int]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Fleet", functools.partial(Fleet, recovery_timeout_s=60.0, max_restarts=2))
        together: list[End] = []
        for end in ENDS:
            together.append(end)
            if end.error is None:  # the run goes on: its end is the next one's
                continue
            before = len(oracle.charges(root / "ledger.db")) if (root / "ledger.db").exists() else 0
            case.plan([_at(e.fault, before + 1 + i) for i, e in enumerate(together)])
            ended = run(config, root, resume=before > 0)
            after = len(check(case, config, root, world, done=False).charged)
            for e in together:
                found[e.fault.id] = (ended if e is end else None, case.struck(e.fault), before, after)
            together = []
        case.plan([])
        ended = run(config, root, resume=True)
    chaos.end()
    assert ended is None, ended
    yield found, check(case, config, root, world)


def _at(fault: Fault, attempt: int) -> Fault:
    """Where it strikes: replicas that die at every start do so from the bring-up on."""
    return fault if fault.point == "replica.start" else replace(fault, attempt=attempt)


@pytest.mark.parametrize("end", ENDS, ids=lambda e: e.fault.id)
def test_a_lying_replica(end: End, done: tuple[dict[str, tuple[BaseException | None, int, int, int]], Seen]) -> None:
    """False: what it said went into an update, the run ended with anything but one line of its own, or an attempt was
    charged for nothing or not at all."""
    ended, struck, before, after = done[0][end.fault.id]
    assert 1 <= struck <= 3 if end.fault.times > 1 else struck == 1
    if end.error is None:
        return
    assert type(ended) is end.error and "\n" not in str(ended) and end.says in str(ended)
    assert after >= before + (end.fault.point != "replica.start")


def test_lies_were_not_released(done: tuple[dict[str, tuple[BaseException | None, int, int, int]], Seen]) -> None:
    """False: an attempt with a lie in it has a released row, or noise."""
    found, seen = done
    hit = {i for e in ENDS if e.fault.point == "replica.generate" for i in (found[e.fault.id][2] + 1,)}
    assert not hit & set(seen.released)
    assert [a for a in seen.noises if a in hit] == []


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
