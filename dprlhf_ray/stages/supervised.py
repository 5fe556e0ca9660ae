"""Supervised losses per record: demonstrations for the policy, pairs for the reward model."""

from __future__ import annotations

import torch
from torch import Tensor

from dprlhf_ray.algorithms.base import per_token_mean
from dprlhf_ray.algorithms.bradley_terry import bradley_terry
from dprlhf_ray.config import RewardModelStage, SFTStage
from dprlhf_ray.models.policy import Policy
from dprlhf_ray.models.reward import RewardModel
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.stages.batching import MicroBatch
from dprlhf_ray.stages.metrics import Metrics
from dprlhf_ray.stages.objective import Draw, Objective


class SFTObjective(Objective):
    """Mean negative log-likelihood of a demonstration's own tokens, in nats."""

    def __init__(self, policy: Policy, stage: SFTStage, recorder: Recorder) -> None:
        super().__init__(policy, recorder, stage.privacy.clip_norm, Metrics.of(stage))

    def losses(self, draw: Draw, i: int, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        scored = self.model(batch.tokens, batch.prompt_lengths, batch.responses)
        loss = -per_token_mean(scored.log_probs.view(batch.mask.shape), batch.mask).squeeze(1)
        return loss, {"nll": loss}

    def quality(self, batch: MicroBatch) -> Tensor:
        """Mean log-likelihood per token, in nats."""
        with torch.no_grad():
            scored = self.model(batch.tokens, batch.prompt_lengths, batch.responses)
            return per_token_mean(scored.log_probs.view(batch.mask.shape), batch.mask).squeeze(1)


class PairObjective(Objective):
    """Bradley-Terry on a pair's two scores; both responses are one record."""

    def __init__(self, model: RewardModel, stage: RewardModelStage, recorder: Recorder) -> None:
        super().__init__(model, recorder, stage.privacy.clip_norm, Metrics.of(stage))

    def losses(self, draw: Draw, i: int, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self._scores(batch)
        margin = scores[:, 0] - scores[:, 1]
        return bradley_terry(scores), {"accuracy": _preferred(margin), "margin": margin}

    def quality(self, batch: MicroBatch) -> Tensor:
        """1 where the chosen response scores higher, 0 where lower."""
        with torch.no_grad():
            scores = self._scores(batch)
            return _preferred(scores[:, 0] - scores[:, 1])

    def _scores(self, batch: MicroBatch) -> Tensor:
        lengths = batch.prompt_lengths + batch.mask.flatten(0, 1).sum(-1).long()
        scores: Tensor = self.model(batch.tokens, lengths)
        return scores.view(-1, 2)


def _preferred(margin: Tensor) -> Tensor:
    """1, 0, or one half for a tie."""
    return 0.5 * (1.0 + margin.sign())
