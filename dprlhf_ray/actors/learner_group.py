"""The learner group: Ray Train v2 workers that serve commands of the driver's loop.

Ray Train sets up the process group, places the workers and restarts them after a failure. Inside, every worker asks a
mailbox actor for the next command; rank 0 answers. A restarted group has a new incarnation: what was in flight is lost
(`LearnersRestarted`), permits of the old incarnation are refused, and the driver goes on with a new step.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dprlhf_ray.actors.learner import LearnerSpec
from dprlhf_ray.errors import DprlhfError, LearnersRestarted, place_of
from dprlhf_ray.transport import Handle, Publisher, build_publisher


class LearnersFailed(DprlhfError):
    """The learner group is gone for good."""


class LearnerError(DprlhfError):
    """An error inside an update: its type and place, without its message."""


class Mailbox:
    """Async actor between driver and workers. Commands are (method, one argument tuple per rank)."""

    def __init__(self) -> None:
        self._incarnation: str | None = None
        self._info: dict[str, Any] = {}
        self._seq = 0
        self._command: tuple[str, list[tuple[Any, ...]]] | None = None
        self._reply: tuple[int, Any] | None = None
        self._changed = asyncio.Condition()

    async def register(self, incarnation: str, info: dict[str, Any]) -> None:
        async with self._changed:
            self._incarnation, self._info, self._command, self._reply = incarnation, info, None, None
            self._changed.notify_all()

    async def ready(self, timeout: float) -> tuple[str, dict[str, Any]] | None:
        """(incarnation, info) of the present group, or None after `timeout` seconds without one."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._incarnation is not None), timeout)
            except TimeoutError:
                return None
            return str(self._incarnation), self._info

    async def submit(self, incarnation: str, method: str, arguments: list[tuple[Any, ...]]) -> int:
        async with self._changed:
            if incarnation != self._incarnation:
                return -1
            self._seq += 1
            self._command, self._reply = (method, arguments), None
            self._changed.notify_all()
            return self._seq

    async def next(self, incarnation: str, rank: int, after: int) -> tuple[int, str, tuple[Any, ...]] | None:
        """The command that follows number `after` for `rank`; None after a while without one, or when superseded."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._command is not None and self._seq > after), 5
                )
            except TimeoutError:
                return None
            if incarnation != self._incarnation or self._command is None:
                return None
            method, arguments = self._command
            return self._seq, method, arguments[rank]

    async def reply(self, incarnation: str, seq: int, value: Any) -> None:
        async with self._changed:
            if incarnation == self._incarnation and seq == self._seq:
                self._command, self._reply = None, (seq, value)
                self._changed.notify_all()

    async def result(self, incarnation: str, seq: int, timeout: float) -> tuple[str, Any]:
        """("done", value), ("restarted", None) or ("waiting", None)."""
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(
                        lambda: self._incarnation != incarnation or (self._reply is not None and self._reply[0] == seq)
                    ),
                    timeout,
                )
            except TimeoutError:
                return "waiting", None
            if self._incarnation != incarnation or self._reply is None:
                return "restarted", None
            return "done", self._reply[1]


def _worker(config: dict[str, Any]) -> None:
    """Ray Train's per-worker function: build the rank, restore, serve commands until told to stop."""
    import torch.distributed as dist

    from dprlhf_ray.actors.learner import Learner

    mailbox: Any = ray.get_actor(config["mailbox"], namespace=config["namespace"])
    accountant: Any = ray.get_actor(config["accountant"], namespace=config["namespace"])
    learner = Learner(config["spec"])
    learner.restore()
    rank = dist.get_rank()
    token = [secrets.token_hex(16) if rank == 0 else None]
    dist.broadcast_object_list(token, 0)
    incarnation = str(token[0])
    dist.barrier()
    publisher = None
    if rank == 0:
        if learner.stage.kind == "rl":
            publisher = build_publisher(learner.spec.config.rollout)
        ray.get(mailbox.register.remote(incarnation, learner.info()))
    seq = 0
    while True:
        command = ray.get(mailbox.next.remote(incarnation, rank, seq))
        if command is None:
            continue
        seq, method, arguments = command
        value = None if method == "stop" else _execute(learner, method, arguments, accountant, incarnation, publisher)
        dist.barrier()  # every rank has seen the command before it is answered
        if rank == 0:
            ray.get(mailbox.reply.remote(incarnation, seq, value))
        if method == "stop":
            if publisher is not None:
                publisher.close()
            return


