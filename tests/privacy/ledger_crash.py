"""Clients of one ledger in processes of their own: they die at a chosen point, or race. What they were told comes back
through a pipe, which outlives them: the outside oracle of acknowledged entries."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine.default import DefaultDialect

from dprlhf_ray.errors import LedgerDamaged
from dprlhf_ray.privacy import budget, filter
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.chain import Schedule
from dprlhf_ray.privacy.ledger import Ledger
from tests.privacy.ledger_place import LONG, SMALL, Place

PLAN = replace(SMALL, steps=4)
SCRIPT = ("open", "budget", "declare", "charge", "charge adaptive", "lower", "open", "charge")
KINDS = {name: [name.split()[0]] for name in SCRIPT} | {"declare": ["schedule", "schedule"], "lower": ["budget"]}
SYSTEM_CALLS = ("fsync", "fdatasync", "pwrite", "rename", "replace")

# Its server process imports this module once and forks a clean client for each start.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.privacy.ledger_crash"])


def perform(ledger: Ledger | None, name: str, place: Place) -> tuple[Ledger, int]:
    """One line of the script: it appends its `KINDS`, all or none. Returns the ledger and the last entry's place."""
    if name == "open" or ledger is None:
        if ledger is not None:
            ledger.close()
        ledger = place.open(anchor_file=place.anchor)
    elif name == "budget":
        ledger.set_budget("reviews", 60.0, 1e-5)
    elif name == "lower":
        ledger.set_budget("reviews", 50.0, 1e-5)
    elif name == "declare":
        adaptive = Declaration("reviews", "adaptive", PLAN, 8.0, 1e-5, adaptive=True)
        ledger.declare([Declaration("reviews", "rl", LONG, 8.0, 1e-5), adaptive])
    else:
        ledger.charge("rl" if name == "charge" else "adaptive")
    return ledger, ledger.seq


def _warm() -> None:
    """Compute once what all forked clients would compute each: the epsilons of the script's schedules."""
    kept = filter.choose_order(PLAN, 8.0, 1e-5)
    fixed = Schedule("reviews", "rl", LONG, 8.0, 1e-5)
    adaptive = Schedule("reviews", "adaptive", PLAN, 8.0, 1e-5, alpha=kept.alpha, rho_budget=kept.rho_budget)
    budget.check_stage(Declaration("reviews", "rl", LONG, 8.0, 1e-5))
    for declared in ([fixed], [fixed, adaptive]):
        budget.cost(declared, 1e-5)


_warm()


class Points:
    """Counts the places where a client can die: before and after each statement, commit, sync, write and rename."""

    def __init__(self, deadly: int | None) -> None:
        self.count = 0
        self._deadly = deadly

    def pass_one(self, *_: object) -> None:
        self.count += 1
        if self.count == self._deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        event.listen(Engine, "before_cursor_execute", self.pass_one)
        event.listen(Engine, "after_cursor_execute", self.pass_one)
        for owner, name in ((DefaultDialect, "do_commit"), *((os, name) for name in SYSTEM_CALLS)):
            setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.pass_one()
            result = function(*arguments, **options)
            self.pass_one()
            return result

        return wrapped


def client(place: Place, deadly: int | None, told: Connection) -> None:
    """Play the script; tell each acknowledged line's entry, and at the end how many points there were."""
    points = Points(deadly)
    points.install()
    ledger = None
    for name in SCRIPT:
        ledger, seq = perform(ledger, name, place)
        told.send(seq)
    told.send({"points": points.count})


def racer(place: Place, opens: int, charges: int, anchored: bool, told: Connection) -> None:
    """Take the ledger over again and again, and charge until another one does."""
    for _ in range(opens):
        try:
            ledger = place.open(anchor_file=place.anchor if anchored else None)
            for _ in range(charges):
                charge = ledger.charge("rl")
                told.send((charge.seq, charge.attempt))
        except LedgerDamaged as e:
            if "fenced" not in str(e):
                raise
        finally:
            ledger.close()


def start(function: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """Start a client; its last argument is the pipe that it tells through."""
    mine, its = processes.Pipe(duplex=False)
    process = processes.Process(target=function, args=(*arguments, its))
    process.start()
    its.close()
    return process, mine


def heard(told: Connection) -> list[Any]:
    """Everything that a client told until it ended, however it ended."""
    found = []
    while True:
        try:
            found.append(told.recv())
        except EOFError:
            return found
