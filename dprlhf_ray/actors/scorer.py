"""The scorer role: a plain class that the pipeline turns into a Ray actor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dprlhf_ray.config import ScorerConfig
from dprlhf_ray.privacy.private import PrivateNumber
from dprlhf_ray.stages.scoring import build_scorer, score_records


class ScorerActor:
    """Scores records one by one in effect; keeps nothing between calls.

    Args:
        models: folders of this run's exported reward models, by stage.
    """

    def __init__(self, config: ScorerConfig, models: Mapping[str, Path] | None = None) -> None:
        self._scorer = build_scorer(config, models)
        self._bound = config.reward_bound

    def score(self, records: Sequence[tuple[str, str, float]]) -> list[PrivateNumber | None]:
        """Rewards in [-reward_bound, reward_bound], one per (prompt, completion, penalty): the scorer's value less the
        penalty. None where the record made the scorer fail.

        Raises:
            ScorerGone: an endpoint gives no answer, whatever the record.
        """
        return score_records(self._scorer, records, self._bound)

    def ping(self) -> bool:
        return True
