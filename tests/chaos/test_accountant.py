"""The accountant dies, hangs or is fenced at each point of a step: nothing that it charged is forgotten, and nothing is
drawn or noised without it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from dprlhf_ray.errors import LedgerDamaged
from dprlhf_ray.privacy.ledger import Ledger
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

KILL = "signal:SIGKILL"
CHARGE = [
    Fault("accountant-sigkill-before-the-declaration", "accountant.declare", "before", KILL, 0),
    Fault("accountant-sigkill-after-the-declaration-is-durable", "accountant.declare", "after", KILL, 0),
    Fault("accountant-sigkill-before-the-charge", "accountant.charge", "before", KILL, 1, noises=1),
    Fault("accountant-sigkill-between-charge-and-reply", "accountant.charge", "after", KILL, 2, lost=True, noises=0),
    Fault("accountant-sigkill-between-redeem-and-noise", "learner.noise", "before", "kill:accountant", 3, noises=1),
    Fault("accountant-sigkill-while-a-checkpoint-is-made", "accountant.head", "before", KILL, 4, noises=1),
    Fault("accountant-hangs-at-the-charge", "driver.metrics", "after", "hang:accountant", 5, noises=1),
]
REDEEM = [
    Fault("accountant-sigkill-between-reserve-and-redeem", "driver.generate", "before", "kill:accountant", 1,
          lost=True, noises=0),
    Fault("accountant-sigkill-while-redeeming", "accountant.redeem", "before", KILL, 2, lost=True, noises=0),
    Fault("accountant-sigkill-between-redeem-and-reply", "accountant.redeem", "after", KILL, 3, lost=True, noises=0),
    Fault("accountant-sigkill-while-the-certificate-is-made", "accountant.composition", "before", KILL, 4, noises=1),
]  # fmt: skip
RUNS = {"charge": (CHARGE, 6), "redeem": (REDEEM, 4)}  # with how many attempts they have
Done = tuple[Case, Seen]


@pytest.fixture(scope="module")
def done(chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """By name, a run with a few of them, each at another attempt; made when it is asked for."""

    @functools.cache
    def made(name: str) -> Done:
        faults, steps = RUNS[name]
        case, root = chaos.begin(faults), tmp_path_factory.mktemp(name) / "out"
        config = configured(world, name, steps)
        ended = run(config, root)
        chaos.end()
        assert ended is None, (ended, case.lines()[-20:])
        return case, check(case, config, root, world)

    return made


@pytest.mark.parametrize(
    ("name", "fault"), [pytest.param(n, f, id=f.id) for n, (faults, _) in RUNS.items() for f in faults]
)
def test_an_accountant_s_fault(name: str, fault: Fault, done: Callable[[str], Done]) -> None:
    """False: it did not strike, it was never started again, or the attempt went another way than its charge."""
    case, seen = done(name)
    assert case.struck(fault) == 1 and case.came_back(fault, "accountant")
    if fault.noises is not None and fault.attempt is not None:
        assert (fault.attempt not in seen.released) == bool(fault.lost)
        assert seen.noises[fault.attempt] == fault.noises


@pytest.mark.parametrize("name", RUNS)
def test_no_other_attempt_was_lost(name: str, done: Callable[[str], Done]) -> None:
    """False: a death cost more than what was in flight."""
    faults, steps = RUNS[name]
    assert done(name)[1].released == [n for n in range(1, steps + 1) if n not in {f.attempt for f in faults if f.lost}]


def test_accountant_fenced_by_a_second_one_under_a_run(
    chaos: Chaos, one_ray: None, world: World, tmp_path: Path
) -> None:
    """False: two accountants charge on one ledger, or the older one's run goes on drawing."""
    case, root, config = chaos.begin([]), tmp_path / "out", configured(world, "fenced", 2)
    fenced = run(config, root, on_step=lambda attempt, roles: Ledger.open(root / "ledger.db").close())
    assert isinstance(fenced, LedgerDamaged)
    error = getattr(fenced, "cause", fenced)
    assert "fenced" in str(error) and "\n" not in str(error) and error.exit_code == 4
    assert check(case, config, root, world, done=False).draws == 1
    assert run(config, root, resume=True) is None
    assert check(case, config, root, world).released == [1, 2]
    chaos.end()


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
