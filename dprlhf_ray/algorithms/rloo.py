"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): the baseline of a completion is the mean reward of the same prompt's
other completions. It stays inside the record, so it couples nobody."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dprlhf_ray.algorithms.base import Batch
from dprlhf_ray.algorithms.reinforce import policy_gradient


@dataclass(frozen=True)
class RLOO:
    kl_coef: float = 0.0
    needs_value: bool = False

    def loss(self, batch: Batch) -> Tensor:
        return policy_gradient(batch, leave_one_out(batch.rewards), self.kl_coef)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean_{j != i} r_j (eq. 8). (U, G) -> (U, G); G >= 2."""
    g = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (g / (g - 1))
