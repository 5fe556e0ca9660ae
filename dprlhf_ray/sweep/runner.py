"""The runs of a sweep, each a `dprlhf run` process of its own: with its own Ray on this machine, or a driver each on a
cluster. A run that fails, or takes its processes with it, leaves the others alone, and what a run keeps off the disk
stays off it.

Processes print to the operator's terminal; nothing of that is written to a file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from dprlhf_ray import config_file
from dprlhf_ray.config import RunConfig
from dprlhf_ray.data.preflight import preflight
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.run_dir import check_run_dir, write_atomically
from dprlhf_ray.sweep.cells import Cell
from dprlhf_ray.sweep.table import finished

PATIENCE = 90.0  # seconds that an interrupted run has to end its Ray


@dataclass(frozen=True)
class Outcome:
    """How a run ended just now. minutes: operational."""

    cell: Cell
    exit_code: int
    minutes: float


def prepare(folder: Path, cells: Sequence[Cell], resume: bool) -> list[Cell]:
    """Check every run before the first one starts, and write its config; returns those that are not done yet.

    Raises:
        ConfigError: a sweep is there already and resume was not asked for; a run's config differs from the one that it
            started with; as `preflight`.
    """
    if (folder / "cells").exists() and not resume:
        raise ConfigError(
            f"--output {folder}: a sweep is there already; continue it with --resume or name another folder"
        )
    checked: set[str] = set()
    for cell in cells:
        root = folder / "cells" / cell.folder
        check_run_dir(root, cell.config, resume)
        if cell.name not in checked:
            preflight(cell.config, root)
            checked.add(cell.name)
    try:
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "cells").mkdir(exist_ok=True)
        for cell in cells:
            write_atomically(_config(folder, cell), config_file.dump(cell.config))
    except OSError as e:
        raise ConfigError(f"--output {folder}: cannot write there ({e.strerror})") from None
    return [c for c in cells if not finished(folder / "cells" / c.folder)]


def side_by_side(config: RunConfig) -> int:
    """How many runs fit at once: one on this machine; on a cluster by its GPUs, or one per node without."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    if not address:
        return 1
    from dprlhf_ray.actors.cluster import ray  # sets Ray's environment before ray is imported

    ray.init(address=address, log_to_driver=False)
    try:
        gpus = ray.cluster_resources().get("GPU", 0.0)
        nodes = sum(bool(n["Alive"]) for n in ray.nodes())
    finally:
        ray.shutdown()
    learners, rollout = config.learner.num_workers * config.learner.use_gpu, config.rollout
    need = learners + rollout.replicas * rollout.gpus_per_replica + rollout.scorer_gpus
    return max(1, int(gpus // need) if need else nodes)


def run_cells(
    folder: Path, cells: Sequence[Cell], width: int, say: Callable[[str], None], ended: Callable[[Outcome], None]
) -> None:
    """Run these cells, at most `width` at a time; `ended` is called, in this thread, after each.

    Raises:
        KeyboardInterrupt: from outside; all runs were told to stop, and have.
    """
    processes: list[subprocess.Popen[str]] = []
    stopping, lock = threading.Event(), threading.Lock()

    def one(cell: Cell) -> Outcome | None:
        with lock:
            if stopping.is_set():
                return None
            process = _start(folder, cell)
            processes.append(process)
        began = time.monotonic()
        assert process.stdout is not None
        for line in process.stdout:
            say(f"{cell.folder}  {line.rstrip()}")
        return Outcome(cell, process.wait(), (time.monotonic() - began) / 60)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # how schedulers stop a job: the same as Ctrl-C
    with ThreadPoolExecutor(width) as pool:
        try:
            for future in as_completed([pool.submit(one, cell) for cell in cells]):
                if (outcome := future.result()) is not None:
                    ended(outcome)
        finally:
            with lock:
                stopping.set()
            _stop(processes)


def _start(folder: Path, cell: Cell) -> subprocess.Popen[str]:
    """In a session of its own, so that Ctrl-C reaches it once, through us."""
    root = folder / "cells" / cell.folder
    command = [sys.executable, "-m", "dprlhf_ray.cli", "run", str(_config(folder, cell)), "--output", str(root)]
    command += ["--resume"] if (root / "config.yaml").exists() else []
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip


def _stop(processes: Iterable[subprocess.Popen[str]]) -> None:
    """End what still runs, and what these started where they do not end in time."""
    alive = [p for p in processes if p.poll() is None]
    for p in alive:
        p.terminate()
    deadline = time.monotonic() + PATIENCE
    for p in alive:
        try:
            p.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)


def _config(folder: Path, cell: Cell) -> Path:
    return folder / "configs" / f"{cell.folder}.yaml"
