"""Clip every unit's gradient, then sum: the private sum that only the noise may leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dprlhf_ray.privacy.private import Private


class ClippedSum(Private):
    """Running sum over units of clip(g_u, C), in float64, over all trainable parameters as one vector.

    Guarantee: adding or nulling one unit changes `total` by at most C in L2 norm, whatever its gradient is. A unit
    whose gradient is not finite contributes exactly zero and touches nobody else (masked before any multiplication).

    Args:
        sizes: number of coordinates of each parameter; d = sum(sizes).
        clip_norm: C.
    """

    def __init__(self, sizes: Sequence[int], clip_norm: float, device: torch.device | str = "cpu") -> None:
        self.sizes = list(sizes)
        self.clip_norm = clip_norm
        # float64: which units share a micro-batch depends on the draw, and with it the rounding of partial sums
        self.total = torch.zeros(sum(sizes), dtype=torch.float64, device=device)

    def add(self, grads: Sequence[Tensor], valid: Tensor) -> Tensor:
        """Add a micro-batch.

        Args:
            grads: per parameter (units, *shape) float32, or an empty tensor where a parameter took no part.
            valid: (units,) bool; False for null records and padding: they add exactly zero.

        Returns:
            (units,) bool, PRIVATE: which units were scaled down (valid ones only).
        """
        units = valid.shape[0]
        flat = [g.reshape(units, -1) if g.numel() else None for g in grads]
        squared = sum(
            (f.square().sum(1) for f in flat if f is not None), start=torch.zeros_like(valid, dtype=torch.float32)
        )
        norms = squared.sqrt()
        usable = valid & torch.isfinite(norms)
        factor = torch.where(usable, (self.clip_norm / norms.clamp_min(1e-30)).clamp(max=1.0), torch.zeros_like(norms))
        bad = bool((~usable).any())
        offset = 0
        for f, size in zip(flat, self.sizes, strict=True):
            if f is not None:
                if bad:  # 0 * NaN is NaN
                    f = torch.where(usable.unsqueeze(1), f, torch.zeros_like(f))
                self.total[offset : offset + size] += (factor @ f).double()
            offset += size
        return usable & (factor < 1.0)
