"""The ledger's store fails under a charge: full disk, lost connection, dead server. What was acknowledged is counted,
what was not is counted at most once, and the refusal is one line. No cluster: an accountant, driven directly."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event

from dprlhf_ray.actors.accountant import AccountantActor
from dprlhf_ray.errors import LedgerDamaged
from dprlhf_ray.privacy import anchor, store
from dprlhf_ray.privacy.budget import Declaration
from tests.chaos import oracle
from tests.privacy.ledger_place import LONG, Place, postgresql_server, schema

PAID = 3  # charges before the fault
Fault = Callable[[pytest.MonkeyPatch, Place, Any], Any]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with postgresql_server() as found:
        yield found


def accountant(place: Place) -> AccountantActor:
    found = AccountantActor(place.url, str(place.key), anchor_file=str(place.anchor))
    found.declare([Declaration("notes", "rl", LONG, 8.0, 1e-5)])
    return found


def paying(place: Place) -> AccountantActor:
    """An accountant that has charged PAID attempts."""
    found = accountant(place)
    for _ in range(PAID):
        found.reserve("rl", "learner")
    return found


def in_order_after(place: Place, spent: range) -> None:
    """A new accountant goes on where the old one was, and the numbers have no gap."""
    again = accountant(place)
    known = again.spent("rl")
    assert known in spent
    assert again.reserve("rl", "learner").attempt == known + 1
    again.verify()
    again.close()
    assert oracle.charges(place.url, place.key) == list(range(1, known + 2))


def refused(office: AccountantActor, says: str) -> None:
    """One line, and for good: a writer that failed once charges nothing more."""
    with pytest.raises(LedgerDamaged, match=says) as raised:
        office.reserve("rl", "learner")
    assert "\n" not in str(raised.value) and raised.value.exit_code == 4
    with pytest.raises(LedgerDamaged):
        office.reserve("rl", "learner")


# --------------------------------------------------------------------------------------------------------- a file


@pytest.fixture
def file(tmp_path: Path) -> Place:
    for name in ("here", "apart"):
        (tmp_path / name).mkdir()
    return Place(str(tmp_path / "here" / "ledger.db"), tmp_path / "here" / "ledger.key", tmp_path / "apart" / "anchor")


def _full(patch: pytest.MonkeyPatch, place: Place, office: AccountantActor) -> None:
    """SQLite's own "database or disk is full": no page more."""

    @event.listens_for(office._ledger._engine, "begin")
    def no_page_more(connection: Any) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    for _ in range(10_000):  # what is left of the last page
        office.reserve("rl", "learner")


