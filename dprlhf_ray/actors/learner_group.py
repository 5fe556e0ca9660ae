"""The learner group: Ray Train v2 workers that serve commands of the driver's loop.

Ray Train sets up the process group, places the workers and restarts them after a failure. Inside, every worker asks a
mailbox actor for the next command; rank 0 answers. A restarted group has a new incarnation: what was in flight is lost
(`LearnersRestarted`), permits of the old incarnation are refused, and the driver goes on with a new step.

Nothing here or in the mailbox imports torch or DeepSpeed: that takes seconds, in each process that does it.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dprlhf_ray.actors.answers import QUICK, answered
from dprlhf_ray.actors.learner_spec import LearnerSpec
from dprlhf_ray.actors.mailbox import Mailbox
from dprlhf_ray.actors.rank import serve
from dprlhf_ray.errors import DprlhfError, LearnersRestarted


class LearnersFailed(DprlhfError):
    """The learner group is gone for good."""


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
            found = self._ask("ready", 2.0)
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
        seq = self._ask("submit", self._incarnation, method, arguments)
        if seq < 0:
            raise LearnersRestarted("the learner group restarted before the command reached it")
        while True:
            state, value = self._ask("result", self._incarnation, seq, 2.0)
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

    def _ask(self, method: str, *arguments: Any) -> Any:
        """What the mailbox answers. It keeps what the ranks wait for, so that no other can replace it."""
        call = getattr(self._mailbox, method).remote(*arguments)
        try:
            if answered(call, QUICK):
                return ray.get(call)
        except ActorDiedError:
            pass
        raise LearnersFailed("the learners' mailbox died, or hangs: run again with --resume")

    def _check_alive(self) -> None:
        if self._ended.is_set():
            raise LearnersFailed(f"the learner group ended: {_cause(self._failure)}")

    def _fit(self, spec: LearnerSpec, loop_config: dict[str, Any]) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        learner = spec.config.learner
        trainer = TorchTrainer(
            serve,
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


def _cause(failure: BaseException | None) -> str:
    """Why the ranks ended, in one line: of several, an error of ours, else the first rank's. Ray Train's own text is a
    page, with a traceback of each rank."""
    ranks: dict[int, Any] = getattr(failure, "worker_failures", {})
    errors = [getattr(e, "_base_exc", e) for _, e in sorted(ranks.items())] or [failure]
    first = next((e for e in errors if isinstance(e, DprlhfError)), errors[0])
    said = next((line.strip() for line in str(first or "").splitlines() if line.strip()), "")
    if isinstance(first, DprlhfError):
        return said
    return f"{type(first).__name__}: {said}" if first is not None else "without an error"
