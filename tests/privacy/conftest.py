"""Ledgers for this room's tests: each `place` is a SQLite file and a schema of a real PostgreSQL server in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.privacy.ledger_place import Place, postgresql_server, schema

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Any]:
    with postgresql_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Place]:
    """Makes empty places, one after the other."""

    def make() -> Place:
        number = next(_numbers)
        folder, apart = tmp_path / f"ledger-{number}", tmp_path / f"apart-{number}"
        folder.mkdir()
        apart.mkdir()
        url = str(folder / "ledger.db")
        if request.param == "postgresql":
            url = schema(request.getfixturevalue("postgresql"), f"ledger_{number}")
        return Place(url, folder / "ledger.key", apart / "anchor")

    return make


@pytest.fixture
def place(new_place: Callable[[], Place]) -> Place:
    return new_place()
