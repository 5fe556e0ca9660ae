"""PPO (Schulman et al. 2017, arXiv 1707.06347) for language models, per trajectory.

The reward of token t is -kl_coef (log pi - log pi_ref)_t, and the scored reward is added at the last token (Ziegler et
al. 2019, arXiv 1909.08593, eq. 2). Advantages are GAE over that one trajectory (arXiv 1506.02438, eq. 16), never
whitened over the batch. Policy and value losses are one loss per record, so that one clip bounds both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dprlhf_ray.algorithms.base import Batch, clipped_surrogate, per_token_mean


@dataclass(frozen=True)
class PPO:
    clip_range: float = 0.2
    kl_coef: float = 0.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_coef: float = 0.1
    needs_value: bool = True

    def loss(self, batch: Batch) -> Tensor:
        if batch.values is None or batch.old_values is None:
            raise ValueError("PPO needs values: build the policy with value_head=True")
        rewards = token_rewards(batch, self.kl_coef)
        advantages, returns = gae(rewards, batch.old_values, batch.mask, self.gamma, self.gae_lambda)
        policy = clipped_surrogate(batch, advantages, self.clip_range)
        drift = (batch.values - batch.old_values).clamp(-self.clip_range, self.clip_range)
        value = 0.5 * (batch.values - returns).square().maximum((batch.old_values + drift - returns).square())
        return per_token_mean(policy + self.value_coef * value, batch.mask).mean(1)


def token_rewards(batch: Batch, kl_coef: float) -> Tensor:
    """(U, G, T): per-token KL penalty, the scored reward on each completion's last token."""
    rewards = torch.zeros_like(batch.old_log_probs)
    if kl_coef and batch.ref_log_probs is not None:
        rewards = -kl_coef * (batch.old_log_probs - batch.ref_log_probs) * batch.mask
    last = (batch.mask.sum(-1).long() - 1).clamp_min(0).unsqueeze(-1)
    return rewards.scatter_add(-1, last, batch.rewards.unsqueeze(-1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation along the last axis.

    All (..., T); the value after the last token is 0. Returns (advantages, returns = advantages + values), both zero
    where mask is zero, no gradient.
    """
    values = values.detach() * mask
    advantages = torch.zeros_like(values)
    carry = torch.zeros_like(values[..., 0])
    following = torch.zeros_like(carry)
    for t in range(values.shape[-1] - 1, -1, -1):
        delta = rewards[..., t] + gamma * following - values[..., t]
        carry = (delta + gamma * lam * carry) * mask[..., t]
        advantages[..., t] = carry
        following = values[..., t]
    return advantages, (advantages + values) * mask
