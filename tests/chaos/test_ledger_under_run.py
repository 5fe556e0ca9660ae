"""The ledger's store goes away under a run that is paying: the run ends in one line, and nothing is under-counted."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray.errors import LedgerDamaged
from dprlhf_ray.stage_run import Roles
from tests.chaos import oracle
from tests.chaos.plan import Chaos
from tests.chaos.runs import check, configured, private, run
from tests.end_to_end.runs import World, leaks
from tests.privacy.ledger_place import postgresql_server, schema

STEPS = 3


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with postgresql_server() as found:
        yield found


def test_postgresql_restarted_under_a_run(
    chaos: Chaos, one_ray: None, world: World, tmp_path: Path, server: Any
) -> None:
    """False: the run draws though its ledger did not answer, or the charges before the restart are forgotten."""
    case, root, url = chaos.begin([]), tmp_path / "out", schema(server, "under_run")
    config = configured(world, "served", STEPS, ledger=url, ledger_key=str(tmp_path / "ledger.key"))

    def restart(attempt: int, roles: Roles) -> None:
        postmaster = server.get_postmaster_info().process
        postmaster.send_signal(signal.SIGQUIT)
        postmaster.wait(30)
        server.ensure_postgres_running()

    ended = run(config, root, on_step=restart)
    error = getattr(ended, "cause", ended)
    assert isinstance(ended, LedgerDamaged) and error.exit_code == 4
    assert "the database failed" in str(error) and "\n" not in str(error)
    assert oracle.charges(url, tmp_path / "ledger.key") == [1]
    assert run(config, root, resume=True) is None
    seen = check(case, config, root, world, ledger=(url, str(tmp_path / "ledger.key")))
    assert seen.released == list(range(1, STEPS + 1))


def test_postgresql_gone_under_a_run_for_good(
    chaos: Chaos, one_ray: None, world: World, tmp_path: Path, server: Any
) -> None:
    """False: the run draws without a ledger, hangs, or ends with a page of a driver's text."""
    case, root, url = chaos.begin([]), tmp_path / "out", schema(server, "gone")
    config = configured(world, "gone", STEPS, ledger=url, ledger_key=str(tmp_path / "ledger.key"))

    def stop(attempt: int, roles: Roles) -> None:
        postmaster = server.get_postmaster_info().process
        postmaster.send_signal(signal.SIGINT)
        postmaster.wait(30)

    for resume in (False, True):
        ended = run(config, root, resume=resume, on_step=stop)
        error = getattr(ended, "cause", ended)
        assert isinstance(ended, LedgerDamaged) and error.exit_code == 4 and "\n" not in str(error), ended
    server.ensure_postgres_running()
    assert len(case.passages("driver.draw", "before")) == 1
    assert oracle.charges(url, tmp_path / "ledger.key") == [1]


def test_ledger_removed_under_a_run(chaos: Chaos, one_ray: None, world: World, tmp_path: Path) -> None:
    """False: a run whose ledger was deleted under it certifies attempts that no ledger knows of."""
    case, root = chaos.begin([]), tmp_path / "out"
    config = configured(world, "removed", STEPS)

    def remove(attempt: int, roles: Roles) -> None:
        if attempt == 1:
            for file in root.glob("ledger.db*"):
                os.unlink(file)

    ended = run(config, root, on_step=remove)
    assert isinstance(ended, LedgerDamaged) and getattr(ended, "cause", ended).exit_code == 4, ended
    assert len(case.passages("driver.draw", "before")) == 1
    assert isinstance(run(config, root, resume=True), LedgerDamaged)


def test_nothing_private_is_in_ray_s_files(one_ray: None, scratch: Path, world: World) -> None:
    """False: a log, a socket's folder or the object store's files quote a record."""
    assert leaks([scratch], private(world)) == []
