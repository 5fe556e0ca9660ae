"""GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3): group-normalised advantages in PPO's clipped surrogate, KL in
the loss. With `advantage_scale` a public constant takes the place of the deviation (1: Dr. GRPO, arXiv 2503.20783).

Mean and deviation are those of one prompt's completions, which are one record: no statistic crosses records.
"""

from __future__ import annotations

from torch import Tensor

from dprlhf_ray.algorithms.base import Algorithm, Batch, group_centred


class GRPO(Algorithm):
    def loss(self, batch: Batch) -> Tensor:
        rewards = self.rewards(batch)
        advantages = group_normalised(rewards) if self.config.advantage_scale is None else group_centred(rewards)
        return self.policy_loss(batch, advantages.unsqueeze(-1))


def group_normalised(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within each prompt's group. (U, G) -> (U, G)."""
    return group_centred(rewards) / (rewards.std(1, keepdim=True) + eps)
