"""Starting Ray on a busy machine."""

from __future__ import annotations

from typing import Any

import pytest

from dprlhf_ray.actors import cluster
from dprlhf_ray.errors import DprlhfError


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_start_that_times_out_is_repeated_and_then_one_line(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """False: a machine that is busy for half a minute ends a run with a traceback."""
    tried: list[dict[str, Any]] = []

    def init(**settings: Any) -> None:
        tried.append(settings)
        if len(tried) <= failures:
            raise Exception("The current node timed out during startup.\nmore")

    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    if failures < cluster.START_TRIES:
        cluster._start_local(num_cpus=2)
        assert tried == [{"address": "local", "num_cpus": 2}] * (failures + 1)
    else:
        with pytest.raises(DprlhfError, match=r"overloaded or full\? The current node timed out during startup\.$"):
            cluster._start_local(num_cpus=2)
        assert len(tried) == cluster.START_TRIES
