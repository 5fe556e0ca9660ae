"""Gauges stay for as long as their stage does: Ray forgets one that is not set again."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dprlhf_ray.observability import gauges
from dprlhf_ray.privacy.release import Released


def test_a_gauge_is_set_again_until_its_stage_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: epsilon vanishes from the dashboard during a long step, or stays after the end."""
    seen: list[tuple[str, float, dict[str, str]]] = []

    class Gauge:
        def __init__(self, name: str, *_: Any, **__: Any) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            seen.append((self.name, value, tags))

    monkeypatch.setattr(gauges, "Gauge", Gauge)
    monkeypatch.setattr(gauges, "REPEAT", 0.01)
    shown = gauges.Gauges("run", "reviews")
    shown.step("rl", 1, [Released("epsilon_spent", 2.0, "accounting")])
    shown.step("rl", 2, [Released("epsilon_spent", 3.0, "accounting")])
    first = ("dprlhf_epsilon_spent", 3.0, {"run": "run", "stage": "rl", "partition": "reviews"})
    deadline = time.monotonic() + 30
    while seen.count(first) < 3:
        assert time.monotonic() < deadline, seen
        time.sleep(0.01)
    shown.close()
    count = len(seen)
    time.sleep(0.1)
    assert len(seen) == count and seen[-1][1] in (2, 3.0)
