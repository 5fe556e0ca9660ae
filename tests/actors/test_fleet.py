"""The fleet on real Ray with real engines: replicas die, come, go and lie, and every completion is still right."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch

from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.actors.rollout import RolloutActor
from dprlhf_ray.actors.sync_check import disagreement
from dprlhf_ray.config import GenerationConfig, RolloutConfig
from dprlhf_ray.errors import RolloutFailed, SyncFailed, WeightsLost
from dprlhf_ray.records import Completion
from dprlhf_ray.transport import Handle
from dprlhf_ray.transport.objects import ObjectPublisher

SEQUENCES = [tuple(range(5, 25)), tuple(range(40, 70, 2))]
PROMPTS = [(10 + i % 200, 20, 30) for i in range(120)]


pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def fleets() -> Iterator[list[Fleet]]:
    opened: list[Fleet] = []
    yield opened
    for fleet in opened:
        fleet.stop()
    time.sleep(0.2)  # names of dead actors


class GoneHandle(Handle):
    """Of a learner that died."""

    def fetch(self) -> dict[str, torch.Tensor]:
        raise WeightsLost("it is gone")


class Learner:
    """Stands for the learner: a model that moves, its weights and its log-probabilities."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def move(self, scale: float = 0.05) -> None:
        with torch.no_grad():
            for value in self.weights().values():
                value += scale * torch.randn_like(value)

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.data for n, p in self.model.named_parameters() if "q_proj" in n or "v_proj" in n}

    @torch.no_grad()
    def log_probs(self) -> list[list[float]]:
        rows = []
        for ids in SEQUENCES:
            tokens = torch.tensor([ids])
            logits = self.model(tokens).logits[0, :-1]
            rows.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist())
        return rows

    def sync(self, fleet: Fleet, version: int) -> None:
        fleet.sync(ObjectPublisher().publish(version, self.weights()), self.log_probs())


@pytest.fixture
def make(tiny_model: Path, fleets: list[Fleet]) -> Callable[..., Fleet]:
    def build(
        replicas: int,
        new_tokens: int = 12,
        engine: str = "transformers",
        gpus_per_replica: float = 0,
        **options: object,
    ) -> Fleet:
        rollout = RolloutConfig(
            engine=engine, max_num_seqs=16, threads=1, max_model_len=120, kv_cache_gib=0.1,
            gpus_per_replica=gpus_per_replica,
        )  # fmt: skip
        generation = GenerationConfig(max_new_tokens=new_tokens, stop_at_eos=False)
        name = f"fleet-{time.monotonic_ns()}"
        options = {"recovery_timeout_s": 60} | options
        fleet = Fleet(str(tiny_model), rollout, generation, "float32", SEQUENCES, namespace=name, **options)
        fleet.start(replicas)
        fleets.append(fleet)
        fleet.test_namespace = name  # type: ignore[attr-defined]
        return fleet

    return build


def pid_of(fleet: Fleet, slot: int) -> int:
    actor = ray.get_actor(f"rollout-{slot}", namespace=fleet.test_namespace)  # type: ignore[attr-defined]
    return ray.get(actor.apply.remote(RolloutActor.pid))


def wait_for_healthy(fleet: Fleet, count: int, version: int) -> None:
    deadline = time.monotonic() + 60
    while fleet.status()["healthy"] != count:
        assert time.monotonic() < deadline, fleet.status()
        rows = fleet.generate(PROMPTS[:2], 1)
        assert all(c.version == version for row in rows for c in row)


def test_a_replica_killed_while_it_generates_loses_nothing_and_is_synced_before_it_serves_again(
    make: Callable[..., Fleet], tiny_model: Path
) -> None:
    fleet, learner = make(2, new_tokens=100), Learner(tiny_model)
    learner.move()
    learner.sync(fleet, 1)
    wait_for_healthy(fleet, 2, 1)
    victim = pid_of(fleet, 1)
    killer = threading.Timer(0.5, os.kill, (victim, signal.SIGKILL))
    killer.start()
    rows = fleet.generate(PROMPTS, 2)
    killer.join()
    assert fleet.status()["restarts"] == 1, "the kill came too late to test anything"
    assert [len(row) for row in rows] == [2] * len(PROMPTS)
    assert all(c.version == 1 and len(c.token_ids) == 100 for row in rows for c in row)
    # The new replica passes the same check against the learner, or this would raise SyncFailed.
    wait_for_healthy(fleet, 2, 1)
    learner.move()
    learner.sync(fleet, 2)
    assert all(c.version == 2 for row in fleet.generate(PROMPTS[:8], 1) for c in row)


