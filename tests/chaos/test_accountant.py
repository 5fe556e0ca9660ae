"""The accountant dies, hangs or is fenced at each point of a step: nothing that it charged is forgotten, and nothing is
drawn or noised without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dprlhf_ray.errors import LedgerDamaged
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.stage_run import Roles
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks

KILL = "signal:SIGKILL"
FAULTS = [
    Fault("accountant-sigkill-before-the-declaration", "accountant.declare", "before", KILL, 0),
    Fault("accountant-sigkill-after-the-declaration-is-durable", "accountant.declare", "after", KILL, 0),
    Fault("accountant-sigkill-before-the-charge", "accountant.charge", "before", KILL, 1, lost=False),
    Fault("accountant-sigkill-between-charge-and-reply", "accountant.charge", "after", KILL, 2, lost=True),
    Fault("accountant-sigkill-between-reserve-and-redeem", "driver.generate", "before", "kill:accountant", 3,
          lost=True),
    Fault("accountant-sigkill-while-redeeming", "accountant.redeem", "before", KILL, 4, lost=True),
    Fault("accountant-sigkill-between-redeem-and-reply", "accountant.redeem", "after", KILL, 5, lost=True),
    Fault("accountant-sigkill-between-redeem-and-noise", "learner.noise", "before", "kill:accountant", 6, lost=False),
    Fault("accountant-sigkill-while-a-checkpoint-is-made", "accountant.head", "before", KILL, 7, lost=False),
    Fault("accountant-hangs-at-the-charge-until-it-is-killed", "driver.metrics", "after", "stop:accountant/5", 7,
          lost=False),
    Fault("accountant-sigkill-while-the-certificate-is-made", "accountant.composition", "before", KILL, 9, lost=False),
]  # fmt: skip
FENCED = 8  # attempt after which a second accountant opens the ledger
STEPS = 9


@pytest.fixture(scope="module")
def done(
    chaos: Chaos, one_ray: None, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Case, Seen, BaseException | None]]:
    """One run, ended by a second accountant on its ledger and resumed; the other faults each at another attempt."""
    case, root = chaos.begin(FAULTS), tmp_path_factory.mktemp("accountant") / "out"
    config = configured(world, "accountant", STEPS)

    def second(attempt: int, roles: Roles) -> None:
        if attempt == FENCED:
            Ledger.open(root / "ledger.db").close()

    fenced = run(config, root, on_step=second)
    check(case, config, root, world, done=False)
    ended = run(config, root, resume=True)
    chaos.end()
    assert ended is None, (ended, fenced, case.lines()[-20:])
    yield case, check(case, config, root, world), fenced


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_an_accountant_s_fault(fault: Fault, done: tuple[Case, Seen, BaseException | None]) -> None:
    """False: it did not strike, it was never started again, or the attempt went another way than its charge."""
    case, seen, _ = done
    assert case.struck(fault) == 1
    assert case.came_back(fault, "accountant")
    if fault.lost is not None and fault.attempt is not None:
        hit = FENCED if "hangs" in fault.id else fault.attempt
        assert (hit not in seen.released) == fault.lost
        assert seen.noises[hit] == (0 if fault.lost else 1)


def test_accountant_fenced_by_a_second_one_under_a_run(done: tuple[Case, Seen, BaseException | None]) -> None:
    """False: two accountants charge on one ledger, or the older one's run goes on drawing."""
    _, seen, fenced = done
    assert isinstance(fenced, LedgerDamaged)
    error = getattr(fenced, "cause", fenced)
    assert "fenced" in str(error) and "\n" not in str(error) and error.exit_code == 4
    assert seen.charged == list(range(1, STEPS + 1)) and STEPS in seen.released


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
