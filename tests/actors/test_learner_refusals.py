"""What a learner refuses, without a cluster: stale completions, a gradient that is not the noised one, noise of another
scale. The learner's own methods run; DeepSpeed's engine is a stand-in that can be made to misbehave."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dprlhf_ray.actors import learner
from dprlhf_ray.actors.compilers import unlock_builds
from dprlhf_ray.actors.learner import Learner, WriteCheckFailed
from dprlhf_ray.config import OptimizerConfig, RLStage
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.privacy.permit import Permit
from dprlhf_ray.records import Completion, Experience, Prompt
from dprlhf_ray.stages.metrics import Metrics

STEP = DPStep("record", "zero_out", 1000, 0.1, 1.5, 0.2, 1, 3, 4.0)


class Engine:
    """Does what DeepSpeed does for one rank; `spoil` changes the gradient between the backward pass and the step."""

    def __init__(self, model: nn.Module, spoil: Callable[[nn.Module], None]) -> None:
        self.model, self.spoil, self.stepped = model, spoil, False
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.spoil(self.model)

    def step(self) -> None:
        self.stepped = True
        self.optimizer.step()


def _write(gradient: Tensor, spoil: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> Engine:
    """`Learner._write_and_step` on a linear layer of 3 numbers."""
    monkeypatch.setattr(learner, "safe_get_full_grad", lambda p: p.grad)
    model = nn.Linear(3, 1, bias=False)
    engine = Engine(model, spoil)
    config = SimpleNamespace(learner=SimpleNamespace(zero_stage=0))
    own: Any = SimpleNamespace(
        engine=engine,
        recorder=Recorder(model),
        stage=SimpleNamespace(optimizer=OptimizerConfig(kind="sgd", lr=1.0)),
        spec=SimpleNamespace(step=STEP, config=config),
        version=0,
    )
    own._gathered = lambda parameters: Learner._gathered(own, parameters)
    before = model.weight.detach().clone()
    try:
        Learner._write_and_step(own, gradient)
    except WriteCheckFailed:
        assert not engine.stepped and torch.equal(model.weight, before), "refused, and applied all the same"
        raise
    assert torch.allclose(before - model.weight.detach(), gradient.view(1, 3)), "another gradient was applied"
    return engine


def _add_raw(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad += 0.01


def _drop(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def test_the_noised_gradient_is_applied_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: what the optimizer applies is not what was clipped, noised and divided; or a difference goes unseen."""
    gradient = torch.tensor([0.5, -1.0, 2.0])
    assert _write(gradient, lambda model: None, monkeypatch).stepped
    for spoil in (_add_raw, _drop):
        with pytest.raises(WriteCheckFailed):
            _write(gradient, spoil, monkeypatch)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_noised_gradient_that_is_not_finite_fails_loudly(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """False: a step is skipped in silence, so that its having been made tells something about the records."""
    with pytest.raises(WriteCheckFailed, match="finite"):
        _write(torch.tensor([0.5, bad, 2.0]), lambda model: None, monkeypatch)


def test_completions_of_another_weight_version_are_refused() -> None:
    """False: a record's completions may come from weights that depend on how fast other records were."""
    completions = (Completion((5,), "x", True, 3), Completion((6,), "y", True, 2))

    def used(_: Any) -> None:
        pytest.fail("stale completions reached the DP step")

    own = _at_version_3(0, _micro_batches=used)
    with pytest.raises(RuntimeError, match="version 2"):
        Learner.update(own, [(Experience(Prompt(0, (4,), "p"), completions, (0.1, 0.2)),)], 1, 0.0, lambda: None)


def _at_version_3(staleness: int, **more: Any) -> Any:
    spec = SimpleNamespace(config=SimpleNamespace(rollout=SimpleNamespace(staleness=staleness)))
    own = SimpleNamespace(version=3, spec=spec, **more)
    own._check_versions = partial(Learner._check_versions, own)
    return own


@pytest.mark.parametrize(
    ("version", "log_probs", "fine"),
    [
        (3, (-0.5,), True),
        (3, None, False),
        (2, (-0.5,), True),
        (2, None, False),
        (1, (-0.5,), False),
        (4, (-0.5,), False),
    ],
)
def test_completions_are_at_most_as_stale_as_agreed_and_come_with_what_weighs_them(
    version: int, log_probs: float | None, fine: bool
) -> None:
    """False: a learner takes what is older than the bound, or newer than itself, or cannot be weighed."""
    known = None if log_probs is None else (log_probs,)
    unit = (Experience(Prompt(0, (4,), "p"), (Completion((5,), "x", True, version, known),), (0.1,)),)
    with contextlib.nullcontext() if fine else pytest.raises(RuntimeError, match=f"version {version}"):
        Learner._check_versions(_at_version_3(1), [unit])


def test_metrics_are_noised_for_their_joint_bound_and_divided_by_the_public_batch() -> None:
    """False: the metrics' noise does not cover the whole vector of a unit, or their divisor is not q N."""
    stage = RLStage.model_validate({"privacy": {"epsilon": 1.0}})
    metrics = Metrics.of(stage)
    own: Any = SimpleNamespace(stage=stage, spec=SimpleNamespace(step=STEP), objective=SimpleNamespace(metrics=metrics))
    values = []
    for attempt in range(2000):
        permit = Permit.of("t", "rl", attempt, STEP, "i")
        values.append([r.value for r in Learner._release(own, torch.zeros(len(metrics.names)), permit)])
    measured = torch.tensor(values).std(0)
    scales = torch.tensor([float(s) for s in metrics.scales.values()])
    expected = 4.0 * len(metrics.names) ** 0.5 / 100.0 * scales
    assert (measured / expected - 1).abs().max() < 5 / (2 * 2000) ** 0.5


def test_the_lock_of_a_compiler_that_was_killed_is_removed_and_that_of_one_at_work_is_not(tmp_path: Path) -> None:
    """False: a learner that is killed while DeepSpeed compiles leaves a lock that every later one waits for."""
    for name, age in (("dead", 3600), ("alive", 30)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age,) * 2)
    unlock_builds(str(tmp_path))
    assert not (tmp_path / "dead/lock").exists() and (tmp_path / "alive/lock").exists()