@pytest.mark.slow
def test_replicas_can_be_added_and_removed_between_steps_and_within_one(
    make: Callable[..., Fleet], tiny_model: Path
) -> None:
    fleet, learner = make(1), Learner(tiny_model)
    learner.sync(fleet, 0)
    fleet.resize(2)
    wait_for_healthy(fleet, 2, 0)
    learner.move()
    learner.sync(fleet, 1)
    shrink = threading.Timer(0.1, fleet.resize, (1,))
    shrink.start()
    rows = fleet.generate(PROMPTS, 1)
    shrink.join()
    assert all(len(row) == 1 and row[0].version == 1 for row in rows)
    fleet.generate(PROMPTS[:2], 1)
    assert fleet.status()["healthy"] == 1 and fleet.status()["restarts"] == 0


def test_a_stale_engine_is_found_even_when_the_update_is_far_below_the_tolerance(
    make: Callable[..., Fleet], tiny_model: Path
) -> None:
    class StaleActor(RolloutActor):
        def load(self, handle):  # type: ignore[no-untyped-def]
            self._engine.version = handle.version
            return handle.version

    fleet, learner = make(1, actor_class=StaleActor), Learner(tiny_model)
    learner.sync(fleet, 0)
    before = learner.log_probs()
    learner.move(0.001)
    after = learner.log_probs()
    assert disagreement(before, after, 0.05) is None, "the update is too large for this test"
    with pytest.raises(SyncFailed, match="not at all"):
        learner.sync(fleet, 1)
    with pytest.raises(SyncFailed, match="sync_tolerance"):
        learner.move(0.3)
        learner.sync(fleet, 2)


def test_vllm_serves_and_with_packed_weights_it_never_does(make: Callable[..., Fleet], tiny_model: Path) -> None:
    class PackingActor(RolloutActor):
        def __init__(self, *args):  # type: ignore[no-untyped-def]
            from dprlhf_ray.actors.engines import vllm

            vllm._disable_weight_packing = lambda: None
            super().__init__(*args)

    good, packing = make(1, engine="vllm"), make(1, engine="vllm", actor_class=PackingActor, max_restarts=0)
    learner = Learner(tiny_model)
    learner.sync(good, 0)
    learner.move()
    learner.sync(good, 1)
    assert all(row[0].version == 1 for row in good.generate(PROMPTS, 1))
    # The check finds it where vLLM keeps a stale copy; where it dropped the original, loading fails.
    with pytest.raises((SyncFailed, RolloutFailed)):
        learner.sync(packing, 1)


