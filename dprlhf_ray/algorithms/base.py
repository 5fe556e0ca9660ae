"""What a per-record policy loss sees, and what all kinds share: surrogate, importance weights, KL and normalisation.

Rule of this room: row u of every result depends on record u's rows only. Nothing is averaged, whitened or sorted across
records (see docs/guarantee.md, "what couples records").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dprlhf_ray.algorithms.kl import kl_per_token
from dprlhf_ray.config import AlgorithmConfig
from dprlhf_ray.privacy.private import Private


@dataclass(frozen=True, repr=False)
class Batch(Private):
    """U records with G completions each, T response tokens (padded).

    log_probs: (U, G, T) float32, of the current policy, carries the graph.
    old_log_probs: (U, G, T), of the policy at the draw's first update (equal to log_probs then), detached.
    ref_log_probs: (U, G, T) of the frozen reference, or None when no KL is asked for.
    values, old_values: (U, G, T) from the value head, or None.
    rewards: (U, G) float32, clipped to a public bound.
    mask: (U, G, T) float32, 1 where a response token is.
    baseline: a public constant or a value already released with noise.
    progress: (attempt - 1) / T in [0, 1), public.
    behaviour_log_probs: (U, G, T), of the policy that drew the completions; None where it is the old one.
    finished: (U, G) float32, 1 where a completion ended by itself; None where unknown.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor | None
    values: Tensor | None
    old_values: Tensor | None
    rewards: Tensor
    mask: Tensor
    baseline: float
    progress: float = 0.0
    behaviour_log_probs: Tensor | None = None
    finished: Tensor | None = None


class Algorithm(ABC):
    """A per-record loss. `needs_value`: wants the value head.

    Args:
        config: public constants.
        max_new_tokens: public bound on a completion's tokens.
    """

    needs_value: ClassVar[bool] = False

    def __init__(self, config: AlgorithmConfig, max_new_tokens: int) -> None:
        self.config, self.max_new_tokens = config, max_new_tokens

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """(U,) float32: one loss per record, a function of that record alone.

        Raises:
            ValueError: the config asks for something that the batch does not hold.
        """

    def policy_loss(self, batch: Batch, advantages: Tensor) -> Tensor:
        """Surrogate of the advantages, (U, G, 1) or (U, G, T) without a graph, and the KL where it is in the loss:
        (U,)."""
        per_token = self._surrogate(batch, advantages / (self.config.advantage_scale or 1.0))
        if batch.behaviour_log_probs is not None:
            weights = importance_weights(batch.old_log_probs, batch.behaviour_log_probs, self.config.importance_cap)
            per_token = per_token * weights
        if self.config.mask_truncated:
            if batch.finished is None:
                raise ValueError("mask_truncated needs to know which completions finished")
            per_token = per_token * batch.finished.unsqueeze(-1)
        if self.config.kl_place == "loss" and self.config.kl_coef:
            per_token = per_token + self.kl_penalty(batch, batch.log_probs)
        return self.reduce(per_token, batch.mask)

    def rewards(self, batch: Batch) -> Tensor:
        """(U, G) scored rewards, less the KL penalty where it is in the reward.

        It is the sum over a completion's tokens: sum_t log(pi / pi_ref)_t is the log-ratio of the whole completion, so
        that E[reward] has the KL of the two distributions over completions in it (Ahmadian et al. 2024, arXiv
        2402.14740, section 2). A mean would make the penalty weaker for longer completions.
        """
        if self.config.kl_place != "reward" or not self.config.kl_coef:
            return batch.rewards
        return batch.rewards - (self.kl_penalty(batch, batch.old_log_probs) * batch.mask).sum(-1)

    def kl_penalty(self, batch: Batch, log_probs: Tensor) -> Tensor:
        """Coefficient times the estimate per token (U, G, T); under a schedule a function of public progress alone."""
        if batch.ref_log_probs is None:
            raise ValueError("kl_coef needs log-probabilities of the reference")
        left = 1.0 - batch.progress if self.config.kl_schedule == "linear" else 1.0
        return self.config.kl_coef * left * kl_per_token(self.config.kl_kind, log_probs, batch.ref_log_probs)

    def reduce(self, x: Tensor, mask: Tensor) -> Tensor:
        """A loss per token as a loss per record, by the record's own or public numbers: (U, G, T) -> (U,).

        own_length: GRPO's (arXiv 2402.03300, eq. 3). group_tokens: DAPO's token-level loss (arXiv 2503.14476, eq. 8),
        over one prompt's completions and not the batch's. max_length: Dr. GRPO's constant (arXiv 2503.20783). sum:
        REINFORCE's. A truncated completion that is masked still counts in the denominators.
        """
        match self.config.normalisation:
            case "own_length":
                return per_token_mean(x, mask).mean(1)
            case "group_tokens":
                return (x * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1.0)
            case "max_length":
                return (x * mask).sum(-1).mean(1) / self.max_new_tokens
            case "sum":
                return (x * mask).sum(-1).mean(1)

    def _surrogate(self, batch: Batch, advantages: Tensor) -> Tensor:
        """-ratio A per token (U, G, T). The ratio to the draw's first policy makes the gradient right for later updates
        on the same draw (K > 1); at the first it is 1. PPO and its kin take the worse of it and the clipped one
        (Schulman et al. 2017, arXiv 1707.06347, eq. 7; two ranges: arXiv 2503.14476, eq. 8)."""
        ratio = (batch.log_probs - batch.old_log_probs).exp()
        if self.config.kind not in AlgorithmConfig.CLIPPED:
            return -ratio * advantages
        low, high = self.config.clip_range, self.config.clip_range_high or self.config.clip_range
        return -(ratio * advantages).minimum(ratio.clamp(1.0 - low, 1.0 + high) * advantages)


def per_token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over a completion's own tokens: (U, G, T) -> (U, G). An empty completion gives 0."""
    return (x * mask).sum(-1) / mask.sum(-1).clamp_min(1.0)


def importance_weights(old_log_probs: Tensor, behaviour_log_probs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_behaviour, cap) per token, the shape of its arguments, which carry no graph.

    Truncated as in IMPALA (Espeholt et al. 2018, arXiv 1802.01561, section 4.1); it multiplies a surrogate whose ratio
    is to the old policy, as in decoupled PPO (Hilton et al. 2022, arXiv 2110.00641; AReaL, arXiv 2505.24298). A
    token's weight, not a completion's: the product over many tokens would be at the cap, or 0.
    """
    return (old_log_probs - behaviour_log_probs).exp().clamp(max=cap)


def group_centred(rewards: Tensor) -> Tensor:
    """r - mean over the same prompt's completions. (U, G) -> (U, G)."""
    return rewards - rewards.mean(1, keepdim=True)
