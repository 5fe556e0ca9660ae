"""GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3): group-normalised advantages in PPO's clipped surrogate, KL in
the loss.

Mean and deviation are those of one prompt's completions, which are one record: no statistic crosses records.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dprlhf_ray.algorithms.base import Batch, clipped_surrogate, kl_k3, per_token_mean


@dataclass(frozen=True)
class GRPO:
    clip_range: float = 0.2
    kl_coef: float = 0.0
    needs_value: bool = False

    def loss(self, batch: Batch) -> Tensor:
        advantages = group_normalised(batch.rewards).unsqueeze(-1)
        per_token = clipped_surrogate(batch, advantages, self.clip_range)
        if self.kl_coef and batch.ref_log_probs is not None:
            per_token = per_token + self.kl_coef * kl_k3(batch.log_probs, batch.ref_log_probs)
        return per_token_mean(per_token, batch.mask).mean(1)


def group_normalised(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within each prompt's group. (U, G) -> (U, G)."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + eps)