def _anchor_full(what: str) -> Callable[[pytest.MonkeyPatch, Place, AccountantActor], None]:
    def fault(patch: pytest.MonkeyPatch, place: Place, office: AccountantActor) -> None:
        def fail(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(anchor.os, what, fail)

    return fault


def _read_only(patch: pytest.MonkeyPatch, place: Place, office: AccountantActor) -> None:
    """As a file system that went read-only: every statement that writes is refused."""

    @event.listens_for(office._ledger._engine, "begin")
    def refuse(connection: Any) -> None:
        connection.exec_driver_sql("PRAGMA query_only = ON")


def _commit_unheard(patch: pytest.MonkeyPatch, place: Place, office: AccountantActor) -> None:
    """The commit is on disk, and its answer is an input/output error."""
    plain = store.writing

    @contextmanager
    def writing(engine: Any) -> Iterator[Any]:
        with plain(engine) as connection:
            yield connection
        raise ValueError("disk I/O error")

    patch.setattr(store, "writing", writing)


FILE = [
    ("disk-full-at-the-charge", _full, "full", None),
    ("disk-full-at-the-anchor-s-write", _anchor_full("pwrite"), "No space left", 1),
    ("disk-full-at-the-anchor-s-sync", _anchor_full("fdatasync"), "No space left", 1),
    ("disk-read-only-at-the-charge", _read_only, "readonly|read-only|query_only", 0),
    ("ledger-commit-whose-answer-is-lost", _commit_unheard, "unreadable", 1),
]


@pytest.mark.parametrize(("fault", "says", "unheard"), [f[1:] for f in FILE], ids=[f[0] for f in FILE])
def test_a_file_s_fault(
    fault: Fault, says: str, unheard: int | None, file: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: a charge that was acknowledged is lost, one that was not is lost though its noise could be out, or the
    accountant goes on with a ledger that it could not write."""
    office = paying(file)
    with monkeypatch.context() as patch:
        if unheard is None:
            with pytest.raises(LedgerDamaged, match=says):
                fault(patch, file, office)
            paid = office.spent("rl")
            assert paid > PAID and oracle.charges(file.url, file.key) == list(range(1, paid + 1))
            unheard = 0
        else:
            fault(patch, file, office)
            refused(office, says)
            paid = PAID
    office.close()
    in_order_after(file, range(paid + unheard, paid + unheard + 1))


def _removed(place: Place, older: Path) -> None:
    Path(place.url).unlink()


def _replaced(place: Place, older: Path) -> None:
    """As somebody does who restores a backup: the open file lives on without a name."""
    shutil.copy(older, older.with_suffix(".restored"))
    os.replace(older.with_suffix(".restored"), place.url)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(_removed, id="ledger-file-removed-while-open"),
        pytest.param(_replaced, id="ledger-file-replaced-by-an-older-copy-while-open"),
    ],
)
def test_a_ledger_that_lost_its_name_is_not_written(
    fault: Callable[[Place, Path], None], file: Place, tmp_path: Path
) -> None:
    """False: charges go to a file that nobody finds again, and are forgotten when the writer ends."""
    office = accountant(Place(file.url, file.key, file.anchor))
    office.close()
    shutil.copy(file.url, tmp_path / "older.db")
    office = AccountantActor(file.url, str(file.key), anchor_file=str(file.anchor))
    office.reserve("rl", "learner")
    fault(file, tmp_path / "older.db")
    refused(office, "removed or replaced")
    office.close()


def test_disk_full_at_the_very_first_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """False: a ledger whose first entry could not be written looks like one that was emptied, or keeps no key."""
    plain = store._sqlite

    def full(path: Path, read_only: bool) -> Any:
        engine = plain(path, read_only)

        @event.listens_for(engine, "begin")
        def no_page_more(connection: Any) -> None:
            connection.exec_driver_sql("PRAGMA max_page_count = 2")

        return engine

    url = str(tmp_path / "ledger.db")
    with monkeypatch.context() as patch:
        patch.setattr(store, "_sqlite", full)
        with pytest.raises(LedgerDamaged, match="full") as raised:
            AccountantActor(url)
    assert "\n" not in str(raised.value)
    again = AccountantActor(url)
    again.declare([Declaration("notes", "rl", LONG, 8.0, 1e-5)])
    assert again.reserve("rl", "learner").attempt == 1
    again.close()
    assert oracle.charges(url) == [1]


# -------------------------------------------------------------------------------------------------------- a server


@pytest.fixture
def served(server: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    (tmp_path / "apart").mkdir()
    name = "chaos_" + "".join(c if c.isalnum() else "_" for c in request.node.callspec.id)
    return Place(schema(server, name), tmp_path / "ledger.key", tmp_path / "apart" / "anchor")


def _others_end(server: Any) -> None:
    """End every connection but this one, as a network that resets them."""
    engine = create_engine(server.get_uri(driver="psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )
    engine.dispose()


def _lost_before_commit(patch: pytest.MonkeyPatch, server: Any, office: AccountantActor) -> None:
    plain = store.writing

    @contextmanager
    def writing(engine: Any) -> Iterator[Any]:
        with plain(engine) as connection:
            yield connection
            _others_end(server)

    patch.setattr(store, "writing", writing)


def _lost_after_commit(patch: pytest.MonkeyPatch, server: Any, office: AccountantActor) -> None:
    """The commit is durable at the server, and the client never hears of it."""
    plain = office._ledger._engine.dialect.do_commit

    def commit(connection: Any) -> None:
        plain(connection)
        _others_end(server)
        connection.execute("SELECT 1")

    patch.setattr(office._ledger._engine.dialect, "do_commit", commit)


def _idle_lost(patch: pytest.MonkeyPatch, server: Any, office: AccountantActor) -> None:
    _others_end(server)


def _restarted(how: signal.Signals) -> Callable[[pytest.MonkeyPatch, Any, AccountantActor], None]:
    def fault(patch: pytest.MonkeyPatch, server: Any, office: AccountantActor) -> None:
        postmaster = server.get_postmaster_info().process
        postmaster.send_signal(how)
        postmaster.wait(30)
        server.ensure_postgres_running()

    return fault


def _gone(patch: pytest.MonkeyPatch, server: Any, office: AccountantActor) -> None:
    postmaster = server.get_postmaster_info().process
    postmaster.send_signal(signal.SIGINT)
    postmaster.wait(30)


SERVER = [
    ("postgresql-connection-lost-before-commit", _lost_before_commit, {0}),
    ("postgresql-connection-lost-after-commit", _lost_after_commit, {1}),
    ("postgresql-connection-lost-while-idle", _idle_lost, {0}),
    ("postgresql-shut-down-and-started", _restarted(signal.SIGINT), {0}),
    ("postgresql-crashed-and-recovered", _restarted(signal.SIGQUIT), {0}),
    ("postgresql-gone-for-good", _gone, {0}),
]


@pytest.mark.parametrize(("fault", "unheard"), [f[1:] for f in SERVER], ids=[f[0] for f in SERVER])
def test_a_server_s_fault(
    fault: Fault, unheard: set[int], served: Place, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: a charge is lost with its connection, or the run draws though its ledger does not answer."""
    office = paying(served)
    with monkeypatch.context() as patch:
        fault(patch, server, office)
        refused(office, "database failed")
    if fault is _gone:
        with pytest.raises(LedgerDamaged, match="database failed") as raised:
            accountant(served)
        assert "\n" not in str(raised.value)
        server.ensure_postgres_running()
    office.close()
    in_order_after(served, range(PAID + min(unheard), PAID + max(unheard) + 1))
