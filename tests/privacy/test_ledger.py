"""Acknowledged charges survive everything; damage, rollback that can be told, and superseded writers are refused."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray.errors import BudgetExhausted, ConfigError, LedgerDamaged
from dprlhf_ray.privacy import store
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep
from tests.privacy.ledger_place import LONG, SMALL, Place, schema


def filled(place: Place) -> str:
    """A closed ledger with one schedule and three charges; returns its head."""
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    for _ in range(3):
        ledger.charge("rl")
    ledger.close()
    return ledger.head()


def refused(place: Place) -> None:
    """Neither a writer nor a reader accepts it."""
    with pytest.raises(LedgerDamaged):
        place.read()
    with pytest.raises(LedgerDamaged):
        place.open()


# ------------------------------------------------------------------------------------------------------- charging


def test_a_schedule_gets_exactly_its_attempts_also_over_a_restart(place: Place) -> None:
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    assert [ledger.charge("rl").attempt for _ in range(2)] == [1, 2]
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    assert ledger.charge("rl").attempt == 3
    with pytest.raises(BudgetExhausted):
        ledger.charge("rl")
    assert ledger.spent("rl") == 3
    ledger.verify()
    view = place.read()
    entries = place.entries()
    assert [e.kind for e in entries] == ["open", "schedule", "charge", "charge", "open", "charge"]
    assert view.head == ledger.head() == entries[-1].hash
    assert view.epoch == ledger.epoch == 2
    assert view.schedules["rl"].step == SMALL


def test_what_was_not_declared_or_is_not_sound_is_refused(place: Place) -> None:
    ledger = place.open()
    with pytest.raises(ConfigError, match="not declared"):
        ledger.charge("rl")
    with pytest.raises(ConfigError, match="never means"):
        ledger.declare([Declaration("reviews", "rl", SMALL, None, 1e-5)])
    with pytest.raises(ConfigError, match="1/N"):
        ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-3)])
    with pytest.raises(ConfigError, match="costs"):
        ledger.declare([Declaration("reviews", "rl", SMALL, 0.01, 1e-5)])
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="epsilon"):
            ledger.declare([Declaration("reviews", "rl", SMALL, epsilon, 1e-5)])
    ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    for other in (("other", SMALL, 8.0), ("reviews", LONG, 8.0), ("reviews", SMALL, 9.0)):
        with pytest.raises(ConfigError, match="other parameters"):
            ledger.declare([Declaration(other[0], "rl", other[1], other[2], 1e-5)])
    assert place.read().seq == 2


def test_a_clip_only_stage_says_that_it_guarantees_nothing(place: Place) -> None:
    ledger = place.open()
    control = DPStep("record", "zero_out", 10_000, 0.04, 0.0, 0.5, 1, 1, None)
    with pytest.raises(ConfigError, match="guarantees no"):
        ledger.declare([Declaration("reviews", "control", control, 8.0, 1e-5)])
    ledger.declare([Declaration("reviews", "control", control, None, 1e-5)])
    ledger.charge("control")
    with pytest.raises(BudgetExhausted):
        ledger.charge("control")
    assert json.loads(place.entries()[1].body)["guarantee"] == "none"


def test_an_older_writer_is_fenced(place: Place) -> None:
    old = place.open()
    old.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    new = place.open()
    for words in ("fenced, a newer writer", "closed, fenced or failed"):
        with pytest.raises(LedgerDamaged, match=words):
            old.charge("rl")
    assert new.charge("rl").attempt == 1
    with pytest.raises(LedgerDamaged):
        old.verify()


# --------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("column", ["seq", "epoch", "kind", "dataset", "stage", "body", "prev_hash", "hash"])
@pytest.mark.parametrize("row", [1, 3, 5])
def test_a_changed_field_of_any_entry_is_refused(place: Place, column: str, row: int) -> None:
    filled(place)
    changed = f"{column} + 7" if column in ("seq", "epoch") else f"substr({column}, 2) || 'x'"
    place.alter(f"UPDATE entries SET {column} = {changed} WHERE seq = {row}")
    refused(place)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM entries WHERE seq = 5",
        "DELETE FROM entries WHERE seq = 3",
        "DELETE FROM entries WHERE seq = 1",
        "DELETE FROM entries",
        "DELETE FROM state",
        "UPDATE state SET seq = 4, head = (SELECT hash FROM entries WHERE seq = 4)",
        "UPDATE state SET epoch = 2",
        "UPDATE state SET mac = head",
        "INSERT INTO entries SELECT 6, epoch, kind, dataset, stage, body, hash, hash FROM entries WHERE seq = 5",
        "INSERT INTO state SELECT 2, seq, epoch, head, mac FROM state",
        "DROP TABLE entries",
        "DROP TABLE state",
    ],
)
def test_a_lost_tail_a_hole_or_a_forged_state_is_refused(place: Place, statement: str) -> None:
    filled(place)
    place.alter(statement)
    refused(place)


def test_a_tail_cut_with_a_matching_state_is_refused(place: Place) -> None:
    """Without the key, the state row cannot be made to agree with a shorter chain."""
    filled(place)
    place.alter("DELETE FROM entries WHERE seq = 5")
    place.alter("UPDATE state SET seq = 4, head = (SELECT hash FROM entries WHERE seq = 4)")
    refused(place)


def test_swapped_entries_are_refused(place: Place) -> None:
    filled(place)
    for old, new in ((4, 99), (5, 4), (99, 5)):
        place.alter(f"UPDATE entries SET seq = {new} WHERE seq = {old}")
    refused(place)


def test_a_deleted_ledger_or_key_is_refused_and_never_silently_replaced(place: Place) -> None:
    filled(place)
    key = place.key
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_bytes()
    key.unlink()
    refused(place)
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    refused(place)
    key.write_bytes(secret)
    place.read()
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        place.open()
    key.chmod(0o600)
    place.alter("DROP TABLE entries", "DROP TABLE state")
    refused(place)


def test_a_deleted_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    Ledger.open(path).close()
    path.unlink()
    for _ in range(2):
        with pytest.raises(LedgerDamaged, match="restore"):
            Ledger.open(path)
        with pytest.raises(LedgerDamaged, match="restore"):
            Ledger.read(path)


def test_a_first_start_that_was_killed_before_its_first_entry_starts_again(place: Place) -> None:
    key = place.key
    pending = key.with_name("ledger.key.new")
    pending.write_bytes(bytes(range(32)))
    pending.chmod(0o600)
    place.open().close()
    assert key.read_bytes() == bytes(range(32))
    key.rename(pending)  # killed after the first entry, before the key got its name
    assert place.open().epoch == 2
    assert key.exists()


def test_a_rollback_to_an_older_copy_is_refused_where_a_recorded_head_can_tell(
    place: Place, new_place: Callable[[], Place]
) -> None:
    """A ledger that is older than a checkpoint made under it would pay for the same steps twice."""
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    ledger.close()
    copy = place.rows()
    ledger = place.open()
    ledger.charge("rl")
    released = ledger.head()
    ledger.close()
    assert place.read(anchor=released).head == released
    place.put_back(copy)
    for attempt in (place.open, place.read, new_place().open):
        with pytest.raises(LedgerDamaged, match="recorded in a checkpoint"):
            attempt(anchor=released)
    assert place.read().seq == 2  # without it nobody can tell


def test_places_that_cannot_hold_a_ledger_are_refused_in_one_line(tmp_path: Path) -> None:
    for url in (
        "sqlite://",
        "sqlite:///:memory:",
        str(tmp_path / "none" / "ledger.db"),
        "postgresql://host/name",
        "no://x",
        "mysql+pymysql://host/name",
    ):
        with pytest.raises(ConfigError) as caught:
            Ledger.open(url)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such ledger"):
        Ledger.read(tmp_path / "ledger.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to look like one" * 10)
    with pytest.raises(LedgerDamaged):
        Ledger.open(tmp_path / "text.db")


# ------------------------------------------------------------------------------------------------------ PostgreSQL


def test_a_server_that_forgets_commits_by_default_is_made_to_keep_ours(postgresql: Any, tmp_path: Path) -> None:
    """Asynchronous commit, asked for by the server or the URL, would acknowledge charges that a crash forgets."""
    for level, kept in (("off", "on"), ("local", "on"), ("remote_write", "on"), ("remote_apply", "remote_apply")):
        url = schema(postgresql, f"commit_{level}", f"synchronous_commit={level}")
        ledger = Ledger.open(url, tmp_path / f"{level}.key")
        with ledger._engine.begin() as connection:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == kept
            assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == "serializable"
        ledger.close()


@pytest.mark.parametrize(
    ("address", "variables", "refused"),
    [
        ("u:s3c@127.0.0.1/n", {}, "a password in the URL"),
        ("u@/n?host=/tmp&password=s3c", {}, "a password in the URL"),
        ("u@db.example/n", {}, "db.example: nothing proves"),
        ("u@db.example/n?sslmode=require", {}, "db.example: nothing proves"),
        ("u@db.example/n?sslmode=require", {"PGSSLMODE": "verify-full"}, "db.example: nothing proves"),
        ("u@/n?host=127.0.0.1&host=db.example:5433", {}, "db.example:5433: nothing proves"),
        ("u@/n?host=/tmp,10.0.0.9", {}, "10.0.0.9: nothing proves"),
        ("u@127.0.0.1/n?hostaddr=10.0.0.9", {}, "10.0.0.9: nothing proves"),
        ("u@/n", {"PGHOST": "db.example"}, "db.example: nothing proves"),
        ("u@db.example/n?sslmode=verify-full", {}, None),
        ("u@db.example/n", {"PGSSLMODE": "verify-full"}, None),
        ("u@/n", {"PGHOST": "/run/postgresql"}, None),
        ("u@localhost:5433/n", {}, None),
        ("u@[::1]:5433/n", {}, None),
        ("u:@/n?host=/tmp/socket", {}, None),
    ],
)
def test_a_server_elsewhere_proves_that_it_is_the_right_one_and_no_password_is_in_a_url(
    monkeypatch: pytest.MonkeyPatch, address: str, variables: dict[str, str], refused: str | None
) -> None:
    """False: whoever answers in a server's place gets the password, and acknowledges charges that it forgets."""
    for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGSSLMODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    url = f"postgresql+psycopg://{address}"
    if refused is None:
        store.connect(url, "k", read_only=True)[0].dispose()
    else:
        with pytest.raises(ConfigError, match=f"^ledger: {re.escape(refused)}") as caught:
            store.connect(url, "k", read_only=True)
        assert "s3c" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_database_server_needs_a_key_path_and_an_answer(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://nobody@/none?host={tmp_path}"
    with pytest.raises(ConfigError, match="key file"):
        Ledger.open(url)
    with pytest.raises(LedgerDamaged, match="database failed") as caught:
        Ledger.open(url, tmp_path / "ledger.key")
    assert "\n" not in str(caught.value)