def _execute(
    learner: Any,
    method: str,
    arguments: tuple[Any, ...],
    accountant: Any,
    incarnation: str,
    publisher: Publisher | None,
) -> Any:
    if method == "update":
        (share,), attempt, baseline, token = arguments  # a reference inside a list: fetched by its rank only
        units = ray.get(share)

        def redeem() -> Any:
            return ray.get(accountant.redeem.remote(token, incarnation, secrets.token_hex(8)))

        try:
            released = learner.update(units, attempt, baseline, redeem)
        except DprlhfError:  # one of our own: it quotes nothing
            raise
        except Exception as e:  # Ray Train logs whatever ends a worker, and this one's message may quote a record
            raise LearnerError(f"the update failed: {place_of(e)}") from None
        return released, *_published(learner, publisher)
    if method == "publish":
        return [], *_published(learner, publisher)
    if method in ("save", "export", "evaluate"):
        return getattr(learner, method)(*arguments)
    raise ValueError(f"unknown command {method}")


def _published(learner: Any, publisher: Publisher | None) -> tuple[int, Handle | None, list[list[float]]]:
    """(version, handle of the changed weights, log-probabilities of the public sequences): what engines need."""
    if learner.stage.kind != "rl":
        return learner.version, None, []
    version, weights = learner.weights()
    return version, None if publisher is None else publisher.publish(version, weights), learner.public_log_probs()


class LearnerGroup:
    """Driver's handle. One command at a time; every rank takes part in each.

    Args:
        spec: what the ranks build.
        namespace: Ray namespace of the run's actors.
        accountant: name of the accountant actor.
    """

    def __init__(self, spec: LearnerSpec, namespace: str, accountant: str) -> None:
        self.world = spec.config.learner.num_workers
        name = f"learner-mailbox-{spec.config.stages[spec.stage_index].name}"
        # On the driver's node: another one may die, and with it what only the mailbox knows.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 64 + 4 * self.world, "scheduling_strategy": here}
        self._mailbox: Any = ray.remote(Mailbox).options(name=name, namespace=namespace, **options).remote()
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._incarnation = ""
        self.incarnations = 0  # for the operator
        self.info: dict[str, Any] = {}
        loop_config = {"spec": spec, "mailbox": name, "namespace": namespace, "accountant": accountant}
        self._thread = threading.Thread(target=self._fit, args=(spec, loop_config), daemon=True, name="ray-train")
        self._thread.start()

    @property
    def incarnation(self) -> str:
        """Of the present group; a permit is bound to it."""
        return self._incarnation

    def wait_ready(self) -> dict[str, Any]:
        """Block until the ranks serve; returns rank 0's info.

        Raises:
            LearnersFailed: the group could not start.
        """
        while True:
            found = ray.get(self._mailbox.ready.remote(2.0))
            if found is not None:
                self.incarnations += found[0] != self._incarnation
                self._incarnation, self.info = found
                return self.info
            self._check_alive()

    def call(self, method: str, per_rank: list[tuple[Any, ...]] | None = None) -> Any:
        """Run `method` on every rank; returns rank 0's answer.

        Raises:
            LearnersRestarted: the group died under the command and is back (call `wait_ready`).
            LearnersFailed: it is gone for good.
        """
        arguments = per_rank or [()] * self.world
        seq = ray.get(self._mailbox.submit.remote(self._incarnation, method, arguments))
        if seq < 0:
            raise LearnersRestarted("the learner group restarted before the command reached it")
        while True:
            state, value = ray.get(self._mailbox.result.remote(self._incarnation, seq, 2.0))
            if state == "done":
                return value
            if state == "restarted":
                raise LearnersRestarted("the learner group died and was restarted; the step in flight is spent")
            self._check_alive()

    def stop(self) -> None:
        """End the ranks and wait for Ray Train to finish."""
        if not self._ended.is_set() and self._incarnation:
            with contextlib.suppress(LearnersRestarted, LearnersFailed, RayError):
                self.call("stop")
            self._ended.wait(60)
        ray.kill(self._mailbox)

    def _check_alive(self) -> None:
        if self._ended.is_set():
            # Ray Train's text is a page, with a traceback of every rank: the error itself is its last line
            lines = [line for line in str(self._failure or "").splitlines() if line.strip()]
            raise LearnersFailed(f"the learner group ended: {lines[-1].strip() if lines else 'without an error'}")

    def _fit(self, spec: LearnerSpec, loop_config: dict[str, Any]) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        learner = spec.config.learner
        trainer = TorchTrainer(
            _worker,
            train_loop_config=loop_config,
            scaling_config=ScalingConfig(
                num_workers=learner.num_workers,
                use_gpu=learner.use_gpu,
                resources_per_worker={"GPU": 1} if learner.use_gpu else {"CPU": 1},
                label_selector=learner.node_labels or None,  # type: ignore[call-arg]  # of the second generation
            ),
            torch_config=TorchConfig(backend="nccl" if learner.use_gpu else "gloo"),
            run_config=RunConfig(
                name="learners",
                storage_path=f"{spec.run_dir}/.ray-train",
                failure_config=FailureConfig(max_failures=learner.max_failures),
            ),
        )
        try:
            trainer.fit()
        except Exception as e:  # Ray Train wraps whatever ended the workers; the driver's next call reports it
            self._failure = e
        finally:
            self._ended.set()
