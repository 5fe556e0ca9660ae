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

    def score(
        self, records: Sequence[tuple[str, str, float]], zero: float = 0.0, one: float = 1.0
    ) -> list[PrivateNumber | None]:
        """Rewards in [-reward_bound, reward_bound], one per (prompt, completion, penalty): the scorer's value less
        `zero`, divided by `one` (public constants), less the penalty. None where the record made the scorer fail.

        Raises:
            ScorerGone: an endpoint or a device gives no answer, whatever the record.
        """
        return score_records(self._scorer, records, self._bound, zero, one)

    def values(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """What the scorer says of PUBLIC (prompt, completion) texts, before it is standardised or clipped."""
        return self._scorer.score(pairs)

    def ping(self) -> bool:
        return True
