"""Gaussian noise, drawn once per coordinate, only under a permit."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dprlhf_ray.privacy.permit import Permit
from dprlhf_ray.privacy.secure_noise import add_secure_noise


@dataclass(frozen=True)
class NoisedSum:
    """A released value: sum + N(0, std^2) per coordinate, or the secure rounding of it. `tag` names its permit."""

    value: Tensor
    std: float
    tag: str


def _normal(size: torch.Size, std: float, device: torch.device) -> Tensor:
    """Standard deviation `std`, in float64 (the noised sum is rounded once, to float32), from a generator that the
    operating system keys.

    Philox with a fresh 128-bit key. Not torch's own generator: on CPUs it keeps 32 bits of its seed, few enough to try
    them all against a published weight difference and to subtract the noise.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(secrets.randbits(256))))
    return torch.from_numpy(generator.standard_normal(tuple(size)) * std).to(device)


def noise_gradient(total: Tensor, permit: Permit) -> NoisedSum:
    """Add N(0, (sigma C)^2) to a clipped sum; uses up one of the permit's K updates.

    Raises:
        PermitRefused: the permit has no update left.
    """
    return _noised(total, permit.spend_update(), permit.clip_norm, permit)


def noise_metrics(total: Tensor, permit: Permit, bound: float) -> NoisedSum:
    """Add N(0, (sigma_m bound)^2) to the sum of per-unit metric vectors of L2 norm <= bound; once per permit.

    Raises:
        PermitRefused: the permit's metric release was used, or none was charged.
    """
    return _noised(total, permit.spend_metrics() * bound, bound, permit)


def _noised(total: Tensor, std: float, bound: float, permit: Permit) -> NoisedSum:
    if permit.noise == "secure":
        return NoisedSum(*add_secure_noise(total, std, bound), permit.tag)
    return NoisedSum((total + _normal(total.shape, std, total.device)).float(), std, permit.tag)
