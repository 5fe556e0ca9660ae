"""Gauges in the Ray dashboard (Prometheus, prefix ray_): released values and operational ones, never private ones."""

from __future__ import annotations

from collections.abc import Sequence

from ray.util.metrics import Gauge

from dprlhf_ray.privacy.release import Operational, Released, only


class Gauges:
    """`dprlhf_epsilon_spent`, `dprlhf_step`, `dprlhf_released` (by metric), `dprlhf_rollout` and `dprlhf_learner` (by
    figure), `dprlhf_phase_seconds` (by phase).

    A stage without a guarantee, or on public data, has no epsilon: its gauge is never set.

    Args:
        run: its name. partition: data set, and partition where there is one, that the stage reads.
    """

    def __init__(self, run: str, partition: str) -> None:
        self._tags, self._partition = {"run": run}, partition
        self._epsilon = Gauge(
            "dprlhf_epsilon_spent",
            "epsilon of the draws so far (none: public data, or clip only)",
            tag_keys=("run", "stage", "partition"),
        )
        self._step = Gauge("dprlhf_step", "attempts charged", tag_keys=("run", "stage"))
        self._released = Gauge(
            "dprlhf_released", "released metrics: reward, nll, accuracy ...", tag_keys=("run", "stage", "metric")
        )
        self._rollout = Gauge(
            "dprlhf_rollout", "fleet: replicas, tokens/s, staleness, sync seconds ...", tag_keys=("run", "figure")
        )
        self._learner = Gauge("dprlhf_learner", "learners: incarnations", tag_keys=("run", "figure"))
        self._phase = Gauge("dprlhf_phase_seconds", "parts of the last step", tag_keys=("run", "stage", "phase"))

    def step(self, stage: str, attempt: int, released: Sequence[Released]) -> None:
        only(Released, released)
        tags = {**self._tags, "stage": stage}
        self._step.set(attempt, tags)
        for r in released:
            if r.name == "epsilon_spent":
                self._epsilon.set(r.value, {**tags, "partition": self._partition})
            else:
                self._released.set(r.value, {**tags, "metric": r.name})

    def operations(
        self, stage: str, fleet: Sequence[Operational], learners: Sequence[Operational], phases: Sequence[Operational]
    ) -> None:
        only(Operational, [*fleet, *learners, *phases])
        for gauge, figures in ((self._rollout, fleet), (self._learner, learners)):
            for f in figures:
                gauge.set(f.value, {**self._tags, "figure": f.name})
        for p in phases:
            self._phase.set(p.value, {**self._tags, "stage": stage, "phase": p.name})
