"""An anchor: a small file outside the ledger's directory that remembers the newest entry that was made durable.

Guarantee: a ledger opened with its anchor is refused when it does not contain that entry: an older copy put back, a
lost tail, a fork by copying the directory. It is written after the commit of every entry, under a lock, so that it may
lag behind the ledger by a crash but never leads it. Assumes that whoever can put back the ledger cannot put back the
anchor too: keep it on other storage.

The file has two lines of equal length, `seq head check`. The older one is overwritten, so that a torn write leaves the
other. A file without a valid line counts as missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dprlhf_ray.errors import ConfigError, LedgerDamaged
from dprlhf_ray.privacy.ledger_key import sync_directory

LOCK_SECONDS = 30
_SEQ, _HEAD, _CHECK = 19, 64, 16
_LINE = _SEQ + _HEAD + _CHECK + 3


@dataclass(frozen=True)
class Mark:
    """An entry that an anchor remembers."""

    seq: int
    head: str


class Anchor:
    """An anchor file that this process has locked; see `locked`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def newest(self) -> Mark | None:
        """The entry it remembers; None when there is none yet."""
        return max((m for m in self._marks() if m is not None), key=lambda m: m.seq, default=None)

    def write(self, mark: Mark) -> None:
        """Remember an entry, durably, in the place of the older of the two."""
        first, second = self._marks()
        place = 0 if first is None or (second is not None and first.seq < second.seq) else 1
        os.pwrite(self._descriptor, _line(mark), place * _LINE)
        os.fdatasync(self._descriptor)

    def _marks(self) -> tuple[Mark | None, Mark | None]:
        content = os.pread(self._descriptor, 2 * _LINE, 0)
        return _mark(content[:_LINE]), _mark(content[_LINE:])


@contextmanager
def locked(path: Path) -> Iterator[Anchor]:
    """The anchor at `path`, made if it is not there, for this process alone.

    Raises:
        ConfigError: it cannot be made there. LedgerDamaged: it cannot be written, or stays locked by another process.
    """
    try:
        descriptor = _open(path)
    except OSError as e:
        raise ConfigError(f"ledger_anchor: {path}: {e.strerror}; a file in a directory that exists") from None
    try:
        _lock(path, descriptor)
        yield Anchor(path, descriptor)
    except OSError as e:
        raise LedgerDamaged(f"ledger anchor {path}: cannot be read or written ({e.strerror}); open it again") from None
    finally:
        os.close(descriptor)


def look(path: Path) -> Mark | None:
    """What the anchor at `path` remembers, without a lock; None when it is missing. ConfigError: it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ConfigError(f"ledger_anchor: {path}: {e.strerror}; a file") from None
    try:
        return Anchor(path, descriptor).newest()
    finally:
        os.close(descriptor)


def recorded(path: Path, mark: Mark) -> dict[str, str]:
    """The head that a chain must contain, with where it is recorded, for `chain.replay`."""
    return {mark.head: f"the anchor {path} (entry {mark.seq})"}


def lost(path: Path) -> LedgerDamaged:
    """The refusal of a ledger that was anchored before, when its anchor is missing."""
    return LedgerDamaged(
        f"ledger anchor {path}: missing or unreadable, but this ledger was anchored; restore it, or, if you are sure "
        "that the ledger is the newest one, accept it with `dprlhf ledger anchor`"
    )


def left_out() -> LedgerDamaged:
    """The refusal to write to an anchored ledger without its anchor, which would not see what is charged."""
    return LedgerDamaged("ledger: it was anchored, so that nothing is charged without its anchor; set ledger_anchor")


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        sync_directory(path.parent)
        return descriptor


def _lock(path: Path, descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LedgerDamaged(f"ledger anchor {path}: another process keeps it locked; end that one") from None
            time.sleep(0.005)


def _line(mark: Mark) -> bytes:
    text = f"{mark.seq:0{_SEQ}d} {mark.head} "
    return f"{text}{hashlib.sha256(text.encode()).hexdigest()[:_CHECK]}\n".encode()


def _mark(line: bytes) -> Mark | None:
    seq, head = line[:_SEQ], line[_SEQ + 1 : _SEQ + 1 + _HEAD]
    if not seq.isdigit():
        return None
    mark = Mark(int(seq), head.decode("ascii", "replace"))
    return mark if _line(mark) == line else None
