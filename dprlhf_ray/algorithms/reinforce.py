"""REINFORCE (Williams 1992): -(R - b) log pi(y | x), averaged over the record's completions.

b is a public constant, or the mean reward that earlier steps released with noise: free to use, and it couples nobody.
"""

from __future__ import annotations

from torch import Tensor

from dprlhf_ray.algorithms.base import Algorithm, Batch


class Reinforce(Algorithm):
    def loss(self, batch: Batch) -> Tensor:
        advantages = self.rewards(batch) - batch.baseline
        return self.policy_loss(batch, advantages.unsqueeze(-1))
