"""No acknowledged entry is lost and none is doubled: clients killed, racing, repeating; files with any byte flipped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dprlhf_ray.actors.accountant import AccountantActor
from dprlhf_ray.errors import ConfigError, LedgerDamaged
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.permit import PermitRefused
from tests.privacy.ledger_crash import KINDS, SCRIPT, client, heard, perform, racer, start
from tests.privacy.ledger_place import LONG, SMALL, Place, postgresql_server, schema

New = Callable[[], Place]


# ---------------------------------------------------------------------------------------------------------- crashes


def points(new_place: New) -> int:
    """Number of points of the script where a client can die."""
    process, told = start(client, new_place(), None)
    last = heard(told)[-1]
    process.join()
    return int(last["points"])


def die_and_go_on(place: Place, deadly: int) -> None:
    """Kill a client at this point, open again, and compare with what it was told; then finish its script."""
    process, told = start(client, place, deadly)
    acknowledged = [m for m in heard(told) if isinstance(m, int)]
    process.join()
    assert process.exitcode == -signal.SIGKILL
    ends = list(accumulate((len(KINDS[name]) for name in SCRIPT), initial=0))
    assert acknowledged == ends[1 : len(acknowledged) + 1]
    ledger = place.open(anchor_file=place.anchor)  # an honest crash is never refused
    kinds = [row[2] for row in place.rows()["entries"]]
    assert len(kinds) - 1 in ends  # one of several stages alone would have paid for none
    done = ends.index(len(kinds) - 1)
    assert kinds == [kind for name in SCRIPT[:done] for kind in KINDS[name]] + ["open"]
    assert done in (len(acknowledged), len(acknowledged) + 1)  # lost: fewer; doubled: more
    for name in SCRIPT[done:]:
        ledger, _ = perform(ledger, name, place)
    ledger.verify()
    ledger.close()
    charges = [json.loads(r[5])["attempt"] for r in place.rows()["entries"] if (r[2], r[4]) == ("charge", "rl")]
    assert charges == [1, 2]
    assert place.read(anchor_file=place.anchor).schedules["adaptive"].spent == 1


def test_a_kill_at_any_point_loses_and_doubles_nothing(new_place: New) -> None:
    """A sample of the whole grid below: every statement, commit, sync, write and rename of every kind of entry."""
    whole = points(new_place)
    assert whole > 100
    step = whole // 8
    for deadly in range(random.randint(1, step), whole + 1, step):
        die_and_go_on(new_place(), deadly)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_kill_at_every_point_loses_and_doubles_nothing(new_place: New) -> None:
    whole = points(new_place)
    for deadly in range(1, whole + 1):
        die_and_go_on(new_place(), deadly)
    print(f"{whole} crash points")


def test_a_kill_at_any_moment_loses_no_acknowledged_charge(place: Place) -> None:
    """As above, at moments that no hook knows of."""
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", LONG, 8.0, 1e-5)])
    ledger.close()
    seen: list[tuple[int, int]] = []
    for _ in range(4):
        process, told = start(racer, place, 1, 100_000, True)
        seen.append(told.recv())
        time.sleep(random.uniform(0.0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        seen += heard(told)
        process.join()
    assert place.open(anchor_file=place.anchor).spent("rl") <= len(seen) + 4  # at most the one in flight at each kill
    rows = [(r[0], json.loads(r[5])["attempt"]) for r in place.rows()["entries"] if r[2] == "charge"]
    assert set(seen) <= set(rows) and len(set(seen)) == len(seen)
    assert [attempt for _, attempt in rows] == list(range(1, len(rows) + 1))


# ------------------------------------------------------------------------------------------------------------ races


def race(place: Place, clients: int, opens: int, charges: int) -> int:
    ledger = place.open(anchor_file=place.anchor)
    ledger.declare([Declaration("reviews", "rl", LONG, 8.0, 1e-5)])
    ledger.close()
    racers = [start(racer, place, opens, charges, True) for _ in range(clients)]
    told = [charge for _, pipe in racers for charge in heard(pipe)]
    for process, _ in racers:
        process.join()
        assert process.exitcode == 0
    view = place.read(anchor_file=place.anchor)
    rows = [(r[0], json.loads(r[5])["attempt"]) for r in place.rows()["entries"] if r[2] == "charge"]
    assert sorted(told) == rows
    assert [attempt for _, attempt in rows] == list(range(1, len(rows) + 1))
    assert view.epoch == 1 + clients * opens
    return len(rows)


def test_processes_that_race_lose_and_double_nothing(place: Place) -> None:
    """They keep taking the ledger over from each other: every acknowledged charge is there, once."""
    assert race(place, clients=4, opens=4, charges=5) >= 4


@pytest.mark.slow
def test_many_processes_that_race_lose_and_double_nothing(place: Place) -> None:
    print(f"{race(place, clients=16, opens=12, charges=20)} charges by 16 processes that took over 12 times each")


MESSAGE = st.tuples(st.sampled_from(["reserve", "redeem"]), st.integers(0, 5), st.sampled_from(["m1", "m2"]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(MESSAGE, max_size=25))
def test_messages_that_are_repeated_or_come_late_get_no_permit_that_was_not_paid(
    tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[str, int, str]]
) -> None:
    """Each reservation is a charge of its own; each token answers one message, as often as it is asked."""
    accountant = AccountantActor(str(tmp_path_factory.mktemp("ledger") / "ledger.db"))
    accountant.declare([Declaration("reviews", "rl", LONG, 8.0, 1e-5)])
    tokens: list[str] = []
    answers: dict[str, tuple[str, Any]] = {}
    for kind, which, message in messages:
        if kind == "reserve":
            tokens.append(accountant.reserve("rl", "learner-1").token)
            continue
        token = tokens[which] if which < len(tokens) else "0" * 32
        try:
            permit = accountant.redeem(token, "learner-1", message)
        except PermitRefused:
            assert token not in tokens or answers[token][0] != message
        else:
            assert token in tokens and answers.setdefault(token, (message, permit)) == (message, permit)
    assert accountant.spent("rl") == len(set(tokens)) == len(tokens)
    assert sorted({p.attempt for _, p in answers.values()}) == sorted(p.attempt for _, p in answers.values())
    accountant.close()


@pytest.mark.slow
def test_a_database_server_killed_under_load_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    """PostgreSQL itself dies without a checkpoint, as in a power cut of its processes, and recovers."""
    with postgresql_server() as server:
        place = Place(schema(server, "killed"), tmp_path / "ledger.key", tmp_path / "anchor")
        ledger = place.open(anchor_file=place.anchor)
        ledger.declare([Declaration("reviews", "rl", LONG, 8.0, 1e-5)])
        ledger.close()
        seen: list[tuple[int, int]] = []
        for _ in range(3):
            process, told = start(racer, place, 1, 100_000, True)
            seen += [told.recv() for _ in range(20)]
            postmaster = server.get_postmaster_info().process
            postmaster.send_signal(signal.SIGQUIT)
            seen += heard(told)
            process.join()
            postmaster.wait(30)
            server.ensure_postgres_running()
            spent = place.open(anchor_file=place.anchor).spent("rl")
            assert {attempt for _, attempt in seen} <= set(range(1, spent + 1)) and spent <= len(seen) + 3


# ------------------------------------------------------------------------------------------------------------ flips


@pytest.fixture
def small(tmp_path: Path) -> tuple[bytes, Place, list[Any]]:
    """A small closed SQLite ledger: its bytes, a place to put changed ones, and what a reader sees in it."""
    place = Place(str(tmp_path / "ledger.db"), tmp_path / "ledger.key", tmp_path / "anchor")
    ledger = place.open()
    ledger.set_budget("reviews", 20.0, 1e-5)
    ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    ledger.charge("rl")
    ledger.close()
    return Path(place.url).read_bytes(), place, place.entries()


def flipped(content: bytes, place: Place, entries: list[Any], where: Iterator[tuple[int, int]]) -> tuple[int, int]:
    """Number of flips that were refused, and that changed nothing that a reader sees; there is no third kind."""
    refused = harmless = 0
    for at, mask in where:
        for leftover in ("-wal", "-shm", "-journal"):
            Path(place.url + leftover).unlink(missing_ok=True)
        Path(place.url).write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
        try:
            assert place.entries() == entries, f"byte {at} ^ {mask:#x} went through"
        except LedgerDamaged:
            refused += 1
        else:
            harmless += 1
    return refused, harmless


def test_a_flipped_byte_of_the_file_is_refused_or_changes_nothing(small: tuple[bytes, Place, list[Any]]) -> None:
    """SQLite's free space and header counters carry no entry; anywhere else a flip must be seen."""
    content, place, entries = small
    spots = ((random.randrange(len(content)), random.randrange(1, 256)) for _ in range(200))
    refused, _ = flipped(content, place, entries, spots)
    assert refused > 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_flipped_byte_of_the_file_is_refused_or_changes_nothing(small: tuple[bytes, Place, list[Any]]) -> None:
    content, place, entries = small
    spots = ((at, random.randrange(1, 256)) for at in range(len(content)))
    print("flips refused, harmless:", flipped(content, place, entries, spots))


