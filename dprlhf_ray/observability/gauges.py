"""Gauges in the Ray dashboard (Prometheus, prefix ray_): released values and operational ones, never private ones."""

from __future__ import annotations

from collections.abc import Sequence

from ray.util.metrics import Gauge

from dprlhf_ray.privacy.release import Operational, Released, only


class Gauges:
    """`dprlhf_epsilon_spent`, `dprlhf_step`, `dprlhf_released` (by metric), `dprlhf_rollout` (fleet figures).

    A stage without a guarantee, or on public data, has no epsilon: its gauge is never set.
    """

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._epsilon = Gauge(
            "dprlhf_epsilon_spent",
            "epsilon of the draws so far (none: public data, or clip only)",
            tag_keys=("run", "stage"),
        )
        self._step = Gauge("dprlhf_step", "attempts charged", tag_keys=("run", "stage"))
        self._released = Gauge(
            "dprlhf_released", "released metrics: reward, nll, accuracy ...", tag_keys=("run", "stage", "metric")
        )
        self._rollout = Gauge("dprlhf_rollout", "fleet: replicas, tokens/s, sync seconds", tag_keys=("run", "figure"))

    def step(self, stage: str, attempt: int, released: Sequence[Released]) -> None:
        only(Released, released)
        tags = {**self._tags, "stage": stage}
        self._step.set(attempt, tags)
        for r in released:
            gauge, own = (self._epsilon, {}) if r.name == "epsilon_spent" else (self._released, {"metric": r.name})
            gauge.set(r.value, {**tags, **own})

    def fleet(self, figures: Sequence[Operational]) -> None:
        only(Operational, figures)
        for f in figures:
            self._rollout.set(f.value, {**self._tags, "figure": f.name})