def test_an_error_in_a_replica_is_retried_elsewhere_and_gives_up_loudly_without_its_message(
    make: Callable[..., Fleet], tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FailingActor(RolloutActor):
        def generate(self, prompts, completions_per_prompt):  # type: ignore[no-untyped-def]
            raise ValueError(f"private prompt {prompts}")

    fleet = make(1, actor_class=FailingActor, max_restarts=1)
    Learner(tiny_model).sync(fleet, 0)
    with pytest.raises(RolloutFailed) as raised:
        fleet.generate([(33, 34, 35)], 1)
    assert "ValueError" in str(raised.value)
    assert "private" not in caplog.text + str(raised.value) and "33, 34" not in caplog.text


def test_a_sync_that_forgets_a_tensor_an_earlier_one_changed_is_refused(
    make: Callable[..., Fleet], tiny_model: Path
) -> None:
    fleet, learner = make(1), Learner(tiny_model)
    learner.sync(fleet, 0)
    fewer = dict(list(learner.weights().items())[1:])
    with pytest.raises(SyncFailed, match="lacks"):
        fleet.sync(ObjectPublisher().publish(1, fewer), learner.log_probs())


def test_weights_that_are_gone_are_asked_for_again_and_older_ones_may_come_back(
    make: Callable[..., Fleet], tiny_model: Path
) -> None:
    """False: a learner that dies before its weights were fetched ends the run or leaves engines on old ones unnoticed;
    or the older version that it comes back with counts as an engine that stood still."""
    fleet, learner = make(1), Learner(tiny_model)
    learner.sync(fleet, 0)
    old, reference = {k: v.clone() for k, v in learner.weights().items()}, learner.log_probs()
    learner.move()
    with pytest.raises(WeightsLost):
        fleet.sync(GoneHandle(1, tuple(old)), learner.log_probs())
    fleet.sync(ObjectPublisher().publish(0, old), reference)
    assert all(row[0].version == 0 for row in fleet.generate(PROMPTS[:4], 1))


def test_answers_to_a_call_that_was_given_up_are_nobody_s(
    make: Callable[..., Fleet], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: after a death in the middle of a draw, its completions come back as those of the next draw's records, or
    as those of public prompts."""

    class Echo(RolloutActor):
        def generate(self, prompts, completions_per_prompt):  # type: ignore[no-untyped-def]
            time.sleep(1.0)
            return [[Completion(tuple(p), "", False, self._engine.version)] for p in prompts]

    fleet = make(1, actor_class=Echo)
    Learner(tiny_model).sync(fleet, 0)

    def lost(*_: object) -> None:
        raise WeightsLost("somebody else's")

    with monkeypatch.context() as patch:
        patch.setattr(fleet, "_collect", lost)
        with pytest.raises(WeightsLost):
            fleet.generate([(1, 1), (2, 2)], 1)
    for prompts in ([(3, 3), (4, 4)], [(5, 5), (6, 6)]):
        assert [row[0].token_ids for row in fleet.generate(prompts, 1)] == prompts


@pytest.mark.slow
def test_a_late_replica_that_cannot_have_the_weights_does_not_stop_the_others(
    make: Callable[..., Fleet], tiny_model: Path
) -> None:
    fleet, learner = make(1), Learner(tiny_model)
    learner.sync(fleet, 0)
    object.__setattr__(fleet._replicas._published, "handle", GoneHandle(0, ()))
    fleet.resize(2)
    deadline = time.monotonic() + 60
    while fleet._replicas._by_slot[1].actor_id is None and fleet._replicas._by_slot[1].bringing_up:
        fleet.generate(PROMPTS[:2], 1)
        assert time.monotonic() < deadline
    learner.move()
    learner.sync(fleet, 1)
    wait_for_healthy(fleet, 2, 1)
    assert fleet.status()["restarts"] == 0


def test_a_replica_that_waits_for_a_gpu_has_not_failed(make: Callable[..., Fleet], tiny_model: Path) -> None:
    """False: where there are fewer GPUs than replicas, the fleet is restarted until the run gives up."""
    fleet, learner = make(2, gpus_per_replica=1.0, recovery_timeout_s=30), Learner(tiny_model)
    learner.sync(fleet, 0)
    for replica in fleet._replicas._by_slot.values():
        replica.since -= 1000  # so long ago
    fleet.generate(PROMPTS[:2], 1)
    status = fleet.status()
    assert (status["healthy"], status["starting"], status["restarts"]) == (1, 1, 0)
    os.kill(pid_of(fleet, 0), signal.SIGKILL)  # its GPU goes to whoever waits
    learner.move()
    learner.sync(fleet, 1)
    assert all(row[0].version == 1 for row in fleet.generate(PROMPTS[:4], 1))


def test_disagreement_refuses_nan_and_other_shapes() -> None:
    assert disagreement([[float("nan")]], [[-1.0]], 0.1)
    assert disagreement([[-1.0, -1.0]], [[-1.0]], 0.1)
    assert disagreement([], [], 0.1)
    assert disagreement([[-1.05]], [[-1.0]], 0.1) is None
