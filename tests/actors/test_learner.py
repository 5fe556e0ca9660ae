"""The learner on real DeepSpeed: ZeRO 0-3, one and two ranks, the same private step; noise once; resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.actors.setting import BATCH, CLIP, launch, setting, units


def learn(out: Path, learner: dict[str, Any], draws: list[Any], **case: Any) -> dict[str, torch.Tensor]:
    """Run the processes of a learner; returns the trained and the published weights of rank 0."""
    world = learner["config"]["learner"]["num_workers"]
    launch("learner_process.py", out, world, {"draws": draws} | learner | case)
    return load_file(out / "rank0.safetensors")


def _trained(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.flatten() for k, v in sorted(weights.items()) if k.startswith("trained/")])


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """One rank, no ZeRO: the update that all others must make."""
    return _trained(learn(tmp_path_factory.mktemp("reference"), setting(tiny_model, 1, 0), [units(7, 1)]))


@pytest.mark.parametrize("zero", [0, *(pytest.param(z, marks=pytest.mark.slow) for z in (1, 2)), 3])
def test_two_ranks_make_the_same_update_at_every_zero_stage(
    zero: int, tiny_model: Path, tmp_path: Path, reference: torch.Tensor
) -> None:
    """False: sharding or averaging over ranks changes the private sum (a mean over ranks would halve it)."""
    got = _trained(learn(tmp_path, setting(tiny_model, 2, zero), [units(7, 1)]))
    assert torch.allclose(got, reference, atol=1e-7), f"largest deviation {(got - reference).abs().max():.2e}"


@pytest.mark.parametrize("zero", [0, *(pytest.param(z, marks=pytest.mark.slow) for z in (1, 2, 3))])
def test_noise_is_added_once_whatever_the_ranks_and_the_stage(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    """False: each rank adds its own noise (sqrt 2), noise is averaged (1/sqrt 2), or replicas differ.

    An empty draw under plain SGD: the published weight difference is noise only, of scale sigma C / L.
    """
    start = learn(tmp_path / "start", setting(tiny_model, 1, 0, rank=32), [])
    noisy = learn(tmp_path / "noisy", setting(tiny_model, 2, zero, noise_multiplier=2.0, rank=32), [[]])
    noise = _trained(noisy) - _trained(start)
    ratio = noise.std().item() / (2.0 * CLIP / BATCH)
    assert abs(ratio - 1) < 0.02, f"scale of the noise: {ratio:.4f} of what is charged ({noise.numel()} coordinates)"
    assert abs(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]) < 5 / noise.numel() ** 0.5
    other = load_file(tmp_path / "noisy" / "rank1.safetensors")
    assert all(torch.equal(noisy[k], other[k]) for k in noisy), "ranks hold different weights after the noise"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "algorithm"), [("lora_xs", "grpo"), ("ffa_lora", "reinforce"), ("full", "ppo")])
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_every_adapter_makes_the_same_update_on_two_ranks(
    kind: str, algorithm: str, zero: int, tiny_model: Path, tmp_path: Path
) -> None:
    """False: an adapter kind (or full weights, or the value head) is treated differently when sharded."""
    draws, parts = [units(5, 2)], {"kind": kind, "algorithm": algorithm}
    one = _trained(learn(tmp_path / "one", setting(tiny_model, 1, 0, **parts), draws))
    two = _trained(learn(tmp_path / "two", setting(tiny_model, 2, zero, **parts), draws))
    assert (two - one).abs().max() < 1e-6


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_restored_learner_goes_on_where_it_was(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    """False: weights, optimizer state, version or the adapter's frozen part are lost in a checkpoint."""
    first, second = units(5, 3), units(5, 4)
    learner = setting(tiny_model, 1, zero, kind="lora_xs", optimizer="adamw")
    whole = learn(tmp_path / "whole", learner, [first, second])
    learn(tmp_path / "parts", learner, [first], save=True)
    resumed = learn(tmp_path / "parts", learner, [second], restore=True)
    assert json.loads((tmp_path / "parts" / "rank0.json").read_text())["version"] == 2
    assert torch.allclose(_trained(resumed), _trained(whole), atol=1e-7)
    files = [p.name for p in (tmp_path / "parts" / "checkpoints").rglob("*") if p.is_file()]
    assert not [f for f in files if "rng" in f or "random" in f], "random-number states do not belong in a checkpoint"
