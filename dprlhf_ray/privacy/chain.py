"""The chain of a ledger: canonical entries, their keyed hashes, what they add up to, and the key file.

Guarantee: with the key, any change of an entry, any reordering, insertion or removal before the head, and a lost tail
that the state row still remembers are found. Assumes that the key stays secret. What cannot be told from the ledger
alone: a copy of ledger and key together, put back later; a head kept elsewhere (`anchor`) can tell that.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from dprlhf_ray.errors import ConfigError, LedgerDamaged
from dprlhf_ray.privacy.mechanism import DPStep

GENESIS = "0" * 64
KEY_BYTES = 32


@dataclass(frozen=True)
class Entry:
    """One row: seq counts from 1; body is canonical JSON of public parameters; hashes are 64 hex digits."""

    seq: int
    epoch: int
    kind: str
    dataset: str
    stage: str
    body: str
    prev_hash: str
    hash: str


@dataclass
class Schedule:
    """What was declared for one stage, and how many of its attempts are charged. epsilon is None for clip only."""

    dataset: str
    stage: str
    step: DPStep
    epsilon: float | None
    delta: float
    spent: int = 0


@dataclass
class ChainState:
    """Where a chain stands: last seq, writer epoch, head hash, schedules by stage."""

    seq: int = 0
    epoch: int = 0
    head: str = GENESIS
    schedules: dict[str, Schedule] = field(default_factory=dict)


def canonical(body: dict[str, Any]) -> str:
    """Canonical JSON: sorted keys, no spaces, NaN and infinity refused (ValueError)."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def seal(key: bytes, state: ChainState, epoch: int, kind: str, dataset: str, stage: str, body: str) -> Entry:
    """The next entry after `state`."""
    seq = state.seq + 1
    public = (seq, epoch, kind, dataset, stage, body, state.head)
    return Entry(*public, _mac(key, *public))


def state_mac(key: bytes, seq: int, epoch: int, head: str) -> str:
    """Keyed hash of the state row, so that it cannot be set back to an older head without the key."""
    return _mac(key, "state", seq, epoch, head)


def replay(key: bytes, entries: Iterable[Entry], anchor: str | None = None) -> ChainState:
    """Verify every entry and add them up.

    Args:
        key: the ledger's key.
        entries: in order of seq.
        anchor: a head that was seen elsewhere (a checkpoint, a certificate); it must be part of this chain.

    Raises:
        LedgerDamaged: the first thing that is wrong.
    """
    state = ChainState()
    anchored = anchor is None or anchor == GENESIS
    for entry in entries:
        if entry.seq != state.seq + 1 or entry.prev_hash != state.head:
            raise LedgerDamaged(f"ledger entry {state.seq + 1}: missing, or not linked to the one before; restore it")
        expected = _mac(key, *astuple(entry)[:-1])
        if not isinstance(entry.hash, str) or not hmac.compare_digest(expected.encode(), entry.hash.encode()):
            raise LedgerDamaged(f"ledger entry {entry.seq}: its keyed hash does not match; restore ledger and key")
        apply(state, entry)
        anchored = anchored or entry.hash == anchor
    if not anchored:
        raise LedgerDamaged("ledger: the head recorded elsewhere is not in it (older, cut or forked); restore it")
    return state


def apply(state: ChainState, entry: Entry) -> None:
    """Advance `state` by a verified entry; LedgerDamaged when it breaks the rules of a ledger."""
    body = json.loads(entry.body)
    opened = entry.kind == "open"
    if entry.epoch != state.epoch + opened:
        raise LedgerDamaged(f"ledger entry {entry.seq}: epoch {entry.epoch} after epoch {state.epoch}")
    if entry.kind == "schedule":
        if entry.stage in state.schedules:
            raise LedgerDamaged(f"ledger entry {entry.seq}: stage {entry.stage!r} is declared twice")
        step = DPStep(**body["step"])
        state.schedules[entry.stage] = Schedule(entry.dataset, entry.stage, step, body["epsilon"], body["delta"])
    elif entry.kind == "charge":
        schedule = state.schedules.get(entry.stage)
        if schedule is None or body["attempt"] != schedule.spent + 1 or schedule.spent >= schedule.step.steps:
            raise LedgerDamaged(f"ledger entry {entry.seq}: a charge outside the schedule of stage {entry.stage!r}")
        schedule.spent += 1
    elif not opened:
        raise LedgerDamaged(f"ledger entry {entry.seq}: unknown kind {entry.kind!r}; written by a newer version?")
    state.seq, state.epoch, state.head = entry.seq, entry.epoch, entry.hash


def _mac(key: bytes, *parts: Any) -> str:
    return hmac.new(key, json.dumps(parts, separators=(",", ":")).encode(), hashlib.sha256).hexdigest()


# ------------------------------------------------------------------------------------------------------ key file


def read_key(path: Path) -> bytes:
    """The key of an existing ledger: `path`, or `path` + ".new" when the very first start was interrupted.

    Raises:
        LedgerDamaged: no key, or not a key.
        ConfigError: others than the owner may read it.
    """
    for candidate in (path, pending(path), path):  # a concurrent first start may rename it between the two looks
        try:
            with candidate.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                key = file.read()
        except FileNotFoundError:
            continue
        if mode & 0o077:
            raise ConfigError(f"{candidate}: mode {mode:04o} lets others read the ledger key; chmod 600 (or 400)")
        if len(key) != KEY_BYTES:
            raise LedgerDamaged(f"{candidate}: {len(key)} bytes, a ledger key has {KEY_BYTES}; restore it")
        return key
    raise LedgerDamaged(f"{path}: the ledger's key is missing; restore it next to the ledger")


def first_key(path: Path) -> bytes:
    """The key of an empty ledger, still pending: `settle_key` makes it final once the first entry is durable.

    Raises:
        LedgerDamaged: a final key exists, so entries were once written under it: the ledger was deleted or emptied.
    """
    if path.exists():
        raise LedgerDamaged(f"{path}: a ledger was written under this key, but it is empty or gone; restore it")
    if not pending(path).exists():
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(pending(path))
        _sync_directory(path.parent)
    return read_key(path)


def settle_key(path: Path) -> None:
    """Rename the pending key to its final name, durably; nothing to do when that has happened."""
    try:
        pending(path).rename(path)
    except FileNotFoundError:
        return
    _sync_directory(path.parent)


def pending(path: Path) -> Path:
    """Where a key waits until its ledger has a first entry."""
    return path.with_name(path.name + ".new")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
