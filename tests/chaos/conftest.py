"""Runs under fault: every process that they start passes the points of `points.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dprlhf_ray.actors import answers, cluster
from tests.chaos import points
from tests.chaos.plan import Chaos
from tests.chaos.runs import configured
from tests.end_to_end.conftest import scratch, world
from tests.end_to_end.runs import World

__all__ = ["chaos", "one_ray", "scratch", "world"]

# Read by Ray Train's controller: how soon a rank that hangs is noticed; and one actor less to start.
TRAIN = {
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="module")
def chaos(scratch: Path) -> Iterator[Chaos]:
    """Armed: in this process, and in all that are started from now on."""
    with pytest.MonkeyPatch.context() as patch:
        folder = scratch / "chaos"
        folder.mkdir()
        patch.setenv(points.FOLDER, str(folder))
        for name, value in TRAIN.items():
            patch.setenv(name, value)
        here = str(Path(__file__).parent / "inject")
        patch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ["PYTHONPATH"]]))
        for patience in ("QUICK", "LONG"):  # the driver's: how soon a small role that hangs is noticed
            patch.setattr(answers, patience, 60.0)
        points.arm()
        try:
            yield Chaos(folder)
        finally:
            points.disarm()


@pytest.fixture(scope="module")
def one_ray(chaos: Chaos, world: World) -> Iterator[None]:
    """One Ray for all runs of a module, started as a run starts it."""
    with cluster.session(configured(world, "shared", 1)):
        yield
