"""The private metrics of a draw: one vector per unit, each entry in [-1, 1], released as one noised sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dprlhf_ray.config import AnyStage

KL_BOUND = 0.5  # nats per token: a unit's mean log-ratio to the reference is clipped to +-this
NLL_BOUND = 8.0  # nats per token
MARGIN_BOUND = 4.0  # of a pair's two scores


@dataclass(frozen=True)
class Metrics:
    """Names and public scales (name -> what 1 stands for) of the entries."""

    scales: dict[str, float]

    @classmethod
    def of(cls, stage: AnyStage) -> Metrics:
        """What a stage of this kind releases, and the share of clipped units."""
        scales = {"clip_fraction": 1.0}
        if stage.kind == "rl":
            scales = {"reward": stage.scorer.reward_bound, "length": float(stage.generation.max_new_tokens), **scales}
            if stage.algorithm.kl_coef:
                scales["kl"] = KL_BOUND
        elif stage.kind == "sft":
            scales = {"nll": NLL_BOUND, **scales}
        else:
            scales = {"accuracy": 1.0, "margin": MARGIN_BOUND, **scales}
        return cls(scales)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.scales)

    @property
    def bound(self) -> float:
        """L2 bound of one unit's vector: sqrt(number of entries). A null unit's vector is 0."""
        return len(self.scales) ** 0.5

    def total(self, own: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """Sum over the units of a micro-batch. PRIVATE.

        Args:
            own: (units,) float by name, at least the names of the scales.
            valid: (units,) bool; False adds exactly zero.

        Returns:
            (entries,) float32.
        """
        per_unit = torch.stack([own[name] / scale for name, scale in self.scales.items()], dim=1)
        usable = valid & torch.isfinite(per_unit).all(1)  # masked first: 0 * NaN is NaN
        return torch.where(usable.unsqueeze(1), per_unit.clamp(-1.0, 1.0), torch.zeros_like(per_unit)).sum(0)
