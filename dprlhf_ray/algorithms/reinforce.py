"""REINFORCE (Williams 1992): -(R - b) log pi(y | x), averaged over the record's completions.

b is a public constant, or the mean reward that earlier steps released with noise: free to use, and it couples nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dprlhf_ray.algorithms.base import Batch, kl_k3, per_token_mean


@dataclass(frozen=True)
class Reinforce:
    kl_coef: float = 0.0
    needs_value: bool = False

    def loss(self, batch: Batch) -> Tensor:
        return policy_gradient(batch, batch.rewards - batch.baseline, self.kl_coef)


def policy_gradient(batch: Batch, advantages: Tensor, kl_coef: float) -> Tensor:
    """-A mean_t log pi(y_t) (+ kl_coef KL), mean over G. advantages (U, G) -> (U,).

    The ratio to the draw's first policy makes the gradient right for later updates on the same draw (K > 1); at the
    first update it is 1.
    """
    ratio = (batch.log_probs - batch.old_log_probs).exp()
    loss = -per_token_mean(ratio * advantages.unsqueeze(-1), batch.mask)
    if kl_coef and batch.ref_log_probs is not None:
        loss = loss + kl_coef * per_token_mean(kl_k3(batch.log_probs, batch.ref_log_probs), batch.mask)
    return loss.mean(1)
