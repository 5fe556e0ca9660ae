"""The replicas of a fleet: created, brought to the current weight version, checked, admitted, replaced and removed.

RLlib's `FaultTolerantActorManager` does the calling and notices deaths; what follows from a death is decided here. A
replica serves only after it has loaded the current version and agreed with the learner on it. One that waits for a GPU,
or for its first weights, has not failed: its time starts when it has both.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.rllib.utils.actor_manager import CallResult, FaultTolerantActorManager

from dprlhf_ray.actors.engines.vllm import environment
from dprlhf_ray.actors.placement import Place
from dprlhf_ray.actors.rollout import Failure, RolloutActor
from dprlhf_ray.actors.sync_check import LogProbs, disagreement
from dprlhf_ray.config import RolloutConfig
from dprlhf_ray.errors import RolloutFailed, SyncFailed, WeightsLost
from dprlhf_ray.transport import Handle

_log = logging.getLogger(__name__)
_REMIND = 60.0  # seconds between lines about a GPU that is waited for


@dataclass(frozen=True)
class Published:
    """The current weight version and what the learner says about it."""

    handle: Handle
    reference: LogProbs


@dataclass
class Replica:
    """slot: number in the fleet. actor: None while its place is waited for. actor_id: the manager's key once it serves.
    bringing_up: load and log_probs calls. since: when it had its place and the first weights to load. checked: its own
    and the learner's log-probabilities when it was checked last."""

    slot: int
    name: str
    place: Place
    actor: Any = None
    actor_id: int | None = None
    bringing_up: list[ray.ObjectRef] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    checked: tuple[LogProbs, LogProbs] | None = None


