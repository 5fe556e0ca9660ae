"""The durable, append-only, hash-chained ledger of one or more data sets' budgets.

Guarantee: a charge that was acknowledged is on disk, is counted once, and is never refunded; a schedule never gets more
attempts than it declared; a writer that was superseded appends nothing. SQLite file by default (write-ahead log,
synchronous=EXTRA, BEGIN IMMEDIATE; not on a network file system), or any database that SQLAlchemy reaches and that
offers SERIALIZABLE, such as PostgreSQL with synchronous replication.

A SQLite ledger is three things while it is open: ledger.db, ledger.db-wal and ledger.key. Copy all of them or none: an
older copy that is whole in itself is only refused where its head was also recorded elsewhere (`anchor`).
"""

from __future__ import annotations

import datetime
import hmac
import math
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, insert, inspect, select, update

from dprlhf_ray.errors import BudgetExhausted, ConfigError, LedgerDamaged, NoLedger
from dprlhf_ray.privacy import accounting, chain, store
from dprlhf_ray.privacy.chain import ChainState, Entry, Schedule
from dprlhf_ray.privacy.mechanism import DPStep


@dataclass(frozen=True)
class Charge:
    """A durable charge: its place in the ledger and the attempt of its stage (counted from 1)."""

    seq: int
    attempt: int


@dataclass(frozen=True)
class LedgerView:
    """A verified, read-only look at a ledger."""

    entries: tuple[Entry, ...]
    schedules: dict[str, Schedule]
    epoch: int
    head: str


