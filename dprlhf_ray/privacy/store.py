"""Where a ledger lives: its two tables, and connections whose commits are durable and serialised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from dprlhf_ray.errors import ConfigError, LedgerDamaged, NoLedger

BUSY_SECONDS = 30

metadata = MetaData()
entries = Table(
    "entries",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("dataset", Text, nullable=False),
    Column("stage", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("prev_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)
state = Table(  # one row: where the chain must end, so that a lost tail is seen and a charge needs no scan
    "state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("head", String(64), nullable=False),
    Column("mac", String(64), nullable=False),
)


@contextmanager
def damage() -> Iterator[None]:
    """What a database or a decoder cannot make sense of is damage: nothing private may start on it."""
    try:
        yield
    except DBAPIError as e:
        reason = " ".join(f"{type(e.orig).__name__}: {e.orig}".split())
        raise LedgerDamaged(f"ledger: the database failed ({reason}); restore it, or open it again") from None
    except (SQLAlchemyError, ValueError, TypeError, KeyError, OverflowError) as e:
        raise LedgerDamaged(f"ledger: an entry is unreadable ({type(e).__name__}); restore it") from None


def connect(url: str | Path, key_path: str | Path | None, read_only: bool) -> tuple[Engine, Path]:
    """Engine and key path of a SQLite file or an SQLAlchemy URL; ConfigError when that is impossible."""
    try:
        where = make_url(url) if isinstance(url, str) and "://" in url else URL.create("sqlite", database=str(url))
    except ArgumentError:
        raise ConfigError("ledger: not a database URL; a file path, or postgresql+psycopg://user@host/name") from None
    if where.get_backend_name() != "sqlite":
        if key_path is None:
            raise ConfigError("ledger: a database other than a SQLite file needs the path of a key file")
        try:
            return create_engine(where, isolation_level="SERIALIZABLE", pool_size=1, max_overflow=0), Path(key_path)
        except (ImportError, ArgumentError) as e:
            raise ConfigError(f"ledger: no driver for {where.drivername} ({e}); install it") from None
    if not where.database or where.database == ":memory:" or where.database.startswith("file:"):
        raise ConfigError("ledger: SQLite in memory is not durable; the path of a file")
    path = Path(where.database).resolve()
    if read_only and not path.is_file():
        raise NoLedger(f"ledger: {path}: no such ledger; the path of ledger.db")
    if not path.parent.is_dir():
        raise ConfigError(f"ledger: {path.parent}: no such directory; create it first")
    return _sqlite(path, read_only), Path(key_path) if key_path is not None else path.with_suffix(".key")


def _sqlite(path: Path, read_only: bool) -> Engine:
    query = {"mode": "ro" if read_only else "rwc", "uri": "true"}
    if read_only and not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists():
        query["immutable"] = "1"  # a closed ledger on read-only storage: no place for SQLite's shared memory
    target = URL.create("sqlite", database=f"file:{quote(str(path))}", query=query)
    arguments = {"timeout": BUSY_SECONDS, "check_same_thread": False}
    engine = create_engine(target, connect_args=arguments, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are ours: BEGIN IMMEDIATE below
        if not read_only:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=EXTRA")
        connection.execute("PRAGMA fullfsync=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine
