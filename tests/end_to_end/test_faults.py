"""Roles and whole runs die at bad moments: the run goes on or can be continued, and no attempt is ever forgotten."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray

from dprlhf_ray import pipeline
from dprlhf_ray.actors.rollout import RolloutActor
from dprlhf_ray.config import RunConfig
from dprlhf_ray.observability.metrics import read_metrics
from dprlhf_ray.privacy.planning import plan_stage
from dprlhf_ray.stage_run import Roles
from tests.end_to_end.runs import RECORDS, Command, World, attempts, final_version, forms, leaks, write_config

LONG = 24  # attempts of the runs that are interrupted: more than fit between the third and the signal


def certified(root: Path) -> tuple[float, int]:
    """(epsilon, attempts charged) of a run's only stage."""
    (stage,) = json.loads((root / "certificate.json").read_text())["stages"]
    return stage["epsilon"]["pld"], stage["attempts_charged"]


def planned(config: RunConfig) -> float:
    epsilon = plan_stage(config.stages[0], RECORDS).epsilon
    assert epsilon is not None
    return epsilon.pld


def released_attempts(root: Path) -> list[int]:
    return [row["attempt"] for row in read_metrics(root)]


def learner_processes() -> list[psutil.Process]:
    """Ray Train's workers of this process's run."""
    family = psutil.Process().children(recursive=True)
    return [p for p in family if p.status() != psutil.STATUS_ZOMBIE and "RayTrainWorker" in " ".join(p.cmdline())]


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_killed_and_added_replicas_and_killed_learners_change_neither_the_attempts_nor_epsilon(
    engine: str, world: World, tmp_path: Path, scratch: Path
) -> None:
    """False: a replica's death or a new one costs an attempt; a learner's costs another one than that in flight, or
    refunds it."""
    config, root = world.config(6, rollout__replicas=2, rollout__engine=engine), tmp_path / "out"
    killed: list[int] = []
    status = {}

    def fault(attempt: int, roles: Roles) -> None:
        if attempt == 1:
            actor = ray.get_actor("rollout-1", namespace=f"dprlhf-{config.name}")
            os.kill(ray.get(actor.apply.remote(RolloutActor.pid)), signal.SIGKILL)
        if attempt == 3:
            roles.fleet.resize(3)
            deadline = time.monotonic() + 120
            while roles.fleet.status()["healthy"] != 3 and time.monotonic() < deadline:
                roles.fleet.generate([(10, 20, 30)] * 6, 1)
            status.update(roles.fleet.status())
        if attempt in (4, 6):  # within the loop, and before the model is written
            for process in learner_processes():
                killed.append(process.pid)
                process.kill()

    pipeline.run(config, root, on_step=fault)
    assert (status["healthy"], status["restarts"]) == (3, 1), "the kill or the new replica changed nothing"
    assert len(killed) == 2
    assert attempts(root) == [1, 2, 3, 4, 5, 6]
    assert released_attempts(root) == [1, 2, 3, 4, 6], "attempt 5 was drawn and lost"
    assert (root / "models/rl/merged/model.safetensors").exists()
    assert final_version(root) == 5 and certified(root) == (planned(config), 6)
    assert leaks([root, scratch], [n for mark in world.marks for n in forms(mark)]) == []


@pytest.mark.slow
def test_a_killed_accountant_comes_back_with_everything_that_was_spent(world: World, tmp_path: Path) -> None:
    config, root = world.config(4), tmp_path / "out"
    charged: list[list[int]] = []

    def fault(attempt: int, roles: Roles) -> None:
        charged.append(attempts(root))
        if attempt == 2:
            ray.kill(roles.accountant, no_restart=False)

    pipeline.run(config, root, on_step=fault)
    assert all(now[: len(before)] == before for before, now in zip(charged, charged[1:], strict=False))
    assert attempts(root) == [1, 2, 3, 4] and certified(root) == (planned(config), 4)
    assert json.loads((root / "certificate.json").read_text())["ledger"]["epoch"] == 2, "it was never restarted"


# ------------------------------------------------------------------------------------------------ the whole command


@pytest.fixture(scope="module")
def settings(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("settings") / "long.yaml", world.tree(LONG))


