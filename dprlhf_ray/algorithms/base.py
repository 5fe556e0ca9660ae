"""What a per-record policy loss sees, and the pieces that several losses share.

Rule of this room: row u of every result depends on unit u's rows only. Nothing is averaged, whitened or sorted across
units (see docs/guarantee.md, "what couples records").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dprlhf_ray.privacy.private import Private


@dataclass(frozen=True, repr=False)
class Batch(Private):
    """U units with G completions each, T response tokens (padded).

    log_probs: (U, G, T) float32, of the current policy, carries the graph.
    old_log_probs: (U, G, T), of the policy at the draw's first update (equal to log_probs then), detached.
    ref_log_probs: (U, G, T) of the frozen reference, or None when no KL is asked for.
    values, old_values: (U, G, T) from the value head, or None.
    rewards: (U, G) float32, clipped to a public bound.
    mask: (U, G, T) float32, 1 where a response token is.
    baseline: a public constant or a value already released with noise.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor | None
    values: Tensor | None
    old_values: Tensor | None
    rewards: Tensor
    mask: Tensor
    baseline: float


class Algorithm(Protocol):
    """A per-record loss. `needs_value`: wants the value head."""

    @property
    def needs_value(self) -> bool: ...

    def loss(self, batch: Batch) -> Tensor:
        """(U,) float32: one loss per unit, a function of that unit alone."""
        ...


def per_token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over a completion's own tokens: (U, G, T) -> (U, G). An empty completion gives 0."""
    return (x * mask).sum(-1) / mask.sum(-1).clamp_min(1.0)


def kl_k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Unbiased non-negative estimate of KL(policy || reference) per token: exp(d) - d - 1 with d = ref - policy
    (Schulman 2020, "Approximating KL divergence", k3). Same shape as its arguments."""
    d = ref_log_probs - log_probs
    return d.exp() - d - 1.0


def clipped_surrogate(batch: Batch, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's pessimistic surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), as a loss per token.

    advantages broadcast to (U, G, T); returns (U, G, T).
    """
    ratio = (batch.log_probs - batch.old_log_probs).exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return -(ratio * advantages).minimum(clipped * advantages)