class Replicas:
    """Replicas by slot, `target` of them. Not thread-safe, but `target` may be set and `counts` read at any time.

    Args:
        build: arguments of `actor_class`.
        check_sequences: fixed public token sequences that a replica is checked on.
        namespace: Ray namespace of the named actors `rollout-<slot>`.
        patience_s: how long to wait for any replica before a call fails; also one replica's start-up limit.
        max_restarts: over the whole run; more than these are a defect, not bad luck.
        ended: set when nothing is waited for any more.
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
        ended: threading.Event,
    ) -> None:
        self._ended = ended
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
        self._rounds = 0
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

    def round(self) -> str:
        """A tag for the calls that belong together; what comes late for an earlier one is thrown away."""
        self._manager.fetch_ready_async_reqs(timeout_seconds=0.0)
        self._rounds += 1
        return f"round-{self._rounds}"

    def send(self, replica: Replica, tag: str, method: str, **arguments: Any) -> bool:
        """Start one call on a serving replica; `answers` has its result. False: it is dead."""
        ids = [cast(int, replica.actor_id)]
        return bool(self._manager.foreach_actor_async(method, tag, kwargs=arguments, remote_actor_ids=ids))

    def answers(self, tag: str) -> dict[int, Any]:
        """Answers to this round's calls that came within a short wait, by slot; a `Failure` where the replica's process
        died.

        The manager itself waits for all of them, or not at all.
        """
        ready: list[Any] = list(self._manager.fetch_ready_async_reqs(tags=tag, timeout_seconds=0.0))
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
            WeightsLost: nobody could have it.
        """
        self._published = published
        self.reconcile()
        serving = self.serving()
        for replica in self._by_slot.values():
            if replica.actor_id is None:
                self._bring_up(replica)
        if serving:
            self._sync(serving)
        self.wait_for_one()

    def _sync(self, serving: list[Replica]) -> None:
        assert self._published is not None
        answers = self._ask(serving, "load", handle=self._published.handle)
        failed = [(r, a) for r, a in zip(serving, answers, strict=True) if isinstance(a, Failure)]
        ready = [r for r, a in zip(serving, answers, strict=True) if not isinstance(a, Failure)]
        for replica, failure in failed:
            if failure.weights_lost and not ready:
                self._lost(replica, failure)
        for replica, failure in failed:
            self.replace(replica, str(failure))
        for replica, answer in zip(ready, self._ask(ready, "log_probs", sequences=self._check_sequences), strict=True):
            if isinstance(answer, Failure):
                self.replace(replica, str(answer))
            else:
                self._check(replica, answer)

    def _ask(self, replicas: list[Replica], method: str, **arguments: Any) -> list[Any]:
        """Answers of serving replicas, in order; a `Failure` for each that gave none in time."""
        if not replicas:
            return []
        ids = [cast(int, r.actor_id) for r in replicas]
        results = self._manager.foreach_actor(
            method, kwargs=arguments, remote_actor_ids=ids, timeout_seconds=self.patience_s
        )
        answers = {r.actor_id: r.get() for r in cast("list[CallResult]", list(results)) if r.ok}
        return [answers.get(i, Failure("no answer to a sync")) for i in ids]

    def _check(self, replica: Replica, log_probs: LogProbs) -> None:
        assert self._published is not None
        reference = self._published.reference
        problem = disagreement(log_probs, reference, self._rollout.sync_tolerance, before=replica.checked)
        if problem:
            raise SyncFailed(f"{replica.name} at weight version {self._published.handle.version}: {problem}")
        replica.checked = (log_probs, reference)

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
        """Start replicas whose place is there; let those serve that have loaded the current version and passed the
        check."""
        for replica in [r for r in self._by_slot.values() if r.actor is None and r.place.granted()]:
            self._start(replica)
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
            if failure is not None and failure.weights_lost:
                replica.bringing_up = []  # it has not failed: the next version will do
                if not self.serving():
                    self._lost(replica, failure)
                continue
            if failure is not None:
                self.replace(replica, str(failure))
                continue
            self._check(replica, answers[1])
            self._manager.add_actors([replica.actor])
            replica.actor_id, replica.bringing_up = self._manager.actor_ids()[-1], []
            _log.info("%s serves", replica.name)

    def give_way(self) -> None:
        """Replicas that hold or wait for a GPU without serving yet give it up: learners cannot do without. The next
        `reconcile` asks for new places."""
        for replica in [r for r in self._by_slot.values() if r.actor_id is None and self._rollout.gpus_per_replica]:
            self._remove(replica)

    def _lost(self, replica: Replica, failure: Failure) -> None:
        """Raises WeightsLost, or RolloutFailed where that was too often."""
        self._count(replica, str(failure))
        raise WeightsLost(f"no replica could have the new weights ({failure})")

    def replace(self, replica: Replica, reason: str) -> None:
        """End a replica that failed and start another in its place; RolloutFailed after too many."""
        self._remove(replica)
        self._count(replica, reason)
        _log.warning("%s failed: %s. A new one starts and is synced before it serves.", replica.name, reason)
        if replica.slot < self.target:
            self._create(replica.slot)

    def _count(self, replica: Replica, reason: str) -> None:
        self.restarts += 1
        self._last_failure = f"{replica.name}: {reason}"
        if self.restarts > self._max_restarts:
            raise RolloutFailed(f"{replica.name} failed ({reason}); {self._max_restarts} restarts were used up")

    def wait_for_one(self) -> None:
        """Until a replica serves; RolloutFailed when none does in time. The time in which all wait for their places
        does not count: an autoscaler may need many minutes for a node."""
        deadline, reminder = time.monotonic() + self.patience_s, time.monotonic() + _REMIND
        while True:
            self.reconcile()
            self.admit()
            if self.serving():
                return
            if self._ended.is_set():
                raise RolloutFailed("the fleet was ended under the call")
            if all(r.actor is None for r in self._by_slot.values()):
                deadline = time.monotonic() + self.patience_s
                if time.monotonic() > reminder:
                    reminder = time.monotonic() + _REMIND
                    _log.warning("no replica has its %g GPUs yet: waiting for them", self._rollout.gpus_per_replica)
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
        replica = self._by_slot[slot] = Replica(slot, name, Place(self._rollout))
        if replica.place.granted():
            self._start(replica)

    def _start(self, replica: Replica) -> None:
        options: dict[str, Any] = {
            "name": replica.name,
            "namespace": self._namespace,
            "max_restarts": 0,
            "runtime_env": {"env_vars": environment(self._rollout)},
        }
        remote: Callable[..., Any] = ray.remote(self._actor_class).options(**options, **replica.place.options()).remote
        replica.actor = remote(*self._build)
        self._bring_up(replica)

    def _bring_up(self, replica: Replica) -> None:
        """Queue loading and checking of the current version, if there is one; `admit` looks at the answers."""
        if replica.actor is None or self._published is None:
            return
        if not replica.bringing_up:
            replica.since = time.monotonic()
        for call in replica.bringing_up:  # of an older version, whose weights it would keep alive
            ray.cancel(call)
        replica.bringing_up = [
            replica.actor.apply.remote(self._actor_class.load, self._published.handle),
            replica.actor.apply.remote(self._actor_class.log_probs, self._check_sequences),
        ]

    def _remove(self, replica: Replica) -> None:
        if replica.actor_id is not None:
            self._manager.remove_actor(replica.actor_id)
        self._by_slot.pop(replica.slot, None)
        if replica.actor is not None:
            ray.kill(replica.actor)
        replica.place.release()