@pytest.fixture(scope="module")
def start(settings: Path) -> Callable[..., Command]:
    def run(root: Path, *options: str) -> Command:
        return Command("run", str(settings), "--output", str(root), *options)

    return run


@pytest.fixture(scope="module")
def interrupted(start: Callable[..., Command], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(run directory, stdout, stderr) of a run that was ended by Ctrl-C after its third attempt."""
    root = tmp_path_factory.mktemp("interrupted") / "out"
    command = start(root)
    command.wait_until(lambda: len(released_attempts(root)) >= 3)
    command.note_family()
    command.signal_group(signal.SIGINT)
    code, out, err = command.end()
    assert code == 130, err
    assert command.survivors() == []
    return root, out, err


def copy(interrupted: tuple[Path, str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted[0], tmp_path / "out", ignore=shutil.ignore_patterns(".ray-train")))


def test_ctrl_c_is_one_line_and_a_second_run_does_not_start_over_it(
    interrupted: tuple[Path, str, str], start: Callable[..., Command]
) -> None:
    root, _, err = interrupted
    lines = [line for line in err.splitlines() if line.startswith("dprlhf: ")]
    assert len(lines) == 1 and "--resume" in lines[0] and "Traceback" not in err
    spent = attempts(root)
    assert 3 <= len(spent) < LONG
    code, _, err = start(root).end()
    assert code == 2 and err.startswith("dprlhf: ") and err.count("\n") == 1 and "--resume" in err
    assert attempts(root) == spent


def test_a_damaged_ledger_refuses_to_go_on(
    interrupted: tuple[Path, str, str], start: Callable[..., Command], tmp_path: Path
) -> None:
    root = copy(interrupted, tmp_path)
    with sqlite3.connect(root / "ledger.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray((root / "ledger.db").read_bytes())
    place = data.index(b'"attempt":2') + len(b'"attempt":')
    data[place] ^= 1
    (root / "ledger.db").write_bytes(data)
    code, _, err = start(root, "--resume").end()
    assert code == 4 and [line[:8] for line in err.splitlines()] == ["dprlhf: "] and "ledger" in err


def test_a_lost_ledger_refuses_to_go_on(
    interrupted: tuple[Path, str, str], start: Callable[..., Command], tmp_path: Path
) -> None:
    root = copy(interrupted, tmp_path)
    for file in root.glob("ledger*"):
        file.unlink()
    code, _, err = start(root, "--resume").end()
    assert code == 4 and [line[:8] for line in err.splitlines()] == ["dprlhf: "] and "restore" in err
    assert not list(root.glob("ledger*"))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_continues_and_makes_exactly_the_planned_attempts(
    interrupted: tuple[Path, str, str], start: Callable[..., Command], world: World, tmp_path: Path, scratch: Path
) -> None:
    root = copy(interrupted, tmp_path)
    before = attempts(root)
    command = start(root, "--resume")
    command.wait_until(lambda: len(attempts(root)) >= len(before) + 2)
    command.note_family()
    delay = random.SystemRandom().uniform(0.0, 1.5)
    time.sleep(delay)
    command.process.kill()
    _, killed_out, killed_err = command.end()
    spent = attempts(root)
    assert before == spent[: len(before)] and len(before) + 2 <= len(spent) < LONG, f"killed after {delay:.2f} s"

    again = start(root, "--resume")  # at once: what is left of the killed run must not interfere
    code, out, err = again.end()
    assert code == 0, err
    assert command.survivors() == []
    assert attempts(root) == list(range(1, LONG + 1)), f"killed after {delay:.2f} s"
    released, version = released_attempts(root), final_version(root)
    assert released == sorted(set(released)) and set(released) <= set(range(1, LONG + 1))
    # An interruption loses the attempt in flight, at most; one that was saved may lack its line in the metrics.
    assert LONG - 2 <= len(released) <= version <= LONG, f"killed after {delay:.2f} s"
    assert certified(root)[1] == LONG
    needles = [n for mark in world.marks for n in forms(mark)]
    assert not any(n in text.encode() for n in needles for text in (out, err, killed_out, killed_err))
    assert leaks([root, scratch], needles) == []
