"""The scorer role: a plain class that the pipeline turns into a Ray actor."""

from __future__ import annotations

from collections.abc import Sequence

from dprlhf_ray.config import ScorerConfig
from dprlhf_ray.privacy.private import PrivateNumber
from dprlhf_ray.stages.scoring import build_scorer, score_records


class ScorerActor:
    """Scores (prompt, completion) pairs record by record; keeps nothing between calls."""

    def __init__(self, config: ScorerConfig) -> None:
        self._scorer = build_scorer(config)
        self._bound = config.reward_bound

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[PrivateNumber | None]:
        """Rewards in [-reward_bound, reward_bound], one per pair; None where the record made the scorer fail."""
        return score_records(self._scorer, pairs, self._bound)

    def ping(self) -> bool:
        return True
