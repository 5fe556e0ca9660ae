"""Reinforcement learning's loss per record: an algorithm on sampled completions and their rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dprlhf_ray.algorithms import Batch, build
from dprlhf_ray.algorithms.base import per_token_mean
from dprlhf_ray.config import RLStage
from dprlhf_ray.models.adapters import PeftModel
from dprlhf_ray.models.policy import Policy, Scored
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.stages.batching import MicroBatch
from dprlhf_ray.stages.metrics import Metrics
from dprlhf_ray.stages.objective import Draw, Objective


def _known(behaviour: Tensor | None, old_log_probs: Tensor) -> Tensor | None:
    """A token whose log-probability nobody knows has weight 1: whether one is known is a record's own matter."""
    return None if behaviour is None else torch.where(behaviour.isnan(), old_log_probs, behaviour)


class RLObjective(Objective):
    """The configured algorithm.

    Args:
        policy: in eval mode.
        stage: its algorithm, clip norm, generation and scorer settings are used.
        recorder: instruments `policy`.
        reference: frozen start of the policy, where it cannot be had by switching an adapter off (full fine-tuning).
    """

    def __init__(self, policy: Policy, stage: RLStage, recorder: Recorder, reference: Policy | None = None) -> None:
        super().__init__(policy, recorder, stage.privacy.clip_norm, Metrics.of(stage))
        self.policy, self.stage = policy, stage
        self.algorithm = build(stage.algorithm, stage.generation.max_new_tokens)
        self._reference = reference
        if stage.algorithm.kl_coef and reference is None and not isinstance(policy.model, PeftModel):
            raise ValueError("kl_coef under full fine-tuning needs a frozen copy of the policy as reference")

    def losses(self, draw: Draw, i: int, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        now = self._score(self.policy, batch)
        if len(draw.kept) <= i:  # first update: the policy has not moved, no second forward
            values = None if now.values is None else now.values.detach()
            draw.kept.append((now.log_probs.detach(), values, self._reference_log_probs(batch)))
        old_log_probs, old_values, reference = (None if x is None else x.view(batch.mask.shape) for x in draw.kept[i])
        assert old_log_probs is not None
        loss = self.algorithm.loss(
            Batch(
                log_probs=now.log_probs.view(batch.mask.shape),
                old_log_probs=old_log_probs,
                ref_log_probs=reference,
                values=None if now.values is None else now.values.view(batch.mask.shape),
                old_values=old_values,
                rewards=batch.rewards,
                mask=batch.mask,
                baseline=draw.baseline,
                progress=(draw.attempt - 1) / self.stage.privacy.steps,
                behaviour_log_probs=_known(batch.behaviour, old_log_probs),
                finished=batch.finished,
            )
        )
        measured = {"reward": batch.rewards.mean(1), "length": batch.mask.sum(-1).mean(1)}
        if reference is not None:  # of the policy that drew the completions
            measured["kl"] = per_token_mean(old_log_probs - reference, batch.mask).mean(1)
        return loss, measured

    def quality(self, batch: MicroBatch) -> Tensor:
        return batch.rewards.mean(1)

    def _score(self, policy: Policy, batch: MicroBatch) -> Scored:
        temperature = self.stage.generation.temperature
        scored: Scored = policy(batch.tokens, batch.prompt_lengths, batch.responses, temperature)
        return scored

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