class Ledger:
    """A writer. At most one is live: opening another fences this one. Made by `Ledger.open`."""

    def __init__(self, engine: Engine, key_path: Path) -> None:
        self._engine = engine
        self._key_path = key_path
        self._key = b""
        self._state = ChainState()
        self._mutex = threading.Lock()
        self._failed = False

    @classmethod
    def open(cls, url: str | Path, key_path: str | Path | None = None, *, anchor: str | None = None) -> Ledger:
        """Verify the whole chain, take a new epoch (older writers are fenced) and return the writer.

        Args:
            url: path of a SQLite file (its folder must exist) or an SQLAlchemy URL.
            key_path: the key file; by default beside the SQLite file, with suffix .key.
            anchor: a head recorded elsewhere, which must be part of the chain.

        Raises:
            LedgerDamaged: any damage, or an unreachable database.
            ConfigError: a bad URL, no key path, a key that others can read.
        """
        engine, key = store.connect(url, key_path, read_only=False)
        ledger = cls(engine, key)
        try:
            ledger._take_over(anchor)
        except BaseException:
            engine.dispose()
            raise
        return ledger

    @staticmethod
    def read(url: str | Path, key_path: str | Path | None = None, *, anchor: str | None = None) -> LedgerView:
        """Verify and list a ledger without writing to it. Raises as `open`; NoLedger where there is none."""
        engine, key = store.connect(url, key_path, read_only=True)
        try:
            with store.damage(), engine.begin() as connection:
                if not inspect(connection).has_table("entries"):
                    raise NoLedger("ledger: this database holds none yet")
                secret = chain.read_key(key)
                entries = _load(connection)
                state = _verified(connection, secret, entries, anchor)
        finally:
            engine.dispose()
        return LedgerView(tuple(entries), state.schedules, state.epoch, state.head)

    def declare(
        self,
        dataset: str,
        stage: str,
        step: DPStep,
        epsilon: float | None,
        delta: float,
        *,
        allow_large_delta: bool = False,
    ) -> None:
        """Record the fixed schedule of a stage; nothing happens when the same one is there (a resumed run).

        Args:
            dataset: declared name of the private data set that pays.
            stage: name of the stage, unique in this ledger.
            epsilon: target; None only for clip only (noise_multiplier 0), which guarantees nothing and says so.

        Raises:
            ConfigError: the stage exists with other parameters; no target; a schedule that costs more than its target;
                a delta that is refused.
        """
        if not dataset or not stage:
            raise ConfigError("data, stage: a schedule needs a data set name and a stage name")
        body: dict[str, Any] = {"step": step.parameters(), "epsilon": epsilon, "delta": delta}
        for other in self._state.schedules.values():
            mine, theirs = (step.unit, step.adjacency), (other.step.unit, other.step.adjacency)
            if other.dataset == dataset and mine != theirs:
                raise ConfigError(
                    f"stage {stage!r}: unit and adjacency {mine}, but data set {dataset!r} was charged with {theirs}: "
                    "guarantees about different neighbours do not compose; declare them alike"
                )
        known = self._state.schedules.get(stage)
        if known is not None:
            if known != Schedule(dataset, stage, step, epsilon, delta, known.spent):
                raise ConfigError(f"stage {stage!r}: in the ledger with other parameters; the same, or a new name")
            return
        if step.noise_multiplier == 0:
            if epsilon is not None:
                raise ConfigError(f"stage {stage!r}: noise_multiplier 0 guarantees no epsilon; noise, or no target")
            accounting.check_delta(delta, step.population, allow_large_delta)
            body["guarantee"] = "none"
        else:
            body["guarantee"] = "dp"
            body["planned"] = asdict(_planned(stage, step, epsilon, delta, allow_large_delta))
        with self._mutex:
            self._append("schedule", dataset, stage, body)

    def charge(self, stage: str) -> Charge:
        """Pay for one attempt, durably, before anything private is touched. Constant time.

        Raises:
            ConfigError: the stage was never declared. BudgetExhausted: all its attempts are spent.
            LedgerDamaged: fenced by a newer writer, changed from outside, or the write failed.
        """
        with self._mutex:
            schedule = self._schedule(stage)
            if schedule.spent >= schedule.step.steps:
                raise BudgetExhausted(f"stage {stage!r}: all {schedule.step.steps} planned attempts are spent")
            entry = self._append("charge", schedule.dataset, stage, {"attempt": schedule.spent + 1})
            return Charge(entry.seq, schedule.spent)

    def spent(self, stage: str) -> int:
        """Attempts of the stage charged so far; ConfigError when it was never declared."""
        return self._schedule(stage).spent

    def schedules(self) -> dict[str, Schedule]:
        """All declared schedules by stage name, as copies."""
        return {name: Schedule(**vars(s)) for name, s in self._state.schedules.items()}

    def head(self) -> str:
        """Hash of the last entry, 64 hex digits: recorded in checkpoints and certificates."""
        return self._state.head

    @property
    def epoch(self) -> int:
        """This writer's epoch."""
        return self._state.epoch

    def verify(self) -> None:
        """Verify the whole chain again; LedgerDamaged on any damage, or when it is not where this writer left it."""
        with self._mutex, store.damage(), self._engine.begin() as connection:
            state = _verified(connection, self._key, _load(connection), None)
        if (state.seq, state.epoch, state.head) != (self._state.seq, self._state.epoch, self._state.head):
            raise LedgerDamaged(f"ledger: fenced, a newer writer (epoch {state.epoch}) has taken over")

    def close(self) -> None:
        """Close the database; every acknowledged charge is durable already."""
        with self._mutex:
            self._failed = True
            self._engine.dispose()

    def _schedule(self, stage: str) -> Schedule:
        if stage not in self._state.schedules:
            raise ConfigError(f"stage {stage!r}: not declared in this ledger; declare its schedule before charging it")
        return self._state.schedules[stage]

    def _take_over(self, anchor: str | None) -> None:
        with store.damage():
            with self._engine.begin() as connection:
                store.metadata.create_all(connection)
                entries = _load(connection)
                empty = not entries and connection.execute(select(store.state.c.id)).first() is None
                self._key = chain.first_key(self._key_path) if empty else chain.read_key(self._key_path)
                if not empty or anchor is not None:
                    self._state = _verified(connection, self._key, entries, anchor, empty)
                body = {"format": 1, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
                entry = self._write(connection, self._state.epoch + 1, "open", "", "", body, first=empty)
            chain.settle_key(self._key_path)
        chain.apply(self._state, entry)

    def _append(self, kind: str, dataset: str, stage: str, body: dict[str, Any]) -> Entry:
        """Check that nobody else wrote, and append, in one transaction. Any failure is final for this writer."""
        if self._failed:
            raise LedgerDamaged("ledger: this writer is closed, fenced or failed before; open the ledger again")
        self._failed = True
        with store.damage(), self._engine.begin() as connection:
            row = connection.execute(select(store.state)).one()
            mine = (1, self._state.seq, self._state.epoch, self._state.head)
            if row.epoch != self._state.epoch:
                raise LedgerDamaged(f"ledger: fenced, a newer writer (epoch {row.epoch}) has taken over from {mine[2]}")
            if tuple(row) != (*mine, chain.state_mac(self._key, *mine[1:])):
                raise LedgerDamaged("ledger: changed from outside while open; restore it")
            entry = self._write(connection, self._state.epoch, kind, dataset, stage, body)
        chain.apply(self._state, entry)
        self._failed = False
        return entry

    def _write(
        self,
        connection: Connection,
        epoch: int,
        kind: str,
        dataset: str,
        stage: str,
        body: dict[str, Any],
        first: bool = False,
    ) -> Entry:
        entry = chain.seal(self._key, self._state, epoch, kind, dataset, stage, chain.canonical(body))
        row = {"id": 1, "seq": entry.seq, "epoch": epoch, "head": entry.hash}
        row["mac"] = chain.state_mac(self._key, entry.seq, epoch, entry.hash)
        connection.execute(insert(store.entries), asdict(entry))
        connection.execute(insert(store.state).values(row) if first else update(store.state).values(row))
        return entry


def _planned(stage: str, step: DPStep, epsilon: float | None, delta: float, large: bool) -> accounting.EpsilonReport:
    """What a schedule costs; ConfigError when that is more than its target (one part in 10^9 is rounding)."""
    if epsilon is None:
        raise ConfigError(f"{stage}.epsilon: not set; a target such as 8.0 (a missing epsilon never means no limit)")
    if not (isinstance(epsilon, int | float) and math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"{stage}.epsilon: {epsilon!r} is refused; a finite number above 0")
    planned = accounting.epsilon(step, delta, allow_large_delta=large)
    if planned.pld > epsilon * (1 + 1e-9):
        raise ConfigError(f"{stage}.epsilon: the schedule costs {planned.pld:.6g}, over {epsilon:.6g}; more noise")
    return planned


def _load(connection: Connection) -> list[Entry]:
    return [Entry(*row) for row in connection.execute(select(store.entries).order_by(store.entries.c.seq))]


def _verified(
    connection: Connection, key: bytes, entries: list[Entry], anchor: str | None, empty: bool = False
) -> ChainState:
    state = chain.replay(key, entries, anchor)
    rows = [] if empty else [tuple(row) for row in connection.execute(select(store.state))]
    expected = (1, state.seq, state.epoch, state.head, chain.state_mac(key, state.seq, state.epoch, state.head))
    if not empty and (len(rows) != 1 or not hmac.compare_digest(repr(rows[0]).encode(), repr(expected).encode())):
        raise LedgerDamaged("ledger: the chain does not end where the ledger says it does (lost tail?); restore it")
    return state
