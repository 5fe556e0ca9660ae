"""DP-AdamBC: the second moment without the noise's share, floored where nothing else is left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dprlhf_ray import config_file
from dprlhf_ray.config import OptimizerConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models.optimizer import NoiseCorrectedAdamW, build_optimizer

S = 0.05


def _run(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[torch.Tensor]) -> torch.Tensor:
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_without_noise_it_is_adamw() -> None:
    """False: moments, bias corrections, epsilon or weight decay differ from torch's."""
    torch.manual_seed(0)
    start, grads = torch.randn(50), [torch.randn(50) for _ in range(20)]
    settings = OptimizerConfig(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, noise_corrected=True)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    plain = settings.model_copy(update={"noise_corrected": False})
    got = _run(build_optimizer([ours], settings, 0.0), ours, grads)
    expected = _run(build_optimizer([theirs], plain, 0.0), theirs, grads)
    assert torch.allclose(got, expected, atol=1e-6) and not torch.allclose(got, start, atol=1e-3)


def test_of_noise_alone_nothing_is_left_but_the_floor() -> None:
    """False: the subtracted variance is not that of the noise (twice or half of it fails), or the floor is not met."""
    torch.manual_seed(1)
    p, steps, beta2 = nn.Parameter(torch.zeros(20_000)), 300, 0.99
    optimizer = NoiseCorrectedAdamW([p], 1e-3, (0.9, beta2), 1e-8, 0.0, S)
    _run(optimizer, p, [S * torch.randn(20_000) for _ in range(steps)])
    corrected = optimizer.state[p]["exp_avg_sq"] / (1 - beta2**steps) - S**2
    assert abs(corrected.mean().item()) < 0.01 * S**2
    error = S**2 * math.sqrt(2 * (1 - beta2) / (1 + beta2))
    assert abs(corrected.std().item() / error - 1) < 0.1  # the floor is one standard error
    assert 0.75 < (corrected < error).float().mean() < 0.93  # of a normal, 0.84 lie below one deviation


def test_a_small_signal_under_large_noise_moves_as_adam_would_without_the_noise() -> None:
    """False: DP-Adam is DP-SGD with momentum: coordinates with tenfold gradients move tenfold, not alike."""
    torch.manual_seed(2)
    signal = torch.cat([torch.full((500,), 1.0), torch.full((500,), 3.0)])
    grads = [signal + torch.randn(1000) * 4.0 for _ in range(2000)]
    moved = {}
    for corrected in (False, True):
        p = nn.Parameter(torch.zeros(1000))
        settings = OptimizerConfig(lr=1e-3, betas=(0.9, 0.999), noise_corrected=corrected)
        end = _run(build_optimizer([p], settings, 4.0), p, grads)
        moved[corrected] = (end[500:].mean() / end[:500].mean()).item()
    assert moved[False] > 2.2  # sqrt((9 + 16) / 25) against sqrt(17 / 25): nearly the ratio of the gradients
    assert moved[True] < 1.7


def test_the_first_step_is_bounded() -> None:
    """False: at t = 1 a gradient near the noise's size divides by almost nothing."""
    p = nn.Parameter(torch.zeros(1000))
    optimizer = NoiseCorrectedAdamW([p], 1.0, (0.9, 0.99), 0.0, 0.0, S)
    _run(optimizer, p, [S * torch.randn(1000)])
    assert p.abs().max() < 4.0


def test_the_correction_is_for_adamw_only() -> None:
    """False: noise_corrected is silently without effect for sgd."""
    stage = {"privacy": {"mode": "clip_only"}, "optimizer": {"kind": "sgd", "noise_corrected": True}}
    with pytest.raises(ConfigError, match="noise_corrected"):
        config_file.parse({"stages": [stage]})
