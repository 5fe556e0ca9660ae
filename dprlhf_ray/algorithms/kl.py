"""Estimates of KL(policy || reference) from sampled tokens (Schulman 2020, "Approximating KL divergence")."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def kl_per_token(estimator: Literal["k1", "k2", "k3"], log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """With d = log policy - log reference, the shape of its arguments:

    k1: d, unbiased, of both signs; its own gradient is zero in expectation, so it belongs into the reward.
    k2: d^2 / 2, biased as a value; its gradient is that of the next token's KL.
    k3: exp(-d) + d - 1, unbiased and never negative; its gradient is that of the next token's KL(reference || policy).
    (Of the gradients: Tang and Munos 2025, arXiv 2506.09477.)
    """
    d = log_probs - ref_log_probs
    match estimator:
        case "k1":
            return d
        case "k2":
            return 0.5 * d.square()
        case "k3":
            return torch.expm1(-d) + d
