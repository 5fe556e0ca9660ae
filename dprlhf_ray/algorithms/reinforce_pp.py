"""REINFORCE++ with a baseline (Hu et al. 2025, arXiv 2501.03262): rewards centred in their prompt's group, PPO's
clipped surrogate, KL (k2) in the loss.

Its normalisation over the global batch couples records. The mean of centred rewards over a batch is 0 anyhow; a public
constant, `advantage_scale`, stands for their deviation.
"""

from __future__ import annotations

from torch import Tensor

from dprlhf_ray.algorithms.base import Algorithm, Batch, group_centred


class ReinforcePP(Algorithm):
    def loss(self, batch: Batch) -> Tensor:
        return self.policy_loss(batch, group_centred(self.rewards(batch)).unsqueeze(-1))
