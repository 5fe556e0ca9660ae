"""Gaussian noise whose low bits tell nothing: sum and noise are rounded to one public grid and added as integers.

What a textbook float Gaussian leaks: the low bits that x + Z can have in floating point depend on x (Mironov 2012,
CCS, "On significance of the least significant bits for differential privacy"; for Gaussians Holohan & Braghin 2021,
arXiv 2107.10138, and Jin et al. 2022, arXiv 2112.05307). Here, as in Mironov's snapping, low bits do not exist:

    released = gamma * (round(x / gamma) + round(Z / gamma)),    Z ~ N(0, (sigma (C + gamma sqrt(d)))^2)

with gamma a power of two, at most 2^-13 C / sqrt(d), chosen from the public C and d alone.

Proved: x / gamma is exact (a power of two), so x' = gamma round(x / gamma) lies on the grid, and two neighbours' x'
differ by at most C + gamma sqrt(d) in L2 (each coordinate moves by at most gamma / 2, twice): the noise is scaled to
that. As x' is on the grid, released = gamma round((x' + Z) / gamma): a rounding of an ideal Gaussian release, so
post-processing. Sums are exact in int64; every value is a multiple of gamma whatever x is; that a large multiple is
rounded to float32 is a function of the released integer alone.

Residue, not proved: the probabilities of the grid's cells are those of a float64 inverse CDF over uniforms with 53
significant bits at every magnitude. A quantile's relative error is about 2^-50, so a cell z sigmas out is wrong by
about z 2^-50 std / gamma of its probability (sigma = 1, z = 1: 2^-30 for d = 10^4, 2^-25 for d = 10^7). And x is a
float32 sum of float32 clips, which exceeds C by their rounding (about 1e-6 of C). An exact discrete Gaussian (Canonne
et al. 2020, arXiv 2004.00010) over integer-rounded records would remove both.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor

GRID = 2.0**-13  # gamma sqrt(d) is at most this share of the bound: what rounding adds to sigma
_LIMIT = 2.0**62  # of the integers, so that the sum of two fits int64
_BLOCK = 1 << 18  # coordinates at a time: memory only
_HEAD = 11  # bits of a word that begin the uniform's exponent


def grid(bound: float, dimension: int) -> float:
    """gamma: the largest power of two at most GRID * bound / sqrt(dimension)."""
    _, exponent = math.frexp(GRID * bound / math.sqrt(dimension))
    return math.ldexp(1.0, exponent - 1)


def sensitivity(bound: float, dimension: int) -> float:
    """L2 bound on one unit's influence on the rounded sum: bound + gamma sqrt(dimension)."""
    return bound + grid(bound, dimension) * math.sqrt(dimension)


def add_secure_noise(total: Tensor, std: float, bound: float) -> tuple[Tensor, float]:
    """Release a sum of vectors of L2 norm <= bound, on the grid.

    Args:
        total: (d,) float32 or float64. PRIVATE.
        std: sigma * bound, widened here as the grid widens the bound; 0 rounds to the grid and adds nothing.

    Returns:
        (the released sum, float32; the standard deviation of its noise, sigma (bound + gamma sqrt(d))).

    Raises:
        OverflowError: a coordinate is not finite or too large for the grid; nothing was released.
    """
    gamma, std = grid(bound, total.numel()), std * sensitivity(bound, total.numel()) / bound
    rounded = _to_integers(total.double() / gamma)
    if std:
        rounded += _integer_noise(total.numel(), std / gamma).to(total.device).view_as(rounded)
    return (rounded.double() * gamma).float(), std


def _integer_noise(count: int, scale: float) -> Tensor:
    """round(Z / gamma), int64; `scale` is the standard deviation over gamma."""
    drawn = torch.empty(count, dtype=torch.int64)
    for start in range(0, count, _BLOCK):
        block = drawn[start : start + _BLOCK]
        block.copy_(_to_integers(standard_normal(block.numel()) * scale))
    return drawn


def _to_integers(x: Tensor) -> Tensor:
    """Nearest integer, ties upwards: a rule that commutes with adding integers, which ties to even does not."""
    if not bool((x.abs() < _LIMIT).all()):  # NaN compares false
        raise OverflowError("secure noise: a coordinate does not fit the grid; nothing was released")
    return (x + 0.5).floor().long()


def standard_normal(count: int) -> Tensor:
    """(count,) float64 standard normals by inverse CDF, every random bit from the operating system.

    The one-sided tail probability is a float64 with a random exponent, so that it has 53 significant bits however
    small it is: the tail has no holes and no end that could be met.
    """
    words = _words(count)
    fraction = ((words >> np.uint64(1)) & np.uint64((1 << 52) - 1)).astype(np.float64)
    head = words >> np.uint64(64 - _HEAD)
    zeros = _HEAD - _bit_length(head)
    unsettled = np.flatnonzero(head == 0)
    while unsettled.size:
        more = _words(unsettled.size) >> np.uint64(11)  # 53 bits, which float64 holds
        zeros[unsettled] += 53 - _bit_length(more)
        unsettled = unsettled[more == 0]
    tail = np.ldexp(1.0 + fraction * 2.0**-52, -(zeros + 2))  # in (0, 1/2)
    quantile = torch.special.ndtri(torch.from_numpy(tail))  # negative
    return torch.where(torch.from_numpy((words & np.uint64(1)) == 1), quantile, -quantile)


def _words(count: int) -> np.ndarray:
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def _bit_length(x: np.ndarray) -> np.ndarray:
    """Of integers below 2^53."""
    return np.frexp(x.astype(np.float64))[1]
