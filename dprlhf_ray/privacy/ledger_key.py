"""The key file of a ledger: 32 random bytes that only the owner can read, made once and never made anew."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from dprlhf_ray.errors import ConfigError, LedgerDamaged

KEY_BYTES = 32


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
        sync_directory(path.parent)
    return read_key(path)


def settle_key(path: Path) -> None:
    """Rename the pending key to its final name, durably; nothing to do when that has happened."""
    try:
        pending(path).rename(path)
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def pending(path: Path) -> Path:
    """Where a key waits until its ledger has a first entry."""
    return path.with_name(path.name + ".new")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
