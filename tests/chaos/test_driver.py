"""The driver dies or is stopped at each point of a run, as a whole command with a Ray of its own, and is resumed: one
run directory, killed again and again, makes exactly the planned attempts."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from dprlhf_ray import config_file
from tests.chaos import oracle
from tests.chaos.oracle import Seen
from tests.chaos.plan import Case, Chaos, Fault
from tests.chaos.runs import check, configured, private
from tests.end_to_end.runs import Command, World, leaks

KILL = "signal:SIGKILL"


@dataclass(frozen=True)
class Leg:
    """A fault that ends the command. paid: it strikes in the next attempt; else wherever its point is passed first."""

    fault: Fault
    paid: bool = True
    code: int = -signal.SIGKILL
    more: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Ended:
    """code, err: of a leg's command. before, after: charges. left: processes that outlive it for long. (Two agents of
    Ray's ask for a minute for a cluster that is gone.)"""

    code: int
    err: str
    before: int
    after: int
    struck: int
    left: int = 0


RUNS = {
    "draw": [
        Leg(Fault("driver-sigkill-at-bring-up", "driver.bring_up", "before", KILL), False),
        Leg(Fault("driver-sigkill-between-charge-and-draw", "driver.draw", "before", KILL)),
        Leg(Fault("driver-sigkill-between-generate-and-score", "driver.generate", "after", KILL)),
        Leg(Fault("driver-sigterm-while-replicas-generate", "driver.generate", "before", "signal:SIGTERM"), code=130),
    ],
    "update": [
        Leg(Fault("driver-sigkill-between-update-and-sync", "driver.call", "after", KILL, where={"method": "update"})),
        Leg(Fault("driver-sigkill-between-sync-and-checkpoint", "driver.sync", "after", KILL)),
        Leg(Fault("driver-sigkill-between-checkpoint-and-metrics", "driver.metrics", "before", KILL)),
        Leg(Fault("driver-sigint-twice", "driver.draw", "after", "signal:SIGINT"), code=130,
            more=(Fault("driver-sigint-again", "driver.stop", "before", "signal:SIGINT"),)),
    ],
    "end": [
        Leg(Fault("driver-sigkill-between-export-and-finish", "driver.finish", "before", KILL), False),
        Leg(Fault("driver-sigkill-before-the-certificate", "driver.certificate", "before", KILL), False),
        Leg(Fault("driver-sigkill-between-certificate-and-cards", "driver.certificate", "after", KILL), False),
        Leg(Fault("driver-sigkill-before-the-report", "driver.report", "before", KILL), False),
    ],
}  # fmt: skip
STEPS = {"draw": 4, "update": 5, "end": 1}
Done = tuple[Case, Seen, dict[str, Ended]]


@pytest.fixture(scope="module")
def done(chaos: Chaos, world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """By name, a run directory that is ended by some of them in turn, at once resumed, and then completed; made when it
    is asked for."""
    return functools.cache(lambda name: made(name, chaos, world, tmp_path_factory.mktemp(name)))


def made(name: str, chaos: Chaos, world: World, folder: Path) -> Done:
    case, root = chaos.begin([]), folder / "out"
    config = configured(world, f"driver-{name}", STEPS[name])
    settings = folder / "c.yaml"
    ended: dict[str, tuple[Command, Ended]] = {}
    settings.write_text(config_file.dump(config))
    for leg in [*RUNS[name], None]:
        before = len(oracle.charges(root / "ledger.db")) if (root / "ledger.db").exists() else 0
        faults = [] if leg is None else [leg.fault, *leg.more]
        if leg is not None and leg.paid:
            faults[0] = replace(leg.fault, attempt=before + 1)
        case.plan(faults)
        command = Command("run", str(settings), "--output", str(root), *(["--resume"] if ended else []))
        deadline = time.monotonic() + 400
        while command.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                command.family = [*{*command.family, *psutil.Process(command.process.pid).children(recursive=True)}]
            time.sleep(0.3)
        code, out, err = command.end(10)
        seen = check(case, config, root, world, done=leg is None)
        assert not any(mark in out + err for mark in world.marks)
        assert leg is not None or code == 0, err
        if leg is not None:
            struck = min(case.struck(f) for f in faults)
            ended[leg.fault.id] = command, Ended(code, err, before, len(seen.charged), struck)
    chaos.end()
    found = {name: replace(e, left=len(command.survivors(150.0))) for name, (command, e) in ended.items()}
    return case, seen, found


@pytest.mark.parametrize(
    ("name", "leg"), [pytest.param(n, leg, id=leg.fault.id) for n, legs in RUNS.items() for leg in legs]
)
def test_a_driver_s_end(name: str, leg: Leg, done: Callable[[str], Done]) -> None:
    """False: the signal did not strike, the command ended another way, something of it lives on, or the attempt in
    flight was not paid for."""
    ended = done(name)[2][leg.fault.id]
    assert (ended.struck, ended.code, ended.left) == (1, leg.code, 0), ended.err
    assert ended.after == ended.before + leg.paid or leg.fault.point == "driver.finish"
    if leg.code == 130:
        lines = [line for line in ended.err.splitlines() if line.startswith("dprlhf: ")]
        assert len(lines) == 1 and "--resume" in lines[0] and "Traceback" not in ended.err


@pytest.mark.parametrize("name", RUNS)
def test_attempts_that_were_cut_off_have_no_rows(name: str, done: Callable[[str], Done]) -> None:
    """False: a resumed run released an attempt of the one that was killed."""
    _, seen, found = done(name)
    cut = {found[leg.fault.id].after for leg in RUNS[name] if leg.paid}
    assert seen.charged == list(range(1, STEPS[name] + 1)) and seen.released == sorted(set(seen.charged) - cut)


def test_nothing_private_is_in_ray_s_files(done: object, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
