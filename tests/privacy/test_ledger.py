"""Acknowledged charges survive everything; damage, rollback that can be told, and superseded writers are refused."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dprlhf_ray.errors import BudgetExhausted, ConfigError, LedgerDamaged
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep

STEP = DPStep("record", "zero_out", 10_000, 0.001, 4.0, 0.5, 1, 100_000, None)
SMALL = DPStep("record", "zero_out", 10_000, 0.04, 2.0, 0.5, 1, 3, 5.0)
CHARGER = """
import sys
from dprlhf_ray.errors import LedgerDamaged
from dprlhf_ray.privacy.ledger import Ledger
for _ in range(int(sys.argv[2])):
    ledger = Ledger.open(sys.argv[1])
    try:
        for _ in range(int(sys.argv[3])):
            charge = ledger.charge("rl")
            sys.stdout.write(f"{charge.seq} {charge.attempt}\\n")
            sys.stdout.flush()
    except LedgerDamaged:
        pass
"""


def start_charger(path: Path, opens: int, charges: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHARGER, str(path), str(opens), str(charges)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)})


def acknowledged(text: str) -> list[tuple[int, int]]:
    whole = text[: text.rfind("\n") + 1]
    return [(int(a), int(b)) for a, b in (line.split() for line in whole.splitlines())]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def filled(path: Path) -> str:
    """A closed ledger with one schedule and three charges; returns its head."""
    ledger = Ledger.open(path)
    ledger.declare("reviews", "rl", SMALL, 8.0, 1e-5)
    for _ in range(3):
        ledger.charge("rl")
    ledger.close()
    return ledger.head()


def refused(path: Path) -> None:
    """Neither a writer nor a reader accepts it."""
    with pytest.raises(LedgerDamaged):
        Ledger.read(path)
    with pytest.raises(LedgerDamaged):
        Ledger.open(path)


def alter(path: Path, statement: str, *arguments: object) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement, arguments)
    connection.close()


# ------------------------------------------------------------------------------------------------------- charging


def test_a_schedule_gets_exactly_its_attempts_also_over_a_restart(path: Path) -> None:
    ledger = Ledger.open(path)
    ledger.declare("reviews", "rl", SMALL, 8.0, 1e-5)
    assert [ledger.charge("rl").attempt for _ in range(2)] == [1, 2]
    ledger = Ledger.open(path)
    ledger.declare("reviews", "rl", SMALL, 8.0, 1e-5)
    assert ledger.charge("rl").attempt == 3
    with pytest.raises(BudgetExhausted):
        ledger.charge("rl")
    assert ledger.spent("rl") == 3
    ledger.verify()
    view = Ledger.read(path)
    assert [e.kind for e in view.entries] == ["open", "schedule", "charge", "charge", "open", "charge"]
    assert view.head == ledger.head() == view.entries[-1].hash
    assert view.epoch == ledger.epoch == 2
    assert view.schedules["rl"].step == SMALL


def test_what_was_not_declared_or_is_not_sound_is_refused(path: Path) -> None:
    ledger = Ledger.open(path)
    with pytest.raises(ConfigError, match="not declared"):
        ledger.charge("rl")
    with pytest.raises(ConfigError, match="never means"):
        ledger.declare("reviews", "rl", SMALL, None, 1e-5)
    with pytest.raises(ConfigError, match="1/N"):
        ledger.declare("reviews", "rl", SMALL, 8.0, 1e-3)
    with pytest.raises(ConfigError, match="costs"):
        ledger.declare("reviews", "rl", SMALL, 0.01, 1e-5)
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="epsilon"):
            ledger.declare("reviews", "rl", SMALL, epsilon, 1e-5)
    ledger.declare("reviews", "rl", SMALL, 8.0, 1e-5)
    for other in (("other", SMALL, 8.0), ("reviews", STEP, 8.0), ("reviews", SMALL, 9.0)):
        with pytest.raises(ConfigError, match="other parameters"):
            ledger.declare(other[0], "rl", other[1], other[2], 1e-5)
    assert len(Ledger.read(path).entries) == 2


def test_a_clip_only_stage_says_that_it_guarantees_nothing(path: Path) -> None:
    ledger = Ledger.open(path)
    control = DPStep("record", "zero_out", 10_000, 0.04, 0.0, 0.5, 1, 1, None)
    with pytest.raises(ConfigError, match="guarantees no"):
        ledger.declare("reviews", "control", control, 8.0, 1e-5)
    ledger.declare("reviews", "control", control, None, 1e-5)
    ledger.charge("control")
    with pytest.raises(BudgetExhausted):
        ledger.charge("control")
    assert json.loads(Ledger.read(path).entries[1].body)["guarantee"] == "none"


def test_an_older_writer_is_fenced(path: Path) -> None:
    old = Ledger.open(path)
    old.declare("reviews", "rl", SMALL, 8.0, 1e-5)
    new = Ledger.open(path)
    for _ in range(2):
        with pytest.raises(LedgerDamaged):
            old.charge("rl")
    assert new.charge("rl").attempt == 1
    with pytest.raises(LedgerDamaged):
        old.verify()


def test_two_processes_that_race_lose_and_double_nothing(path: Path) -> None:
    """Both keep taking the ledger over from each other: every acknowledged charge is there, once."""
    ledger = Ledger.open(path)
    ledger.declare("reviews", "rl", STEP, 8.0, 1e-5)
    ledger.close()
    racers = [start_charger(path, 15, 10) for _ in range(2)]
    charges = [charge for racer in racers for charge in acknowledged(racer.communicate(timeout=60)[0])]
    assert all(racer.returncode == 0 for racer in racers)
    view = Ledger.read(path)
    rows = [(e.seq, json.loads(e.body)["attempt"]) for e in view.entries if e.kind == "charge"]
    assert sorted(charges) == rows
    assert [attempt for _, attempt in rows] == list(range(1, len(rows) + 1))
    assert view.epoch == 31


def test_a_kill_at_any_moment_loses_no_acknowledged_charge(path: Path) -> None:
    ledger = Ledger.open(path)
    ledger.declare("reviews", "rl", STEP, 8.0, 1e-5)
    ledger.close()
    seen: list[tuple[int, int]] = []
    for _ in range(5):
        charger = start_charger(path, 1, 100_000)
        assert charger.stdout is not None
        first = charger.stdout.readline()
        time.sleep(random.uniform(0.0, 0.15))
        os.kill(charger.pid, signal.SIGKILL)
        text = first + charger.communicate(timeout=30)[0]
        seen += acknowledged(text)
        rows = [(e.seq, json.loads(e.body)["attempt"]) for e in Ledger.read(path).entries if e.kind == "charge"]
        assert set(seen) <= set(rows)
        assert len(rows) <= len(seen) + 5  # at most the one in flight at each kill
    assert Ledger.open(path).spent("rl") == len(rows)


# --------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("column", ["seq", "epoch", "kind", "dataset", "stage", "body", "prev_hash", "hash"])
@pytest.mark.parametrize("row", [1, 3, 5])
def test_a_changed_field_of_any_entry_is_refused(path: Path, column: str, row: int) -> None:
    filled(path)
    changed = f"{column} + 7" if column in ("seq", "epoch") else f"{column} || ' '"
    alter(path, f"UPDATE entries SET {column} = {changed} WHERE seq = ?", row)
    refused(path)


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
def test_a_lost_tail_a_hole_or_a_forged_state_is_refused(path: Path, statement: str) -> None:
    filled(path)
    alter(path, statement)
    refused(path)


def test_a_tail_cut_with_a_matching_state_is_refused(path: Path) -> None:
    """Without the key, the state row cannot be made to agree with a shorter chain."""
    filled(path)
    alter(path, "DELETE FROM entries WHERE seq = 5")
    alter(path, "UPDATE state SET seq = 4, head = (SELECT hash FROM entries WHERE seq = 4)")
    refused(path)


def test_swapped_entries_are_refused(path: Path) -> None:
    filled(path)
    for old, new in ((4, 99), (5, 4), (99, 5)):
        alter(path, "UPDATE entries SET seq = ? WHERE seq = ?", new, old)
    refused(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_file_is_refused_or_changes_nothing(path: Path, where: float, bit: int) -> None:
    """SQLite's free space and header counters carry no entry; anywhere else a flip must be seen."""
    original = path.with_name("original.db")
    if not original.exists():
        filled(path)
        original.write_bytes(path.read_bytes())
    before = Ledger.read(original, path.with_suffix(".key"))
    content = bytearray(original.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    copy = path.with_name("flipped.db")
    for leftover in path.parent.glob("flipped.db*"):
        leftover.unlink()
    copy.write_bytes(content)
    try:
        after = Ledger.read(copy, path.with_suffix(".key"))
    except LedgerDamaged:
        return
    assert after.entries == before.entries


def test_a_deleted_ledger_or_key_is_refused_and_never_silently_replaced(path: Path) -> None:
    filled(path)
    key = path.with_suffix(".key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_bytes()
    key.unlink()
    refused(path)
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    refused(path)
    key.write_bytes(secret)
    Ledger.read(path)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        Ledger.open(path)
    key.chmod(0o600)
    path.unlink()
    with pytest.raises(LedgerDamaged, match="restore"):
        Ledger.open(path)


def test_a_first_start_that_was_killed_before_its_first_entry_starts_again(path: Path) -> None:
    key = path.with_suffix(".key")
    key.with_name("ledger.key.new").write_bytes(bytes(range(32)))
    key.with_name("ledger.key.new").chmod(0o600)
    Ledger.open(path).close()
    assert key.read_bytes() == bytes(range(32))
    key.rename(key.with_name("ledger.key.new"))  # killed after the first entry, before the key got its name
    assert Ledger.open(path).epoch == 2
    assert key.exists()


def test_a_rollback_to_an_older_copy_is_refused_where_an_anchor_can_tell(path: Path) -> None:
    ledger = Ledger.open(path)
    ledger.declare("reviews", "rl", SMALL, 8.0, 1e-5)
    ledger.close()
    copy = path.read_bytes()
    ledger = Ledger.open(path)
    ledger.charge("rl")
    released = ledger.head()
    ledger.close()
    assert Ledger.read(path, anchor=released).head == released
    path.write_bytes(copy)
    with pytest.raises(LedgerDamaged, match="recorded elsewhere"):
        Ledger.open(path, anchor=released)
    with pytest.raises(LedgerDamaged, match="recorded elsewhere"):
        Ledger.read(path, anchor=released)
    empty = path.with_name("empty.db")
    with pytest.raises(LedgerDamaged, match="recorded elsewhere"):
        Ledger.open(empty, anchor=released)


def test_places_that_cannot_hold_a_ledger_are_refused_in_one_line(tmp_path: Path) -> None:
    for url in (
        "sqlite://",
        "sqlite:///:memory:",
        str(tmp_path / "none" / "ledger.db"),
        "postgresql://host/name",
        "no://x",
    ):
        with pytest.raises(ConfigError) as caught:
            Ledger.open(url)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such ledger"):
        Ledger.read(tmp_path / "ledger.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to look like one" * 10)
    with pytest.raises(LedgerDamaged):
        Ledger.open(tmp_path / "text.db")
