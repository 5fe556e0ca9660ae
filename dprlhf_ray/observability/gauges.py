"""Gauges in the Ray dashboard (Prometheus, prefix ray_): released values and operational ones, never private ones.

Ray forgets a gauge that is not set again for a while, and a step may take minutes: a thread repeats all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ray.util.metrics import Gauge

from dprlhf_ray.privacy.release import Operational, Released, only

REPEAT = 5.0  # seconds


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
        self._values: dict[tuple[Gauge, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True, name="gauges")
        self._thread.start()

    def step(self, stage: str, attempt: int, released: Sequence[Released]) -> None:
        only(Released, released)
        tags = {**self._tags, "stage": stage}
        self._set(self._step, attempt, tags)
        for r in released:
            if r.name == "epsilon_spent":
                self._set(self._epsilon, r.value, {**tags, "partition": self._partition})
            else:
                self._set(self._released, r.value, {**tags, "metric": r.name})

    def operations(
        self, stage: str, fleet: Sequence[Operational], learners: Sequence[Operational], phases: Sequence[Operational]
    ) -> None:
        only(Operational, [*fleet, *learners, *phases])
        for gauge, figures in ((self._rollout, fleet), (self._learner, learners)):
            for f in figures:
                self._set(gauge, f.value, {**self._tags, "figure": f.name})
        for p in phases:
            self._set(self._phase, p.value, {**self._tags, "stage": stage, "phase": p.name})

    def close(self) -> None:
        """Repeat them no more: a stage that is over is not watched."""
        self._closed.set()
        self._thread.join()

    def _set(self, gauge: Gauge, value: float, tags: dict[str, str]) -> None:
        with self._lock:
            self._values[gauge, tuple(tags.items())] = value
        gauge.set(value, tags)

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT):
            with self._lock:
                values = dict(self._values)
            for (gauge, tags), value in values.items():
                gauge.set(value, dict(tags))
