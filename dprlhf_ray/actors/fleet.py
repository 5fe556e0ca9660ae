"""The rollout fleet: replicas of the policy that may die, come back, be added and be removed while a run goes on.

RLlib's `FaultTolerantActorManager` does the calling and notices deaths; the fleet decides what follows from them. Every
completion comes from the weight version that the learner published last, or the call does not return.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import ray
import torch
from ray.rllib.utils.actor_manager import CallResult, FaultTolerantActorManager

from dprlhf_ray.actors.engines.vllm import environment
from dprlhf_ray.actors.rollout import Failure, RolloutActor
from dprlhf_ray.actors.sync_check import LogProbs, disagreement
from dprlhf_ray.config import GenerationConfig, RolloutConfig
from dprlhf_ray.errors import RolloutFailed, SyncFailed
from dprlhf_ray.records import Completion
from dprlhf_ray.transport import build_transport
from dprlhf_ray.transport.base import Handle

_log = logging.getLogger(__name__)


@dataclass
class _Replica:
    """slot: place in the fleet. actor_id: the manager's key once it serves. bringing_up: load and log_probs calls."""

    slot: int
    name: str
    actor: Any
    actor_id: int | None = None
    bringing_up: list[ray.ObjectRef] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)
    log_probs: LogProbs | None = None


@dataclass(frozen=True)
class _Published:
    """The current weight version and what the learner says about it."""

    handle: Handle
    reference: LogProbs


