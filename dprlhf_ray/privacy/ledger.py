"""The durable, append-only, hash-chained ledger of one or more data sets' budgets.

Guarantee: a charge that was acknowledged is on disk, is counted once, and is never refunded; a schedule never gets more
attempts (fixed) or divergence (adaptive) than it declared; what is declared on a data set with a budget fits it; a
writer that was superseded appends nothing. A SQLite file by default (not on a network file system), or PostgreSQL.

A SQLite ledger is three things while it is open: ledger.db, ledger.db-wal and ledger.key. Copy all of them or none: an
older copy that is whole in itself is only refused where its head was also recorded elsewhere (`anchor`, `anchor_file`).
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, update

from dprlhf_ray.errors import BudgetExhausted, ConfigError, LedgerDamaged
from dprlhf_ray.privacy import anchor as anchors
from dprlhf_ray.privacy import budget as budgets
from dprlhf_ray.privacy import chain, filter, ledger_view, store
from dprlhf_ray.privacy.anchor import Anchor, Mark
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.chain import Budget, ChainState, Entry, Schedule
from dprlhf_ray.privacy.ledger_key import first_key, read_key, settle_key
from dprlhf_ray.privacy.ledger_view import recorded_in_checkpoint, verified
from dprlhf_ray.privacy.mechanism import DPStep

Row = tuple[str, str, str, dict[str, Any]]
"""Of an entry to be: kind, data set, stage, body."""


@dataclass(frozen=True)
class Charge:
    """A durable charge: its place in the ledger, the attempt of its stage (counted from 1), and what was paid for."""

    seq: int
    attempt: int
    step: DPStep


class Ledger:
    """A writer. At most one is live: opening another fences this one. Made by `Ledger.open`."""

    def __init__(self, engine: Engine, key_path: Path, anchor_file: Path | None) -> None:
        self._engine = engine
        self._key_path = key_path
        self._anchor_file = anchor_file
        self._key = b""
        self._state = ChainState()
        self._file: tuple[int, int] | None = None
        self._mutex = threading.Lock()
        self._failed = False

    @classmethod
    def open(
        cls,
        url: str | Path,
        key_path: str | Path | None = None,
        *,
        anchor: str | None = None,
        anchor_file: str | Path | None = None,
    ) -> Ledger:
        """Verify the whole chain, take a new epoch (older writers are fenced) and return the writer.

        Args:
            url: path of a SQLite file (its folder must exist) or an SQLAlchemy URL of PostgreSQL.
            key_path: the key file; by default beside the SQLite file, with suffix .key.
            anchor: a head recorded elsewhere (a checkpoint, a certificate), which must be part of the chain.
            anchor_file: see `anchor.py`; it is made when this ledger was never anchored.

        Raises:
            LedgerDamaged: any damage, or an unreachable database.
            ConfigError: a bad URL, no key path, a key that others can read, a server that is not durable.
        """
        file = None if anchor_file is None else Path(anchor_file)
        engine, key = store.connect(url, key_path, read_only=False, anchor_file=file)
        ledger = cls(engine, key, file)
        try:
            ledger._take_over(recorded_in_checkpoint(anchor))
        except BaseException:
            engine.dispose()
            raise
        return ledger

    read = staticmethod(ledger_view.read)
    accept = staticmethod(ledger_view.accept)

    def set_budget(self, dataset: str, epsilon: float, delta: float, *, raise_it: bool = False) -> None:
        """Bound what everything declared on a data set may cost together; nothing happens when it is set already.

        Args:
            raise_it: needed for a larger epsilon or delta than before; the ledger's entry says so.

        Raises:
            ConfigError: a raise that was not asked for; nonsense; a stage that guarantees nothing, or a public one.
            BudgetExhausted: what is declared costs more already.
        """
        wanted = budgets.checked(dataset, epsilon, delta)
        with self._mutex:
            known = self._state.budgets.get(dataset)
            if known == wanted:
                return
            raised = known is not None and not known.allows(wanted)
            if raised and not raise_it and known is not None:
                raise ConfigError(
                    f"data.{dataset}.budget: the ledger has epsilon {known.epsilon:.6g} at delta {known.delta:g}; "
                    "it is raised on purpose only: `dprlhf ledger budget --raise`"
                )
            declared = [s for s in self._state.schedules.values() if s.dataset == dataset]
            budgets.check_role(dataset, False, declared, wanted)
            budgets.check_fits(dataset, wanted, declared)
            self._append(("budget", dataset, "", asdict(wanted) | {"raised": raised}))

    def declare(self, declarations: Sequence[Declaration], public: Collection[str] = ()) -> None:
        """Record the schedules of a run's stages in one transaction: all of them, or none. One that is there already
        (a resumed run) is not recorded again.

        Args:
            public: names of all data sets that the run declares public, those without a stage too.

        Raises:
            ConfigError, BudgetExhausted: as `budget.check_new`, each stage after the ones before it; a stage that
                exists with other parameters; a data set declared public that the ledger knows as private.
        """
        with self._mutex:
            known, new = dict(self._state.schedules), []
            for d in declarations:
                if d.stage in known:
                    if not d.matches(known[d.stage]):
                        raise ConfigError(
                            f"stage {d.stage!r}: in the ledger with other parameters; the same, or a new name"
                        )
                    continue
                body = budgets.check_new(d, known, self._state.budgets.get(d.dataset))
                known[d.stage] = chain.scheduled(d.dataset, d.stage, body)
                new.append(("schedule", d.dataset, d.stage, body))
            for name in public:
                declared = [s for s in known.values() if s.dataset == name]
                budgets.check_role(name, True, declared, self._state.budgets.get(name))
            if new:
                self._append(*new)

    def charge(self, stage: str, step: DPStep | None = None) -> Charge:
        """Pay for one attempt, durably, before anything private is touched. Constant time.

        Args:
            step: what this attempt does, under an adaptive schedule (its `steps` has no meaning); None: as planned.

        Raises:
            ConfigError: the stage was never declared; or not with this step. BudgetExhausted: it is spent.
            LedgerDamaged: fenced by a newer writer, changed from outside, or the write failed.
        """
        with self._mutex:
            schedule = self._schedule(stage)
            body: dict[str, Any] = {"attempt": schedule.spent + 1}
            step, plan, rho = step or schedule.step, schedule.step, 0.0
            if schedule.alpha is not None:
                fixed = replace(
                    plan,
                    sampling_rate=step.sampling_rate,
                    noise_multiplier=step.noise_multiplier,
                    metric_noise_multiplier=step.metric_noise_multiplier,
                    updates_per_draw=step.updates_per_draw,
                    steps=step.steps,
                )
                if step != fixed:
                    raise ConfigError(f"stage {stage!r}: only q, the noise and the updates per draw may change")
                rho = filter.rho(step, schedule.alpha)
                body |= {"step": replace(step, steps=1).parameters(), "rho": rho}
            elif step != plan:
                raise ConfigError(f"stage {stage!r}: its schedule is fixed; the declared step, or adaptive accounting")
            if not schedule.admits(rho):
                raise BudgetExhausted(
                    f"stage {stage!r}: all {plan.steps} planned attempts are spent"
                    if schedule.alpha is None
                    else f"stage {stage!r}: after {schedule.spent} attempts too little is left of epsilon "
                    f"{schedule.epsilon:g} for one like this"
                )
            entry = self._append(("charge", schedule.dataset, stage, body))
            return Charge(entry.seq, schedule.spent, step)

    def spent(self, stage: str) -> int:
        """Attempts of the stage charged so far; ConfigError when it was never declared."""
        return self._schedule(stage).spent

    def schedule(self, stage: str) -> Schedule:
        """A stage's schedule, as a copy; ConfigError when it was never declared."""
        return replace(self._schedule(stage))

    def schedules(self) -> dict[str, Schedule]:
        """All declared schedules by stage name, as copies."""
        return {name: replace(s) for name, s in self._state.schedules.items()}

    def budgets(self) -> dict[str, Budget]:
        """Budgets by data set."""
        return dict(self._state.budgets)

    def head(self) -> str:
        """Hash of the last entry, 64 hex digits: recorded in checkpoints and certificates."""
        return self._state.head

    @property
    def seq(self) -> int:
        """Number of entries."""
        return self._state.seq

    @property
    def epoch(self) -> int:
        """This writer's epoch."""
        return self._state.epoch

    def unit_key(self) -> bytes:
        """Key of the hashes of unit ids, the same for all that share this ledger; see `partitions`."""
        return chain.unit_key(self._key)

    def verify(self) -> None:
        """Verify the whole chain again; LedgerDamaged on any damage, or when it is not where this writer left it."""
        with self._mutex, store.damage(), self._engine.begin() as connection:
            state = verified(connection, self._key, {self._state.head: "memory"})
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

    @contextmanager
    def _kept(self) -> Iterator[Anchor | None]:
        """The anchor, locked from before a transaction until its entry is in it too."""
        if self._anchor_file is None:
            yield None
        else:
            with anchors.locked(self._anchor_file) as kept:
                yield kept

    def _take_over(self, recorded: dict[str, str]) -> None:
        with store.damage():
            store.create(self._engine)
            with self._kept() as kept:
                with store.writing(self._engine) as connection:
                    mark = kept.newest() if kept else None
                    if kept and mark:
                        recorded |= anchors.recorded(kept.path, mark)
                    empty = store.is_empty(connection)
                    if empty:
                        chain.replay(b"", (), recorded)
                        self._key = first_key(self._key_path)
                    else:
                        self._key = read_key(self._key_path)
                        self._state = verified(connection, self._key, recorded)
                    if not kept and self._state.anchored:
                        raise anchors.left_out()
                    if kept and not mark:
                        if self._state.anchored:
                            raise anchors.lost(kept.path)
                        kept.write(Mark(self._state.seq, self._state.head))  # there before an entry says that it is
                    today = datetime.datetime.now(datetime.UTC).date().isoformat()
                    body = {"format": 1, "date": today} | ({"anchored": True} if kept else {})
                    (entry,) = self._write(connection, self._state.epoch + 1, [("open", "", "", body)], first=empty)
                if kept:
                    kept.write(Mark(entry.seq, entry.hash))
            settle_key(self._key_path)
            self._file = store.identity(self._engine)
        chain.apply(self._state, entry)

    def _append(self, *rows: Row) -> Entry:
        """Check that nobody else wrote, and append, in one transaction. Any failure is final for this writer.

        Returns:
            The last entry.
        """
        if self._failed:
            raise LedgerDamaged("ledger: this writer is closed, fenced or failed before; open the ledger again")
        self._failed = True
        with store.damage(), self._kept() as kept:
            with store.writing(self._engine) as connection:
                row = connection.execute(select(store.state)).one()
                mine = (1, self._state.seq, self._state.epoch, self._state.head)
                if row.epoch != self._state.epoch:
                    raise LedgerDamaged(
                        f"ledger: fenced, a newer writer (epoch {row.epoch}) has taken over from {mine[2]}"
                    )
                if tuple(row) != (*mine, chain.state_mac(self._key, *mine[1:])):
                    raise LedgerDamaged("ledger: changed from outside while open; restore it")
                if kept and kept.newest() != Mark(self._state.seq, self._state.head):
                    raise LedgerDamaged(
                        f"ledger anchor {kept.path}: moved by another copy of this ledger; end that one"
                    )
                if store.identity(self._engine) != self._file:  # what is written to it now, nobody would find
                    raise LedgerDamaged("ledger: its file was removed or replaced while open; restore it")
                entries = self._write(connection, self._state.epoch, rows)
            if kept:
                kept.write(Mark(entries[-1].seq, entries[-1].hash))
        for entry in entries:
            chain.apply(self._state, entry)
        self._failed = False
        return entries[-1]

    def _write(self, connection: Connection, epoch: int, rows: Sequence[Row], first: bool = False) -> list[Entry]:
        entries, last = [], self._state
        for kind, dataset, stage, body in rows:
            entry = chain.seal(self._key, last, epoch, kind, dataset, stage, chain.canonical(body))
            entries.append(entry)
            last = ChainState(entry.seq, epoch, entry.hash)
        state = {"id": 1, "seq": last.seq, "epoch": epoch, "head": last.head}
        state["mac"] = chain.state_mac(self._key, last.seq, epoch, last.head)
        connection.execute(insert(store.entries), [dict(vars(e)) for e in entries])
        connection.execute(insert(store.state) if first else update(store.state), state)
        return entries
