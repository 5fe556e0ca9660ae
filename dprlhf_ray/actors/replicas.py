"""The replicas of a fleet: created, brought to the current weight version, checked, admitted, replaced and removed.

RLlib's `FaultTolerantActorManager` does the calling and notices deaths; what follows from a death is decided here. A
replica serves only after it has loaded the current version and agreed with the learner on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.rllib.utils.actor_manager import CallResult, FaultTolerantActorManager

from dprlhf_ray.actors.engines.vllm import environment
from dprlhf_ray.actors.rollout import Failure, RolloutActor
from dprlhf_ray.actors.sync_check import LogProbs, disagreement
from dprlhf_ray.config import RolloutConfig
from dprlhf_ray.errors import RolloutFailed, SyncFailed
from dprlhf_ray.transport.base import Handle

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """The current weight version and what the learner says about it."""

    handle: Handle
    reference: LogProbs


@dataclass
class Replica:
    """slot: place in the fleet. actor_id: the manager's key once it serves. bringing_up: load and log_probs calls."""

    slot: int
    name: str
    actor: Any
    actor_id: int | None = None
    bringing_up: list[ray.ObjectRef] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    log_probs: LogProbs | None = None


class Replicas:
    """Replicas by slot, `target` of them. Not thread-safe, but `target` may be set and `counts` read at any time.

    Args:
        build: arguments of `actor_class`.
        check_sequences: fixed public token sequences that a replica is checked on.
        namespace: Ray namespace of the named actors `rollout-<slot>`.
        patience_s: how long to wait for any replica before a call fails; also one replica's start-up limit.
        max_restarts: over the whole run; more than these are a defect, not bad luck.
    """

    def __init__(
        self,
        build: tuple[Any, ...],
        rollout: RolloutConfig,
        check_sequences: Sequence[Sequence[int]],
        namespace: str | None,
        patience_s: float,
        max_restarts: int,
        actor_class: type[RolloutActor],
    ) -> None:
        self.target = 0
        self.restarts = 0
        self.patience_s = patience_s
        self._build = build
        self._rollout = rollout
        self._check_sequences = check_sequences
        self._namespace = namespace
        self._max_restarts = max_restarts
        self._actor_class = actor_class
        self._manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=1)
        self._by_slot: dict[int, Replica] = {}
        self._incarnations: dict[int, int] = {}
        self._published: Published | None = None
        self._last_failure = "none failed: still starting"

    def serving(self) -> list[Replica]:
        """Those that have the current version and passed the check."""
        return [r for r in self._by_slot.values() if r.actor_id is not None]

    def counts(self) -> tuple[int, int]:
        """(serving, starting)."""
        replicas = list(self._by_slot.values())
        serving = sum(r.actor_id is not None for r in replicas)
        return serving, len(replicas) - serving

    # -------------------------------------------------------------------------------------------------- calling them

    def send(self, replica: Replica, method: str, **arguments: Any) -> None:
        """Start one call on a serving replica; `answers` has its result."""
        ids = [cast(int, replica.actor_id)]
        self._manager.foreach_actor_async(method, kwargs=arguments, remote_actor_ids=ids)

    def answers(self) -> dict[int, Any]:
        """Answers that came within a short wait, by slot; a `Failure` where the replica's process died.

        The manager itself waits for all of them, or not at all.
        """
        ready: list[Any] = list(self._manager.fetch_ready_async_reqs(timeout_seconds=0.0))
        if not ready:
            time.sleep(0.01)
        slots = {r.actor_id: r.slot for r in self.serving()}
        return {
            slots[r.actor_id]: r.get() if r.ok else Failure(f"{type(r.get()).__name__} of the replica's process")
            for r in ready
            if r.actor_id in slots
        }

    # --------------------------------------------------------------------------------------------------- their weights

    def bring_to(self, published: Published) -> None:
        """Bring every replica to a version: those that serve now, those that start as soon as they can.

        Raises:
            SyncFailed: a replica disagrees with the learner.
            RolloutFailed: no replica came up in time, or too many restarts.
        """
        old, self._published = self._published, published
        self.reconcile()
        serving = self.serving()
        for replica in self._by_slot.values():
            if replica.actor_id is None:
                self._bring_up(replica)
        if serving:
            self._sync(serving, old)
        self.wait_for_one()

    def _sync(self, serving: list[Replica], old: Published | None) -> None:
        assert self._published is not None
        ids, limit = [cast(int, r.actor_id) for r in serving], self.patience_s
        load, check = {"handle": self._published.handle}, {"sequences": self._check_sequences}
        self._manager.foreach_actor("load", kwargs=load, remote_actor_ids=ids, timeout_seconds=limit)
        results = self._manager.foreach_actor("log_probs", kwargs=check, remote_actor_ids=ids, timeout_seconds=limit)
        answers = {r.actor_id: r.get() for r in cast("list[CallResult]", list(results)) if r.ok}
        for actor_id, replica in zip(ids, serving, strict=True):
            answer = answers.get(actor_id, Failure("no answer to a sync"))
            if isinstance(answer, Failure):
                self.replace(replica, str(answer))
            else:
                self._check(replica, answer, old)

    def _check(self, replica: Replica, log_probs: LogProbs, old: Published | None = None) -> None:
        assert self._published is not None
        problem = disagreement(
            log_probs,
            self._published.reference,
            self._rollout.sync_tolerance,
            before=(replica.log_probs, old.reference) if replica.log_probs and old else None,
        )
        if problem:
            raise SyncFailed(f"{replica.name} at weight version {self._published.handle.version}: {problem}")
        replica.log_probs = log_probs

    # ------------------------------------------------------------------------------------------------- their life

    def reconcile(self, busy: Container[int] = ()) -> None:
        """Start missing replicas and end surplus ones that are not at work. busy: slots at work."""
        for slot in range(self.target):
            if slot not in self._by_slot:
                self._create(slot)
        for slot in [s for s in self._by_slot if s >= self.target and s not in busy]:
            _log.info("%s removed: the fleet has %d replicas now", self._by_slot[slot].name, self.target)
            self._remove(self._by_slot[slot])

    def admit(self) -> None:
        """Let replicas serve that have loaded the current version and passed the check."""
        for replica in [r for r in self._by_slot.values() if r.actor_id is None and r.bringing_up]:
            ready, pending = ray.wait(replica.bringing_up, num_returns=2, timeout=0)
            if pending:
                if time.monotonic() - replica.since > self.patience_s:
                    self.replace(replica, f"not ready within {self.patience_s:.0f} s")
                continue
            try:
                answers = ray.get(replica.bringing_up)
            except ray.exceptions.RayError as error:
                self.replace(replica, f"{type(error).__name__} while it started")
                continue
            failure = next((a for a in answers if isinstance(a, Failure)), None)
            if failure is not None:
                self.replace(replica, str(failure))
                continue
            self._check(replica, answers[1])
            self._manager.add_actors([replica.actor])
            replica.actor_id, replica.bringing_up = self._manager.actor_ids()[-1], []
            _log.info("%s serves", replica.name)

    def replace(self, replica: Replica, reason: str) -> None:
        """End a replica that failed and start another in its place; RolloutFailed after too many."""
        self._remove(replica)
        self.restarts += 1
        self._last_failure = f"{replica.name}: {reason}"
        if self.restarts > self._max_restarts:
            raise RolloutFailed(f"{replica.name} failed ({reason}); {self._max_restarts} restarts were used up")
        _log.warning("%s failed: %s. A new one starts and is synced before it serves.", replica.name, reason)
        if replica.slot < self.target:
            self._create(replica.slot)

    def wait_for_one(self) -> None:
        """Until a replica serves; RolloutFailed when none does in time."""
        deadline = time.monotonic() + self.patience_s
        while True:
            self.reconcile()
            self.admit()
            if self.serving():
                return
            if time.monotonic() > deadline:
                raise RolloutFailed(
                    f"no rollout replica is up after {self.patience_s:.0f} s (last: {self._last_failure})"
                )
            time.sleep(0.05)

    def end(self) -> None:
        """End every replica."""
        self.target = 0
        for replica in list(self._by_slot.values()):
            self._remove(replica)

    def _create(self, slot: int) -> None:
        # A dead actor's name is not free at once.
        incarnation = self._incarnations[slot] = self._incarnations.get(slot, 0) + 1
        name = f"rollout-{slot}" if incarnation == 1 else f"rollout-{slot}.{incarnation}"
        options: dict[str, Any] = {
            "name": name,
            "namespace": self._namespace,
            "num_cpus": 0,
            "num_gpus": self._rollout.gpus_per_replica,
            "label_selector": self._rollout.node_labels,
            "max_restarts": 0,
            "runtime_env": {"env_vars": environment(self._rollout)},
        }
        remote: Callable[..., Any] = ray.remote(self._actor_class).options(**options).remote
        self._by_slot[slot] = Replica(slot, name, remote(*self._build))
        if self._published is not None:
            self._bring_up(self._by_slot[slot])

    def _bring_up(self, replica: Replica) -> None:
        """Queue loading and checking of the current version; `admit` looks at the answers."""
        assert self._published is not None
        replica.bringing_up = [
            replica.actor.apply.remote(self._actor_class.load, self._published.handle),
            replica.actor.apply.remote(self._actor_class.log_probs, self._check_sequences),
        ]

    def _remove(self, replica: Replica) -> None:
        if replica.actor_id is not None:
            self._manager.remove_actor(replica.actor_id)
        self._by_slot.pop(replica.slot, None)
        ray.kill(replica.actor)