class Fleet:
    """Supervised rollout replicas. One thread drives it; `resize` and `status` may come from others.

    Formal guarantee: rule 3 of one DP step: a collateral failure is retried with the same weight version until it
    succeeds, or the call fails as a whole; no record is dropped, and which replica serves a record changes nothing in
    the policy it is drawn from.
    """

    def __init__(
        self,
        model_path: str,
        rollout: RolloutConfig,
        generation: GenerationConfig,
        dtype: str,
        check_sequences: Sequence[Sequence[int]],
        *,
        namespace: str | None = None,
        chunk_timeout_s: float = 600.0,
        recovery_timeout_s: float = 300.0,
        max_restarts: int = 20,
        actor_class: type[RolloutActor] = RolloutActor,
    ) -> None:
        """Nothing starts before `start`.

        Args:
            check_sequences: fixed public token sequences (2 tokens or more each) that every sync is checked on.
            namespace: Ray namespace of the named actors `rollout-<slot>`.
            chunk_timeout_s: a replica that takes longer for one chunk of prompts counts as hung and is replaced.
            recovery_timeout_s: how long to wait for any replica before a call fails; also one replica's start-up limit.
            max_restarts: over the whole run; more than these are a defect, not bad luck.
            actor_class: what a replica runs; tests inject faults here.
        """
        self._build = (str(model_path), rollout, generation, dtype)
        self._rollout = rollout
        self._check_sequences = [tuple(s) for s in check_sequences]
        self._namespace = namespace
        self._chunk_timeout_s = chunk_timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._max_restarts = max_restarts
        self._actor_class = actor_class
        self._transport = build_transport()
        self._manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=1)
        self._replicas: dict[int, _Replica] = {}
        self._target = 0
        self._lock = threading.RLock()
        self._published: _Published | None = None
        self._incarnations: dict[int, int] = {}
        self._restarts = 0
        self._last_failure = "none failed: still starting"
        self._tokens_per_second = 0.0
        self._sync_seconds = 0.0

    # ------------------------------------------------------------------------------------------------ the fleet's size

    def start(self, replicas: int) -> None:
        """Begin to start the replicas; they serve after the first `sync`."""
        self.resize(replicas)

    def resize(self, replicas: int) -> None:
        """Set the number of replicas; takes effect now, or within a running call between two chunks."""
        if replicas < 1:
            raise ValueError("a fleet needs at least one replica")
        self._target = replicas
        if self._lock.acquire(blocking=False):
            try:
                self._reconcile(busy=frozenset())
            finally:
                self._lock.release()

    def stop(self) -> None:
        """End every replica."""
        with self._lock:
            self._target = 0
            for replica in list(self._replicas.values()):
                self._remove(replica)

    def status(self) -> dict[str, float | int | None]:
        """Operational figures; nothing in here depends on what the records say."""
        replicas = list(self._replicas.values())
        return {
            "replicas": self._target,
            "healthy": sum(r.actor_id is not None for r in replicas),
            "starting": sum(r.actor_id is None for r in replicas),
            "restarts": self._restarts,
            "version": self._published.handle.version if self._published else None,
            "tokens_per_second": self._tokens_per_second,
            "sync_seconds": self._sync_seconds,
        }

    # -------------------------------------------------------------------------------------------------------- weights

    def sync(self, version: int, weights: Mapping[str, torch.Tensor], reference_log_probs: LogProbs) -> None:
        """Bring every replica to `version` and check each against the learner.

        Args:
            weights: complete named tensors; at every sync the same names or more, so that a replica that starts later
                needs the last ones only.
            reference_log_probs: the learner's log-probabilities of `check_sequences`, as from `Engine.log_probs`.

        Raises:
            SyncFailed: a replica disagrees with the learner. The run has to stop.
            RolloutFailed: no replica came up in time.
        """
        with self._lock:
            started = time.monotonic()
            old = self._published
            if old and not set(old.handle.names) <= set(weights):
                lost = sorted(set(old.handle.names) - set(weights))
                raise SyncFailed(f"version {version} lacks {lost[0]}, which version {old.handle.version} had changed")
            self._published = _Published(self._transport.publish(version, weights), reference_log_probs)
            self._reconcile(busy=frozenset())
            serving = {r.actor_id: r for r in self._replicas.values() if r.actor_id is not None}
            for replica in self._replicas.values():
                if replica.actor_id is None:
                    self._bring_up(replica)
            if serving:
                self._sync_serving(serving, old)
            self._wait_for_a_replica()
            self._sync_seconds = time.monotonic() - started

    def _sync_serving(self, serving: dict[int, _Replica], old: _Published | None) -> None:
        assert self._published is not None
        limit = self._recovery_timeout_s
        ids = list(serving)
        self._manager.foreach_actor(
            "load", kwargs={"handle": self._published.handle}, remote_actor_ids=ids, timeout_seconds=limit
        )
        results = self._manager.foreach_actor(
            "log_probs", kwargs={"sequences": self._check_sequences}, remote_actor_ids=ids, timeout_seconds=limit
        )
        answers = {r.actor_id: r.get() for r in cast("list[CallResult]", list(results)) if r.ok}
        for actor_id, replica in serving.items():
            answer = answers.get(actor_id, Failure("no answer", "sync"))
            if isinstance(answer, Failure):
                self._replace(replica, str(answer))
            else:
                self._check(replica, answer, old)

    def _check(self, replica: _Replica, log_probs: LogProbs, old: _Published | None = None) -> None:
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

    # ----------------------------------------------------------------------------------------------------- generation

    def generate(self, prompts: Sequence[Sequence[int]], completions_per_prompt: int) -> list[list[Completion]]:
        """Completions of every prompt, in order, all from the current weight version. See `Engine.generate`.

        Raises:
            RolloutFailed: no replica came back within the recovery time, or too many restarts.
        """
        with self._lock:
            if self._published is None:
                raise RolloutFailed("no weights were published to the fleet yet: call sync() first")
            started = time.monotonic()
            results: list[list[Completion] | None] = [None] * len(prompts)
            waiting = deque(self._chunks(len(prompts)))
            running: dict[int, tuple[range, float]] = {}  # slot -> chunk, start
            while waiting or running:
                self._reconcile(busy=running.keys())
                self._admit()
                for replica in [r for r in self._replicas.values() if r.actor_id is not None]:
                    if waiting and replica.slot not in running:
                        chunk = waiting.popleft()
                        batch = [tuple(prompts[i]) for i in chunk]
                        self._manager.foreach_actor_async(
                            "generate",
                            kwargs={"prompts": batch, "completions_per_prompt": completions_per_prompt},
                            remote_actor_ids=[cast(int, replica.actor_id)],
                        )
                        running[replica.slot] = (chunk, time.monotonic())
                if not running:
                    self._wait_for_a_replica()
                    continue
                self._collect(running, waiting, results)
            done = [r for r in results if r is not None]
            if len(done) != len(prompts):
                raise RolloutFailed(f"{len(prompts) - len(done)} of {len(prompts)} records came back without an answer")
            tokens = sum(len(c.token_ids) for row in done for c in row)
            self._tokens_per_second = tokens / max(time.monotonic() - started, 1e-9)
            return done

    def _chunks(self, count: int) -> list[range]:
        """One chunk for one replica (its own scheduler does best); else two per replica, so that fast ones do more."""
        parts = 1 if self._target == 1 else min(count, 2 * self._target)
        size = -(-count // parts) if parts else 1
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def _collect(
        self,
        running: dict[int, tuple[range, float]],
        waiting: deque[range],
        results: list[list[Completion] | None],
    ) -> None:
        """Take in what has finished; put back the chunks of replicas that died, failed or hang."""
        assert self._published is not None
        by_id = {self._replicas[slot].actor_id: slot for slot in running}
        answers: dict[int, Any] = {
            by_id[r.actor_id]: r.get() if r.ok else Failure(type(r.get()).__name__, "the replica's process")
            for r in _fetch_ready(self._manager)
        }
        for slot, (chunk, since) in list(running.items()):
            answer = answers.get(slot)
            if answer is None and time.monotonic() - since > self._chunk_timeout_s:
                answer = Failure(f"no answer within {self._chunk_timeout_s:.0f} s", "generate")
            if answer is None:
                continue
            del running[slot]
            if isinstance(answer, Failure):
                waiting.appendleft(chunk)
                self._replace(self._replicas[slot], f"{answer}; its {len(chunk)} prompts go to another replica")
                continue
            version = self._published.handle.version
            if len(answer) != len(chunk) or any(c.version != version for row in answer for c in row):
                raise RolloutFailed(f"{self._replicas[slot].name} answered from another weight version than {version}")
            for i, row in zip(chunk, answer, strict=True):
                results[i] = row

    # ----------------------------------------------------------------------------------------------------- replicas

    def _reconcile(self, busy: Any) -> None:
        """Start missing replicas and end surplus ones that are not at work."""
        for slot in range(self._target):
            if slot not in self._replicas:
                self._create(slot)
        for slot in [s for s in self._replicas if s >= self._target and s not in busy]:
            _log.info("%s removed: the fleet has %d replicas now", self._replicas[slot].name, self._target)
            self._remove(self._replicas[slot])

    def _create(self, slot: int) -> None:
        # A dead actor's name is not free at once.
        incarnation = self._incarnations[slot] = self._incarnations.get(slot, 0) + 1
        name = f"rollout-{slot}" if incarnation == 1 else f"rollout-{slot}.{incarnation}"
        actor = (
            ray.remote(self._actor_class)
            .options(
                name=name,
                namespace=self._namespace,
                num_cpus=0,
                num_gpus=self._rollout.gpus_per_replica,
                max_restarts=0,
                runtime_env={"env_vars": environment(self._rollout)},
            )
            .remote(*self._build)
        )
        self._replicas[slot] = _Replica(slot, name, actor)
        if self._published is not None:
            self._bring_up(self._replicas[slot])

    def _bring_up(self, replica: _Replica) -> None:
        """Queue loading and checking of the current version; `_admit` looks at the answers."""
        assert self._published is not None
        replica.bringing_up = [
            replica.actor.apply.remote(self._actor_class.load, self._published.handle),
            replica.actor.apply.remote(self._actor_class.log_probs, self._check_sequences),
        ]

    def _admit(self) -> None:
        """Let replicas serve that have loaded the current version and passed the check."""
        for replica in [r for r in self._replicas.values() if r.actor_id is None and r.bringing_up]:
            ready, pending = ray.wait(replica.bringing_up, num_returns=2, timeout=0)
            if pending:
                if time.monotonic() - replica.since > self._recovery_timeout_s:
                    self._replace(replica, f"not ready within {self._recovery_timeout_s:.0f} s")
                continue
            try:
                answers = ray.get(replica.bringing_up)
            except ray.exceptions.RayError as error:
                self._replace(replica, f"{type(error).__name__} while it started")
                continue
            failure = next((a for a in answers if isinstance(a, Failure)), None)
            if failure is not None:
                self._replace(replica, str(failure))
                continue
            self._check(replica, answers[1])
            self._manager.add_actors([replica.actor])
            replica.actor_id, replica.bringing_up = self._manager.actor_ids()[-1], []
            _log.info("%s serves", replica.name)

    def _replace(self, replica: _Replica, reason: str) -> None:
        self._remove(replica)
        self._restarts += 1
        self._last_failure = f"{replica.name}: {reason}"
        if self._restarts > self._max_restarts:
            raise RolloutFailed(f"{replica.name} failed ({reason}); {self._max_restarts} restarts were used up")
        _log.warning("%s failed: %s. A new one starts and is synced before it serves.", replica.name, reason)
        if replica.slot < self._target:
            self._create(replica.slot)

    def _remove(self, replica: _Replica) -> None:
        if replica.actor_id is not None:
            self._manager.remove_actor(replica.actor_id)
        self._replicas.pop(replica.slot, None)
        ray.kill(replica.actor)

    def _wait_for_a_replica(self) -> None:
        deadline = time.monotonic() + self._recovery_timeout_s
        while True:
            self._reconcile(busy=frozenset())
            self._admit()
            if any(r.actor_id is not None for r in self._replicas.values()):
                return
            if time.monotonic() > deadline:
                raise RolloutFailed(
                    f"no rollout replica is up after {self._recovery_timeout_s:.0f} s (last: {self._last_failure})"
                )
            time.sleep(0.05)


def _fetch_ready(manager: FaultTolerantActorManager) -> list[Any]:
    """Answers that came within a short wait (the manager itself waits for all of them, or not at all)."""
    if not (ready := list(manager.fetch_ready_async_reqs(timeout_seconds=0.0))):
        time.sleep(0.01)
    return ready
