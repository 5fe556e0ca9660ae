"""The rollout fleet: replicas of the policy that may die, come back, be added and be removed while a run goes on.

The life of a replica is in `replicas.py`; here are weight versions and completions. Every completion comes from the
weight version that the learner published last, or the call does not return.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from dprlhf_ray.actors.replicas import Published, Replicas
from dprlhf_ray.actors.rollout import Failure, RolloutActor
from dprlhf_ray.actors.sync_check import LogProbs
from dprlhf_ray.config import AdapterConfig, GenerationConfig, RolloutConfig
from dprlhf_ray.errors import RolloutFailed, SyncFailed
from dprlhf_ray.records import Completion
from dprlhf_ray.transport import Handle


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
        adapter: AdapterConfig | None = None,
        actor_class: type[RolloutActor] = RolloutActor,
    ) -> None:
        """Nothing starts before `start`.

        Args:
            check_sequences: fixed public token sequences (2 tokens or more each) that every sync is checked on.
            namespace: Ray namespace of the named actors `rollout-<slot>`.
            chunk_timeout_s: a replica that takes longer for one chunk of prompts counts as hung and is replaced.
            recovery_timeout_s: how long to wait for any replica before a call fails; also one replica's start-up limit.
            max_restarts: over the whole run; more than these are a defect, not bad luck.
            adapter: what trains, and is served where `rollout.weights` says so.
            actor_class: what a replica runs; tests inject faults here.
        """
        self.check_sequences = [tuple(s) for s in check_sequences]
        self._chunk_timeout_s = chunk_timeout_s
        build = (str(model_path), rollout, generation, dtype, adapter)
        self._ending = threading.Event()
        self._replicas = Replicas(
            build, rollout, self.check_sequences, namespace, recovery_timeout_s, max_restarts, actor_class,
            self._ending,
        )  # fmt: skip
        self._lock = threading.RLock()
        self._published: Published | None = None
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
        self._replicas.target = replicas
        if self._lock.acquire(blocking=False):
            try:
                self._replicas.reconcile()
            finally:
                self._lock.release()

    def give_way(self) -> None:
        """Let learners that come back have the GPUs that no serving replica needs."""
        with self._lock:
            self._replicas.give_way()

    def interrupt(self) -> None:
        """End a call that runs in another thread; nothing is generated any more."""
        self._ending.set()

    def stop(self) -> None:
        """End every replica."""
        self.interrupt()
        with self._lock:
            self._replicas.end()

    def status(self) -> dict[str, float | int | None]:
        """Operational figures; nothing in here depends on what the records say."""
        serving, starting = self._replicas.counts()
        return {
            "replicas": self._replicas.target,
            "healthy": serving,
            "starting": starting,
            "restarts": self._replicas.restarts,
            "version": self._published.handle.version if self._published else None,
            "tokens_per_second": self._tokens_per_second,
            "sync_seconds": self._sync_seconds,
        }

    # -------------------------------------------------------------------------------------------------------- weights

    def sync(self, handle: Handle, reference_log_probs: LogProbs) -> None:
        """Bring every replica to a published version and check each against the learner.

        Args:
            handle: of complete named tensors; at every sync the same names or more, so that a replica that starts
                later needs the last ones only.
            reference_log_probs: the learner's log-probabilities of `check_sequences`, as from `Engine.log_probs`.

        Raises:
            SyncFailed: a replica disagrees with the learner. The run has to stop.
            RolloutFailed: no replica came up in time.
            WeightsLost: the version cannot be had any more: publish it again.
        """
        with self._lock:
            started = time.monotonic()
            old = self._published
            if old and (lost := sorted(set(old.handle.names) - set(handle.names))):
                raise SyncFailed(
                    f"version {handle.version} lacks {lost[0]}, which version {old.handle.version} had changed"
                )
            self._published = Published(handle, reference_log_probs)
            self._replicas.bring_to(self._published)
            self._sync_seconds = time.monotonic() - started

    # ----------------------------------------------------------------------------------------------------- generation

    def generate(self, prompts: Sequence[Sequence[int]], completions_per_prompt: int) -> list[list[Completion]]:
        """Completions of every prompt, in order, all from the current weight version. See `Engine.generate`.

        Raises:
            RolloutFailed: no replica came back within the recovery time, or too many restarts.
            WeightsLost: no replica serves, and those that start cannot have the version that they need any more.
        """
        with self._lock:
            if self._published is None:
                raise RolloutFailed("no weights were published to the fleet yet: call sync() first")
            started = time.monotonic()
            results: list[list[Completion] | None] = [None] * len(prompts)
            waiting, tag = deque(self._chunks(len(prompts))), self._replicas.round()
            running: dict[int, tuple[range, float]] = {}  # slot -> chunk, start
            while waiting or running:
                if self._ending.is_set():
                    raise RolloutFailed("the fleet was ended under the call")
                self._replicas.reconcile(busy=running.keys())
                self._replicas.admit()
                for replica in self._replicas.serving():
                    if waiting and replica.slot not in running:
                        batch = [tuple(prompts[i]) for i in waiting[0]]
                        if self._replicas.send(
                            replica, tag, "generate", prompts=batch, completions_per_prompt=completions_per_prompt
                        ):
                            running[replica.slot] = (waiting.popleft(), time.monotonic())
                        else:
                            self._replicas.replace(replica, "it died while idle")
                if not running:
                    self._replicas.wait_for_one()
                    continue
                self._collect(tag, running, waiting, results)
            done = [r for r in results if r is not None]
            if len(done) != len(prompts):
                raise RolloutFailed(f"{len(prompts) - len(done)} of {len(prompts)} records came back without an answer")
            if any(len(row) not in (0, completions_per_prompt) for row in done):  # an engine gives all of them, or none
                raise RolloutFailed("a replica answered with another number of completions than it was asked for")
            tokens = sum(len(c.token_ids) for row in done for c in row)
            self._tokens_per_second = tokens / max(time.monotonic() - started, 1e-9)
            return done

    def _chunks(self, count: int) -> list[range]:
        """One chunk for one replica (its own scheduler does best); else two per replica, so that fast ones do more."""
        target = self._replicas.target
        parts = 1 if target == 1 else min(count, 2 * target)
        size = -(-count // parts) if parts else 1
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def _collect(
        self,
        tag: str,
        running: dict[int, tuple[range, float]],
        waiting: deque[range],
        results: list[list[Completion] | None],
    ) -> None:
        """Take in what has finished; put back the chunks of replicas that died, failed or hang."""
        assert self._published is not None
        at_work = {r.slot: r for r in self._replicas.serving() if r.slot in running}
        answers = self._replicas.answers(tag)
        for slot, (chunk, since) in list(running.items()):
            answer = answers.get(slot)
            if answer is None and time.monotonic() - since > self._chunk_timeout_s:
                answer = Failure(f"no answer within {self._chunk_timeout_s:.0f} s")
            if answer is None:
                continue
            del running[slot]
            if isinstance(answer, Failure):
                waiting.appendleft(chunk)
                self._replicas.replace(at_work[slot], f"{answer}; its prompts go to another replica")
                continue
            version = self._published.handle.version
            if len(answer) != len(chunk) or any(c.version != version for row in answer for c in row):
                raise RolloutFailed(f"{at_work[slot].name} answered from another weight version than {version}")
            for i, row in zip(chunk, answer, strict=True):
                results[i] = row
