"""PPO (Schulman et al. 2017, arXiv 1707.06347) for language models, per trajectory.

The reward of token t is -kl_coef (log pi - log pi_ref)_t, and the scored reward is added at the last token (Ziegler et
al. 2019, arXiv 1909.08593, eq. 2), unless the KL is put into the loss. Advantages are GAE over that one trajectory
(arXiv 1506.02438, eq. 16), never whitened over the batch. Policy and value losses are one loss per record, so that one
clip bounds both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dprlhf_ray.algorithms.base import Algorithm, Batch


class PPO(Algorithm):
    needs_value = True

    def loss(self, batch: Batch) -> Tensor:
        if batch.values is None or batch.old_values is None:
            raise ValueError("PPO needs values: build the policy with value_head=True")
        c = self.config
        advantages, returns = gae(self.token_rewards(batch), batch.old_values, batch.mask, c.gamma, c.gae_lambda)
        drift = (batch.values - batch.old_values).clamp(-c.clip_range, c.clip_range)
        value = 0.5 * (batch.values - returns).square().maximum((batch.old_values + drift - returns).square())
        return self.policy_loss(batch, advantages) + c.value_coef * self.reduce(value, batch.mask)

    def token_rewards(self, batch: Batch) -> Tensor:
        """(U, G, T): the KL penalty of each token where it is in the reward, the scored reward on the last token."""
        rewards = torch.zeros_like(batch.old_log_probs)
        if self.config.kl_place == "reward" and self.config.kl_coef:
            rewards = -self.kl_penalty(batch, batch.old_log_probs) * batch.mask
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
