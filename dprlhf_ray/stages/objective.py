"""What a stage feeds the DP step: clipped per-unit gradients of its loss, and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.privacy.private import Private
from dprlhf_ray.stages.batching import MicroBatch
from dprlhf_ray.stages.metrics import Metrics


@dataclass(repr=False)
class Draw(Private):
    """One rank's share of a draw, across its K updates. PRIVATE.

    kept: per micro-batch, what the objective computed at the first update and needs again.
    """

    batches: Sequence[MicroBatch]
    attempt: int
    baseline: float = 0.0
    kept: list[tuple[Tensor | None, ...]] = field(default_factory=list)


class Objective(ABC):
    """Sums clipped per-unit gradients of one stage's loss.

    Args:
        model: in eval mode.
        recorder: instruments `model`.
        clip_norm: C.
        metrics: what a draw releases beside the sum.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, clip_norm: float, metrics: Metrics) -> None:
        self.model, self.recorder, self.clip_norm, self.metrics = model, recorder, clip_norm, metrics

    @abstractmethod
    def quality(self, batch: MicroBatch) -> Tensor:
        """How good the present weights are, one number per record (U*R,), higher is better; no graph. PRIVATE, unless
        the records are public."""

    @abstractmethod
    def losses(self, draw: Draw, i: int, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Of micro-batch i: one loss per record (U*R,) that carries the graph, and metrics per record (U*R,) by name.

        Row r of every result depends on record r alone.
        """

    def clipped_sum(self, draw: Draw) -> tuple[ClippedSum, Tensor]:
        """One update's private sum over this rank's units: a unit's loss is the mean over its own records.

        Returns:
            (sum, metrics): metrics (entries,) float64, the sum over units of vectors bounded by `self.metrics.bound`.
        """
        device = next(self.model.parameters()).device
        total = ClippedSum(self.recorder.sizes, self.clip_norm, device)
        metrics = torch.zeros(len(self.metrics.names), dtype=torch.float64, device=device)
        for i, micro in enumerate(draw.batches):
            batch = micro.to(device)
            with self.recorder.record(batch.units, batch.rows_per_unit):
                loss, measured = self.losses(draw, i, batch)
                if loss.requires_grad:
                    batch.unit_mean(loss).sum().backward()  # a sum: unit u's loss reaches row block u only
                grads = self.recorder.take()
            clipped = total.add(grads, batch.valid)
            own = {name: batch.unit_mean(x.detach()) for name, x in measured.items()}
            metrics += self.metrics.total(own | {"clip_fraction": clipped.float()}, batch.valid)
        return total, metrics
