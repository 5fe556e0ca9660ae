"""The private metrics of a draw: one vector per unit, each entry in [-1, 1], released as one noised sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dprlhf_ray.algorithms.base import per_token_mean
from dprlhf_ray.config import RLStage
from dprlhf_ray.stages.batching import MicroBatch

KL_BOUND = 0.5  # nats per token: a unit's mean log-ratio to the reference is clipped to +-this


@dataclass(frozen=True)
class Metrics:
    """Names and public scales (name -> what 1 stands for) of the entries."""

    scales: dict[str, float]

    @classmethod
    def of(cls, stage: RLStage) -> Metrics:
        """Mean reward, completion length, share of clipped units, and KL where the loss has a reference to hold."""
        scales = {
            "reward": stage.scorer.reward_bound,
            "length": float(stage.generation.max_new_tokens),
            "clip_fraction": 1.0,
        }
        return cls(scales | ({"kl": KL_BOUND} if stage.algorithm.kl_coef else {}))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.scales)

    @property
    def bound(self) -> float:
        """L2 bound of one unit's vector: sqrt(number of entries). A null unit's vector is 0."""
        return len(self.scales) ** 0.5

    def total(self, batch: MicroBatch, clipped: Tensor, log_ratio: Tensor | None) -> Tensor:
        """Sum over the units of a micro-batch. PRIVATE.

        Args:
            clipped: (units,) bool, whose gradient was scaled down.
            log_ratio: (units, G, T) of the policy that drew the completions to the reference: log pi - log pi_ref.

        Returns:
            (entries,) float32.
        """
        own = {
            "reward": batch.rewards.mean(1),
            "length": batch.mask.sum(-1).mean(1),
            "clip_fraction": clipped.float(),
        }
        if log_ratio is not None:
            own["kl"] = per_token_mean(log_ratio, batch.mask).mean(1)
        per_unit = torch.stack([own[name] / scale for name, scale in self.scales.items()], dim=1)
        usable = batch.valid & torch.isfinite(per_unit).all(1)  # masked first: 0 * NaN is NaN
        return torch.where(usable.unsqueeze(1), per_unit.clamp(-1.0, 1.0), torch.zeros_like(per_unit)).sum(0)
