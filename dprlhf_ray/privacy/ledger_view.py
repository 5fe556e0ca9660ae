"""Reading a ledger: verify the whole chain as it streams by, in bounded memory, and say what it adds up to."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, select

from dprlhf_ray.errors import ConfigError, LedgerDamaged, NoLedger
from dprlhf_ray.privacy import anchor as anchors
from dprlhf_ray.privacy import chain, store
from dprlhf_ray.privacy.anchor import Mark
from dprlhf_ray.privacy.chain import Budget, ChainState, Entry, Schedule
from dprlhf_ray.privacy.ledger_key import read_key


@dataclass(frozen=True)
class LedgerView:
    """A verified, read-only look at a ledger of `seq` entries."""

    seq: int
    epoch: int
    head: str
    anchored: bool
    schedules: dict[str, Schedule]
    budgets: dict[str, Budget]


def read(
    url: str | Path,
    key_path: str | Path | None = None,
    *,
    anchor: str | None = None,
    anchor_file: str | Path | None = None,
    visit: Callable[[Entry], Any] | None = None,
    writing: bool = False,
) -> LedgerView:
    """Verify a ledger without writing to it. Arguments and errors as `Ledger.open`; NoLedger where there is none.

    Args:
        visit: called with every entry in order, before the end of the chain is known to be whole.
        writing: refuse also what a writer refuses: a ledger that was anchored, without its anchor.
    """
    file = None if anchor_file is None else Path(anchor_file)
    engine, key = store.connect(url, key_path, read_only=True, anchor_file=file)
    recorded, mark = recorded_in_checkpoint(anchor), None
    try:
        if file is not None and (mark := anchors.look(file)) is not None:  # before the ledger: it must not lead
            recorded |= anchors.recorded(file, mark)
        with store.damage(), engine.begin() as connection:
            if not inspect(connection).has_table("state") or store.is_empty(connection):
                if key.exists():
                    raise LedgerDamaged(f"{key}: a ledger was written under this key, but it is empty; restore it")
                raise NoLedger("ledger: this database holds none yet")
            state = verified(connection, read_key(key), recorded, visit)
    finally:
        engine.dispose()
    if file is not None and mark is None and state.anchored:
        raise anchors.lost(file)
    if file is None and state.anchored and writing:
        raise anchors.left_out()
    return LedgerView(state.seq, state.epoch, state.head, state.anchored, state.schedules, state.budgets)


def accept(url: str | Path, key_path: str | Path | None, anchor_file: str | Path) -> LedgerView:
    """Make an anchor that was lost anew, from a whole ledger that the caller knows to be the newest one.

    Raises:
        ConfigError: the anchor is there. As `read` otherwise.
    """
    view = read(url, key_path)
    with anchors.locked(Path(anchor_file)) as kept:
        if kept.newest() is not None:
            raise ConfigError(f"ledger anchor {anchor_file}: it is there and readable; nothing to accept")
        kept.write(Mark(view.seq, view.head))
    return view


def recorded_in_checkpoint(head: str | None) -> dict[str, str]:
    """A head that a checkpoint or certificate carries, for `chain.replay`."""
    return {} if head is None else {head: "a checkpoint or certificate"}


def verified(
    connection: Connection, key: bytes, recorded: dict[str, str], visit: Callable[[Entry], Any] | None = None
) -> ChainState:
    """Verify the chain, then that it ends where the state row says; LedgerDamaged otherwise."""

    def entries() -> Iterator[Entry]:
        for row in store.load(connection):
            entry = Entry(*row)
            if visit is not None:
                visit(entry)
            yield entry

    state = chain.replay(key, entries(), recorded)
    rows = [tuple(row) for row in connection.execute(select(store.state).limit(2))]
    expected = (1, state.seq, state.epoch, state.head, chain.state_mac(key, state.seq, state.epoch, state.head))
    if len(rows) != 1 or not hmac.compare_digest(repr(rows[0]).encode(), repr(expected).encode()):
        raise LedgerDamaged("ledger: the chain does not end where the ledger says it does (lost tail?); restore it")
    return state
