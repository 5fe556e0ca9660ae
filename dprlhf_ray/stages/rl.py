"""What reinforcement learning feeds the DP step: clipped per-record gradients of an algorithm's loss, and metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dprlhf_ray.algorithms import Batch, build
from dprlhf_ray.config import RLStage
from dprlhf_ray.models.adapters import PeftModel
from dprlhf_ray.models.policy import Policy, Scored
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.privacy.private import Private
from dprlhf_ray.stages.batching import MicroBatch
from dprlhf_ray.stages.metrics import Metrics


@dataclass(repr=False)
class Draw(Private):
    """One rank's share of a draw, across its K updates. PRIVATE."""

    batches: Sequence[MicroBatch]
    baseline: float
    old: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)  # log-probs and values at the first update
    reference: list[Tensor | None] = field(default_factory=list)


class RLObjective:
    """Sums clipped per-unit gradients of the configured algorithm.

    Args:
        policy: in eval mode.
        stage: its algorithm, clip norm, generation and scorer settings are used.
        recorder: instruments `policy`.
        reference: frozen start of the policy, where it cannot be had by switching an adapter off (full fine-tuning).
    """

    def __init__(self, policy: Policy, stage: RLStage, recorder: Recorder, reference: Policy | None = None) -> None:
        self.policy, self.stage, self.recorder = policy, stage, recorder
        self.algorithm = build(stage.algorithm)
        self.metrics = Metrics.of(stage)
        self._reference = reference
        if stage.algorithm.kl_coef and reference is None and not isinstance(policy.model, PeftModel):
            raise ValueError("kl_coef under full fine-tuning needs a frozen copy of the policy as reference")

    def clipped_sum(self, draw: Draw) -> tuple[ClippedSum, Tensor]:
        """One update's private sum over this rank's units.

        Returns:
            (sum, metrics): metrics (entries,) float64, the sum over units of vectors bounded by `self.metrics.bound`.
        """
        device = next(self.policy.parameters()).device
        total = ClippedSum(self.recorder.sizes, self.stage.privacy.clip_norm, device)
        metrics = torch.zeros(len(self.metrics.names), dtype=torch.float64, device=device)
        for i, micro in enumerate(draw.batches):
            batch = micro.to(device)
            with self.recorder.record(batch.valid.shape[0], batch.rewards.shape[1]):
                loss = self._loss(draw, i, batch)
                if loss.requires_grad:
                    loss.sum().backward()  # a sum: unit u's loss reaches row block u only
                grads = self.recorder.take()
            clipped = total.add(grads, batch.valid)
            metrics += self.metrics.total(batch, clipped, self._log_ratio(draw, i, batch))
        return total, metrics

    def _loss(self, draw: Draw, i: int, batch: MicroBatch) -> Tensor:
        now = self._score(self.policy, batch)
        shape = batch.mask.shape
        if len(draw.old) <= i:  # first update: the policy has not moved, no second forward
            draw.old.append((now.log_probs.detach(), None if now.values is None else now.values.detach()))
            draw.reference.append(self._reference_log_probs(batch))
        old_log_probs, old_values = draw.old[i]
        reference = draw.reference[i]

        def view(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.view(shape)

        return self.algorithm.loss(
            Batch(
                log_probs=now.log_probs.view(shape),
                old_log_probs=old_log_probs.view(shape),
                ref_log_probs=view(reference),
                values=view(now.values),
                old_values=view(old_values),
                rewards=batch.rewards,
                mask=batch.mask,
                baseline=draw.baseline,
            )
        )

    def _score(self, policy: Policy, batch: MicroBatch) -> Scored:
        return policy(batch.tokens, batch.prompt_lengths, batch.responses, self.stage.generation.temperature)

    def _reference_log_probs(self, batch: MicroBatch) -> Tensor | None:
        if not self.stage.algorithm.kl_coef:
            return None
        with torch.no_grad(), self._as_reference() as policy:
            return self._score(policy, batch).log_probs

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Policy]:
        """The frozen reference: the same model with its adapter off, or a frozen copy under full fine-tuning."""
        if self._reference is not None:
            yield self._reference
        else:
            with self.policy.model.disable_adapter():  # type: ignore[operator]
                yield self.policy

    @staticmethod
    def _log_ratio(draw: Draw, i: int, batch: MicroBatch) -> Tensor | None:
        """log pi - log pi_ref of the policy that drew the completions, where the loss has computed both."""
        reference = draw.reference[i]
        return None if reference is None else (draw.old[i][0] - reference).view(batch.mask.shape)
