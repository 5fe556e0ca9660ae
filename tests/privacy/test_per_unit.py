"""Per-unit gradients, clipping, noise and sampling: what is summed is what the guarantee says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.noise import noise_gradient, noise_metrics
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.privacy.permit import Permit, PermitRefused
from dprlhf_ray.privacy.sampling import poisson_draw

STEP = DPStep("record", "zero_out", 1000, 0.1, 1.5, 0.2, 2, 3, 4.0)


class Net(nn.Module):
    """Every supported kind of layer: embedding (tied with the head), norm with and without rule, linear with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 12)
        self.outer = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight
        self.rms = nn.RMSNorm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.embed(ids))
        return self.head(self.rms(h + self.outer(torch.tanh(self.inner(h)))))


def _loss(net: nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (
        nn.functional.cross_entropy(net(ids).flatten(0, 1), targets.flatten(), reduction="none").view(ids.shape).sum(1)
    )


@pytest.mark.parametrize("rows_per_unit", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_recorded_gradients_equal_one_record_autograd(rows_per_unit: int, dtype: torch.dtype) -> None:
    """False: a layer's per-unit rule, or the folding of a unit's rows, is wrong."""
    torch.manual_seed(0)
    net, units = Net().to(dtype), 4
    ids, targets = torch.randint(30, (2, units * rows_per_unit, 5))
    expected = []
    for u in range(units):
        rows = slice(u * rows_per_unit, (u + 1) * rows_per_unit)
        grads = torch.autograd.grad(_loss(net, ids[rows], targets[rows]).sum(), list(net.parameters()))
        expected.append([g.clone() for g in grads])
    recorder = Recorder(net)
    with recorder.record(units, rows_per_unit):
        _loss(net, ids, targets).sum().backward()
        grads = recorder.take()
    for i, g in enumerate(grads):
        reference = torch.stack([e[i] for e in expected])
        error = (g - reference).norm() / reference.norm()
        assert error < 1e-5, f"{recorder.names[i]}: relative error {error:.2e}"
    assert all(p.grad is None for p in net.parameters()), "a raw gradient was left where an optimizer could take it"


def test_a_layer_that_mixes_records_is_refused_by_name() -> None:
    """False: BatchNorm would couple records and clipping would bound nothing."""
    with pytest.raises(ConfigError, match="BatchNorm1d"):
        Recorder(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def test_clipped_sum_is_the_sum_of_clipped_vectors_over_all_parameters() -> None:
    """False: the clip is per parameter, or after the sum, or not a clip."""
    torch.manual_seed(1)
    grads = [torch.randn(5, 4, 3), torch.randn(5, 7)]
    vectors = torch.cat([g.flatten(1) for g in grads], 1)
    vectors[2] *= 1e-3
    grads = [vectors[:, :12].view(5, 4, 3), vectors[:, 12:]]
    total = ClippedSum([12, 7], clip_norm=0.5)
    clipped = total.add(grads, torch.ones(5, dtype=torch.bool))
    expected = sum(v * min(1.0, 0.5 / v.norm().item()) for v in vectors)
    assert torch.allclose(total.total, expected.double(), atol=1e-6)
    assert clipped.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_poisoned_unit_moves_the_sum_by_at_most_c(poison: float) -> None:
    """False: one record's NaN or overflow reaches the others (0 * NaN is NaN) or breaks the bound."""
    torch.manual_seed(2)
    grads = torch.randn(4, 6)
    clean, dirty = ClippedSum([6], 0.3), ClippedSum([6], 0.3)
    clean.add([grads], torch.tensor([True, True, False, True]))
    broken = grads.clone()
    broken[2, 3] = poison
    dirty.add([broken], torch.ones(4, dtype=torch.bool))
    assert torch.isfinite(dirty.total).all()
    assert (dirty.total - clean.total).norm() <= 0.3 * (1 + 1e-5)


def test_empty_and_one_unit_draws() -> None:
    """False: an empty draw is not a step of noise only, or a single unit is treated specially."""
    total = ClippedSum([3], 1.0)
    assert total.total.norm() == 0
    total.add([torch.tensor([[3.0, 0.0, 4.0]])], torch.tensor([True]))
    assert torch.allclose(total.total.float(), torch.tensor([0.6, 0.0, 0.8]))


def test_sampling_is_poisson() -> None:
    """False: draws are shuffled batches, of fixed size, or units or draws are correlated."""
    n, q, draws = 200, 0.1, 4000
    hits = np.zeros((draws, n), dtype=np.int64)
    for d in range(draws):
        hits[d, poisson_draw(n, q)] = 1
    rate = hits.mean(0)
    assert np.abs(rate - q).max() < 5 * math.sqrt(q * (1 - q) / draws)
    assert abs(hits.sum(1).var() / (n * q * (1 - q)) - 1) < 5 * math.sqrt(2 / draws)  # a shuffled batch has 0
    across = np.corrcoef(hits[:, :60].T)[np.triu_indices(60, 1)]
    assert np.abs(across.mean()) < 5 / math.sqrt(draws * len(across))
    steps = np.corrcoef(hits[:-1].ravel(), hits[1:].ravel())[0, 1]
    assert abs(steps) < 5 / math.sqrt(draws * n)


def test_noise_has_the_scale_that_is_charged_and_no_other() -> None:
    """False: the deviation on the sum is not sigma C (2/3, 3/2 and sqrt 2 of it are rejected), or it repeats."""
    size, expected = 200_000, STEP.noise_multiplier * STEP.clip_norm
    permit = Permit.of("t", "rl", 1, STEP, "i")
    first, second = (noise_gradient(torch.zeros(size), permit).value for _ in range(2))
    for noise in (first, second):
        ratio = noise.std().item() / expected
        assert abs(ratio - 1) < 0.02
        assert all(abs(ratio - wrong) > 0.1 for wrong in (2 / 3, 3 / 2, math.sqrt(2), 1 / math.sqrt(2)))
        assert abs(noise.mean().item()) < 5 * expected / math.sqrt(size)
        assert abs(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]) < 5 / math.sqrt(size)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(size)
    metrics = noise_metrics(torch.zeros(size), Permit.of("t", "rl", 1, STEP, "i"), bound=3.0).value
    assert abs(metrics.std().item() / (4.0 * 3.0) - 1) < 0.02


def test_no_noise_without_a_permit_that_has_uses_left() -> None:
    """False: more sums leave than were charged (K updates, one metric release)."""
    permit = Permit.of("t", "rl", 1, STEP, "i")
    for _ in range(STEP.updates_per_draw):
        noise_gradient(torch.zeros(2), permit)
    with pytest.raises(PermitRefused):
        noise_gradient(torch.zeros(2), permit)
    noise_metrics(torch.zeros(2), permit, 1.0)
    with pytest.raises(PermitRefused):
        noise_metrics(torch.zeros(2), permit, 1.0)


def test_noise_does_not_follow_the_seed() -> None:
    """False: a seed of the config would let anyone subtract the noise."""
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(noise_gradient(torch.zeros(50), Permit.of("t", "rl", 1, STEP, "i")).value)
    assert not torch.equal(*draws)


def test_noise_uses_more_of_its_key_than_can_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: keys that differ above bit 32 give the same noise, and an attacker who tries 2^32 of them subtracts it."""
    draws = []
    for key in (7, 7 + (1 << 40), 7 + (1 << 100)):
        monkeypatch.setattr("dprlhf_ray.privacy.noise.secrets.randbits", lambda bits, key=key: key)
        draws.append(noise_gradient(torch.zeros(50), Permit.of("t", "rl", 1, STEP, "i")).value)
    assert not any(torch.equal(a, b) for a, b in ((draws[0], draws[1]), (draws[0], draws[2]), (draws[1], draws[2])))
