"""Gauges in the Ray dashboard (Prometheus, prefix ray_): released values and operational ones, never private ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.util.metrics import Gauge

from dprlhf_ray.privacy.release import Released


class Gauges:
    """`dprlhf_epsilon_spent`, `dprlhf_step`, `dprlhf_released` (by metric), `dprlhf_rollout` (fleet figures)."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._epsilon = Gauge("dprlhf_epsilon_spent", "epsilon of the draws so far", tag_keys=("run", "stage"))
        self._step = Gauge("dprlhf_step", "attempts charged", tag_keys=("run", "stage"))
        self._released = Gauge("dprlhf_released", "released metrics", tag_keys=("run", "stage", "metric"))
        self._rollout = Gauge("dprlhf_rollout", "fleet: replicas, tokens/s, sync seconds", tag_keys=("run", "figure"))

    def step(self, stage: str, attempt: int, epsilon: float | None, released: Sequence[Released]) -> None:
        tags = {**self._tags, "stage": stage}
        self._step.set(attempt, tags)
        if epsilon is not None:
            self._epsilon.set(epsilon, tags)
        for r in released:
            self._released.set(r.value, {**tags, "metric": r.name})

    def fleet(self, status: Mapping[str, float | int | None]) -> None:
        for figure, value in status.items():
            if value is not None:
                self._rollout.set(float(value), {**self._tags, "figure": figure})