def test_every_flipped_byte_of_the_key_is_refused(small: tuple[bytes, Place, list[Any]]) -> None:
    _, place, _ = small
    secret = place.key.read_bytes()
    for at in range(len(secret)):
        place.key.write_bytes(secret[:at] + bytes([secret[at] ^ 1]) + secret[at + 1 :])
        with pytest.raises(LedgerDamaged):
            place.read()


def test_a_chain_relinked_without_the_key_is_refused(place: Place, new_place: New) -> None:
    """Somebody who can write the database builds a whole ledger with fewer charges under a key of his own."""
    ledger = place.open()
    ledger.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    ledger.charge("rl")
    ledger.close()
    forger = new_place()
    other = forger.open()
    other.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    other.close()
    place.put_back(forger.rows())
    for attempt in (place.read, place.open):
        with pytest.raises(LedgerDamaged, match="keyed hash"):
            attempt()


def test_a_fenced_writer_appends_nothing_of_any_kind(place: Place) -> None:
    old = place.open(anchor_file=place.anchor)
    old.declare([Declaration("reviews", "rl", SMALL, 8.0, 1e-5)])
    shutil.copy(place.anchor, place.anchor.with_name("copy"))
    place.open(anchor_file=place.anchor).close()
    before = place.rows()
    for act in (
        lambda: old.charge("rl"),
        lambda: old.declare([Declaration("reviews", "second", SMALL, 8.0, 1e-5)]),
        lambda: old.set_budget("reviews", 20.0, 1e-5),
        old.verify,
    ):
        with pytest.raises(LedgerDamaged):
            act()
    assert place.rows() == before


def test_a_place_is_not_taken_for_a_ledger_before_it_has_one(place: Place) -> None:
    """A first start that died early left tables or a pending key: a reader says that there is none yet."""
    place.open().close()
    place.alter("DELETE FROM entries", "DELETE FROM state")
    place.key.unlink()
    with pytest.raises(ConfigError, match="none yet"):
        place.read()
    assert Ledger.open(place.url, place.key).epoch == 1
