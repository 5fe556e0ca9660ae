"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): the baseline of a completion is the mean reward of the same prompt's
other completions. It stays inside the record, so it couples nobody."""

from __future__ import annotations

from torch import Tensor

from dprlhf_ray.algorithms.base import Algorithm, Batch, group_centred


class RLOO(Algorithm):
    def loss(self, batch: Batch) -> Tensor:
        return self.policy_loss(batch, leave_one_out(self.rewards(batch)).unsqueeze(-1))


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean_{j != i} r_j (eq. 8). (U, G) -> (U, G); G >= 2."""
    g = rewards.shape[1]
    return group_centred(rewards) * (g / (g - 1))
