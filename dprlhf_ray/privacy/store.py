"""Where a ledger lives: its two tables, and connections whose commits are durable and serialised.

SQLite: write-ahead log, synchronous=EXTRA, BEGIN IMMEDIATE. PostgreSQL: SERIALIZABLE under a table lock, and
synchronous_commit=on in every transaction (remote_apply where that is configured), whatever the server's default is; a
server that runs without fsync or full_page_writes is refused. Where it is replicated, the standby that may take over
must be in synchronous_standby_names: that cannot be seen from here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

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
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from dprlhf_ray.errors import ConfigError, LedgerDamaged, NoLedger
from dprlhf_ray.network import holds_database_password, is_loopback

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


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction of one writer: another one waits, or gives up after BUSY_SECONDS."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # the first statement: what it reads next is what the last writer left
            connection.exec_driver_sql("LOCK TABLE state IN EXCLUSIVE MODE")
        yield connection


def create(engine: Engine) -> None:
    """Make the tables where they are not there yet, in a transaction of their own."""
    apart = engine
    if engine.dialect.name == "postgresql":
        apart = engine.execution_options(isolation_level="READ COMMITTED")  # after the wait, see what the other made
    with apart.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('dprlhf_ray.ledger'))")
        metadata.create_all(connection)


def identity(engine: Engine) -> tuple[int, int] | None:
    """Which file a SQLite ledger's name stands for, by device and inode; None: for none any more, or it is a server."""
    if engine.dialect.name != "sqlite":
        return None
    try:
        found = os.stat(unquote((engine.url.database or "").removeprefix("file:")))
    except OSError:
        return None
    return found.st_dev, found.st_ino


def load(connection: Connection) -> Iterator[tuple[Any, ...]]:
    """All entries in order, a thousand at a time."""
    statement = select(entries).order_by(entries.c.seq)
    for row in connection.execute(statement, execution_options={"yield_per": 1000}):
        yield tuple(row)


def is_empty(connection: Connection) -> bool:
    """Whether nothing was ever written."""
    return all(connection.execute(select(t).limit(1)).first() is None for t in (entries, state))


def connect(
    url: str | Path, key_path: str | Path | None, *, read_only: bool, anchor_file: Path | None = None
) -> tuple[Engine, Path]:
    """Engine and key path of a SQLite file or an SQLAlchemy URL; ConfigError when that is impossible."""
    try:
        where = make_url(url) if isinstance(url, str) and "://" in url else URL.create("sqlite", database=str(url))
    except ArgumentError:
        raise ConfigError("ledger: not a database URL; a file path, or postgresql+psycopg://user@host/name") from None
    if where.get_backend_name() == "postgresql":
        _check_server(where, str(url))
        if key_path is None:
            raise ConfigError("ledger: a database other than a SQLite file needs the path of a key file")
        return _postgresql(where), Path(key_path)
    if where.get_backend_name() != "sqlite":
        raise ConfigError(f"ledger: {where.get_backend_name()!r} is not supported; a SQLite file, or PostgreSQL")
    if not where.database or where.database == ":memory:" or where.database.startswith("file:"):
        raise ConfigError("ledger: SQLite in memory is not durable; the path of a file")
    path = Path(where.database).resolve()
    if read_only and not path.is_file():
        raise NoLedger(f"ledger: {path}: no such ledger; the path of ledger.db")
    if not path.parent.is_dir():
        raise ConfigError(f"ledger: {path.parent}: no such directory; create it first")
    if anchor_file is not None and path.parent in anchor_file.resolve().parents:
        raise ConfigError(f"ledger_anchor: {anchor_file}: in the ledger's own directory it tells nothing; elsewhere")
    return _sqlite(path, read_only), Path(key_path) if key_path is not None else path.with_suffix(".key")


def _check_server(where: URL, url: str) -> None:
    """A password is in no URL; and a server on another machine proves, by its certificate, that it is that server: the
    password goes to it, and an impostor would acknowledge charges and forget them.

    Raises:
        ConfigError: in one line, without the URL.
    """
    if holds_database_password(url):
        raise ConfigError("ledger: a password in the URL would be shown and logged: set PGPASSWORD or ~/.pgpass")
    asked = dict(where.normalized_query)
    named = [value for key in ("host", "hostaddr", "service") for value in asked.get(key, ())]
    named += [where.host] if where.host else []
    variables = ("PGHOSTADDR",) if named else ("PGHOST", "PGHOSTADDR", "PGSERVICE")  # libpq's, where the URL is silent
    named += [value for name in variables if (value := os.environ.get(name))]
    mode = asked.get("sslmode", (os.environ.get("PGSSLMODE", ""),))[-1]
    for host in ",".join(named).split(",") if named and mode != "verify-full" else ():
        here = host.startswith(("/", "@")) or is_loopback(host) or is_loopback(re.sub(r":\d+$", "", host))
        if not here:
            raise ConfigError(
                f"ledger: {host}: nothing proves that this server is the right one: set PGSSLMODE=verify-full (and "
                "PGSSLROOTCERT), or sslmode in the URL"
            )


def _postgresql(where: URL) -> Engine:
    try:
        engine = create_engine(where, isolation_level="SERIALIZABLE", pool_size=1, max_overflow=0)
    except (ImportError, ArgumentError) as e:
        raise ConfigError(f"ledger: no driver for {where.drivername} ({e}); pip install 'psycopg[binary]'") from None

    @event.listens_for(engine, "connect")
    def _check(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            for setting in ("fsync", "full_page_writes"):
                if cursor.execute(f"SHOW {setting}").fetchone()[0] != "on":
                    raise ConfigError(f"ledger: the PostgreSQL server runs with {setting} off: it can lose charges; on")
            configured = cursor.execute("SHOW synchronous_commit").fetchone()[0]
        connection.rollback()
        record.info["synchronous_commit"] = "remote_apply" if configured == "remote_apply" else "on"

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:  # for each transaction: no default and no connection pooler is trusted
        level = connection.connection.info["synchronous_commit"]
        connection.exec_driver_sql(
            f"SET LOCAL synchronous_commit = {level}; SET LOCAL lock_timeout = '{BUSY_SECONDS}s'"
        )

    return engine


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
