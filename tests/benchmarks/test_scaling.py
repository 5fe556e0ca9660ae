"""What the scaling benchmarks compute from their measurements; no Ray."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from benchmarks import crowd, scaling

LAPS = {"reserve": 0.5, "collect": 4.0, "sync": 1.5, "learn": 3.0, "checkpoint": 1.0}


def found(ahead: int, seconds: float = 12.0) -> dict[str, Any]:
    each = [{"seconds": s, **LAPS} for s in (seconds, 100.0, 1.0)]
    return {"replicas": 4, "learners": 1, "ahead": ahead, "iterations": each}


def test_the_bound_is_the_sum_and_with_a_draw_ahead_the_longer_side() -> None:
    """A bound that were always the sum would call an overlap that does not happen perfect."""
    without, with_one = scaling.figures(found(0)), scaling.figures(found(1))
    assert (without["rollout"], without["learning"]) == (6.0, 4.0)
    assert without["bound"] == 10.0 and without["over_bound"] == pytest.approx(1.2)
    assert with_one["bound"] == 6.0 and with_one["over_bound"] == pytest.approx(2.0)
    assert without["tokens_per_second"] == pytest.approx(scaling.TOKENS / 12)
    assert without["engines"] == pytest.approx(scaling.TOKENS / scaling.RATE / 4)


def test_every_setting_has_a_name_and_is_there_with_and_without_a_draw_ahead() -> None:
    settings = scaling.settings()
    assert len(set(settings.values())) == len(settings) == 10
    assert {(s.replicas, s.learners) for s in settings.values() if s.ahead} == {
        (s.replicas, s.learners) for s in settings.values() if not s.ahead
    }
    assert settings["2 learners"] == scaling.Setting(4, 2, 0)
    assert settings["8 replicas, ahead"] == scaling.Setting(8, 1, 1)


def test_figures_of_a_crowd_are_beyond_what_is_simulated() -> None:
    draws = [{"reserve": 0.004, "redeem": 0.001, "epsilon": 0.002}, {"reserve": 0.04, "redeem": 0.01, "epsilon": 0.02}]
    line = {
        "replicas": 1_000,
        "admission": 2.0,
        "rounds": [{"generate": 5.0, "driver_cpu": 0.5, "sync": 3.5}],
        "draws": [*draws, draws[0]],
    }
    f = crowd.figures(line)
    assert f["generate_beyond"] == pytest.approx(5.0 - crowd.GENERATE_SECONDS)
    assert f["sync_beyond"] == pytest.approx(3.5 - crowd.SYNC_SECONDS)
    assert f["draw"] == pytest.approx(0.005) and f["slowest_draw"] == pytest.approx(0.05)  # reserve tells epsilon too


def test_tables_name_what_is_simulated() -> None:
    """A figure of simulated engines must not be taken for one of real ones."""
    console = Console(width=200, record=True, quiet=False)
    console.print(scaling.table({"4 replicas": found(0)}))
    line = {"replicas": 10, "admission": 0.1, "rounds": [{"generate": 4.1, "driver_cpu": 0.1, "sync": 2.1}]}
    console.print(crowd.fleet_table([line | {"draws": [{"reserve": 0.004, "redeem": 0.001, "epsilon": 0.002}]}]))
    text = console.export_text()
    assert text.count("SIMULATED") == 2 and "4 replicas" in text
