"""Settings of a stage on the real learner: the noise-corrected optimizer, secure noise, no metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dprlhf_ray.privacy.secure_noise import grid, sensitivity
from tests.actors.setting import BATCH, CLIP, setting, units
from tests.actors.test_learner import _trained, learn


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_noise_corrected_optimizer_is_the_same_on_two_ranks(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    """False: sharding changes the correction, or it is not applied at all. The permit's noise is off, so that both runs
    get the same gradients; the optimizer corrects for the sigma of the schedule."""

    def trained(world: int, zero: int, corrected: bool) -> torch.Tensor:
        learner = setting(tiny_model, world, zero, optimizer="adamw", corrected=corrected, noise_multiplier=0.2)
        draws = [units(7, seed) for seed in (1, 2, 3)]
        return _trained(learn(tmp_path / f"{world}-{corrected}", learner, draws, permit_sigma=0.0))

    one, two, plain = trained(1, 0, True), trained(2, zero, True), trained(1, 0, False)
    assert (one - plain).abs().max() > 1e-3, "the correction changed nothing: this test would pass without it"
    assert (two - one).abs().max() < 2e-5


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_secure_noise_reaches_the_published_weights_once(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    """False: the stage's noise kind does not reach the permit, or rounding happens per rank.

    An empty draw under plain SGD of rate 1 from B = 0: what B becomes is the released sum over L, on the grid over L.
    """
    noisy = learn(tmp_path, setting(tiny_model, 2, zero, rank=32, noise_multiplier=2.0, noise="secure"), [[]])
    size = _trained(noisy).numel()
    b = torch.cat([v.flatten() for k, v in noisy.items() if k.startswith("trained/") and "lora_B" in k]).double()
    cells = -b * BATCH / grid(CLIP, size)
    assert torch.equal(cells, cells.round())
    assert abs(b.std().item() / (2.0 * sensitivity(CLIP, size) / BATCH) - 1) < 0.03
    other = load_file(tmp_path / "rank1.safetensors")
    assert all(torch.equal(noisy[k], other[k]) for k in noisy), "ranks hold different weights after the noise"


@pytest.mark.slow
def test_a_stage_without_metrics_releases_none(tiny_model: Path, tmp_path: Path) -> None:
    """False: the learner asks the permit for a metric release that was not charged, and dies or releases one."""
    learn(tmp_path, setting(tiny_model, 1, 0, metric_noise_multiplier=None), [units(5, 1)])
    assert json.loads((tmp_path / "rank0.json").read_text())["released"] == [[]]


@pytest.mark.slow
def test_kl_is_released_with_the_other_metrics(tiny_model: Path, tmp_path: Path) -> None:
    """False: KL is measured against a moving reference (at the start it is 0), or charged and not released."""
    learn(tmp_path, setting(tiny_model, 1, 0, metric_noise_multiplier=1e-6), [units(8, 1), units(8, 2)])
    first, second = json.loads((tmp_path / "rank0.json").read_text())["released"]
    assert [m["name"] for m in first] == [f"private/{n}" for n in ("reward", "length", "clip_fraction", "kl")]
    assert abs(first[3]["value"]) < 2e-6 < 1e-5 < abs(second[3]["value"])  # noise: 1.25e-7
    assert first[3]["std"] == pytest.approx(1e-6 * 2.0 / BATCH * 0.5)
