"""Secure noise: what is released lies on a public grid, is the Gaussian that is charged, and nothing in its low bits
depends on the data."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from dprlhf_ray.privacy import secure_noise
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.noise import noise_gradient, noise_metrics
from dprlhf_ray.privacy.permit import Permit
from dprlhf_ray.privacy.secure_noise import GRID, add_secure_noise, grid, sensitivity, standard_normal

STEP = DPStep("record", "zero_out", 1000, 0.1, 1.5, 0.2, 2, 3, 4.0, noise="secure")


def _permit(step: DPStep = STEP) -> Permit:
    return Permit.of("t", "rl", 1, step, "i")


@pytest.mark.parametrize("bound", [1e-3, 0.1, 1.0, 3.7])
@pytest.mark.parametrize("dimension", [1, 3, 1000, 10**7])
def test_the_grid_is_fine_a_power_of_two_and_paid_for(bound: float, dimension: int) -> None:
    """False: division by the grid is inexact, or rounding moves a unit by more than the noise is scaled to."""
    gamma = grid(bound, dimension)
    assert math.frexp(gamma)[0] == 0.5
    assert GRID / 2 < gamma * math.sqrt(dimension) / bound <= GRID
    assert sensitivity(bound, dimension) == bound + gamma * math.sqrt(dimension)


def test_rounding_alone_moves_neighbours_apart_by_no_more_than_the_sensitivity() -> None:
    """False: sigma is relative to less than what one unit can do to the rounded sum (gamma sqrt d is real)."""
    bound, size = 0.2, 400
    gamma = grid(bound, size)
    base = gamma * (torch.randint(-1000, 1000, (size,)) + 0.5).double() - gamma * 1e-3  # just below the rounding points
    step = torch.full((size,), bound / math.sqrt(size), dtype=torch.float64)
    moved = add_secure_noise(base + step, 0.0, bound)[0].double() - add_secure_noise(base, 0.0, bound)[0].double()
    assert moved.norm() <= sensitivity(bound, size) * (1 + 1e-6)
    tiny = torch.full((size,), gamma * 2e-3, dtype=torch.float64)
    jump = add_secure_noise(base + tiny, 0.0, bound)[0].double() - add_secure_noise(base, 0.0, bound)[0].double()
    assert torch.allclose(jump.norm(), torch.tensor(gamma * math.sqrt(size), dtype=torch.float64), rtol=1e-3)


def test_no_value_off_the_grid_can_be_released() -> None:
    """False: low bits of the private sum pass through (plain float noise must show them, or this proves nothing)."""
    size = 5000
    gamma = grid(STEP.clip_norm, size)
    private = torch.randn(size) * 0.3
    secure = noise_gradient(private, _permit()).value
    plain = noise_gradient(private, _permit(replace(STEP, noise="gaussian"))).value

    def off_grid(x: torch.Tensor) -> int:
        cells = x.double() / gamma
        return int((cells != cells.round()).sum())

    assert secure.dtype == torch.float32 and off_grid(secure) == 0
    assert off_grid(plain) > size / 2


def test_without_noise_only_the_rounding_is_left() -> None:
    """False: the rounded sum is not the nearest grid point."""
    private = torch.randn(999, dtype=torch.float32)
    released, std = add_secure_noise(private, 0.0, 0.2)
    assert std == 0 and (released.double() - private.double()).abs().max() <= grid(0.2, 999) / 2


def test_the_noise_is_the_gaussian_that_is_charged() -> None:
    """False: another scale (2/3, 3/2, sqrt 2 are rejected), another shape, correlated coordinates or repeated draws."""
    size = 200_000
    permit = _permit()
    first, second = (noise_gradient(torch.zeros(size), permit) for _ in range(2))
    expected = STEP.noise_multiplier * sensitivity(STEP.clip_norm, size)
    for noised in (first, second):
        assert noised.std == pytest.approx(expected, rel=1e-12)
        ratio = noised.value.double().std().item() / expected
        assert abs(ratio - 1) < 0.01
        assert all(abs(ratio - wrong) > 0.1 for wrong in (2 / 3, 3 / 2, math.sqrt(2), 1 / math.sqrt(2)))
        assert stats.kstest(noised.value.double().numpy() / expected, "norm").pvalue > 1e-6
        assert stats.kstest(1.05 * noised.value.double().numpy() / expected, "norm").pvalue < 1e-6  # it has power
        a = noised.value
        assert abs(torch.corrcoef(torch.stack([a[:-1], a[1:]]))[0, 1]) < 5 / math.sqrt(size)
    assert abs(torch.corrcoef(torch.stack([first.value, second.value]))[0, 1]) < 5 / math.sqrt(size)


def test_metrics_are_released_the_same_way_relative_to_their_own_bound() -> None:
    """False: metrics keep their float bits, or their noise is relative to C."""
    size, bound = 50_000, 2.0
    noised = noise_metrics(torch.zeros(size), _permit(), bound)
    assert noised.std == pytest.approx(4.0 * sensitivity(bound, size))
    assert abs(noised.value.std().item() / noised.std - 1) < 0.02
    cells = noised.value.double() / grid(bound, size)
    assert torch.equal(cells, cells.round())


def test_far_tails_follow_the_normal_and_have_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: values beyond some multiple of sigma are impossible, so that seeing none there tells something.

    The bytes are injected: `zeros` leading zero bits of the tail's uniform mean a tail probability of 2^-(zeros + 2).
    """
    words = [np.array([0], np.uint64), np.array([0], np.uint64), np.array([1 << 40], np.uint64)]  # 11 + 53 + 23 zeros
    monkeypatch.setattr(secure_noise.os, "urandom", lambda size: words.pop(0).tobytes())
    z = float(standard_normal(1)[0])
    assert z == pytest.approx(stats.norm.isf(2.0 ** -(11 + 53 + 23 + 2)), rel=1e-9) and z > 10.5
    monkeypatch.undo()
    drawn = standard_normal(2_000_000).abs()
    for sigmas in (2, 3, 4):
        p = 2 * stats.norm.sf(sigmas)
        assert abs(int((drawn > sigmas).sum()) - len(drawn) * p) < 6 * math.sqrt(len(drawn) * p)


def test_every_random_bit_is_asked_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: a seedable generator takes part, or fewer than 64 fresh bits make a coordinate."""
    asked = []

    def counted(size: int, real=os.urandom) -> bytes:
        asked.append(size)
        return real(size)

    monkeypatch.setattr(secure_noise.os, "urandom", counted)
    torch.manual_seed(0)
    np.random.seed(0)
    first = add_secure_noise(torch.zeros(1000), 1.0, 1.0)[0]
    assert sum(asked) >= 8 * 1000
    torch.manual_seed(0)
    np.random.seed(0)
    assert not torch.equal(first, add_secure_noise(torch.zeros(1000), 1.0, 1.0)[0])


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_does_not_fit_the_integers_is_refused_without_being_shown(poison: float) -> None:
    """False: an overflow wraps around and is released, or the error quotes a private value."""
    private = torch.tensor([0.123456, poison])
    with pytest.raises(OverflowError) as error:
        add_secure_noise(private, 1.0, 0.1)
    assert "0.123" not in str(error.value) and "30" not in str(error.value)
