"""What a stage learns from, and how it is evaluated: rollouts of an RL stage, or records that are there already."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from statistics import fmean, pstdev
from typing import Any, Protocol

from dprlhf_ray.actors.answers import answer
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.actors.learner_group import LearnerGroup
from dprlhf_ray.config import RLStage, ScorerConfig
from dprlhf_ray.errors import DprlhfError
from dprlhf_ray.evaluation.public import Evaluation
from dprlhf_ray.records import Completion, Experience, Prompt, Unit

PART = 16  # completions that a scorer gets with one call


class Source(Protocol):
    """measure: what `evaluate` measures, higher is better. prompts: texts of the public prompts that it uses. unit: the
    (mean, deviation) by which rewards are standardised, if they are: fixed by the first `evaluate`, or given before."""

    measure: str
    prompts: Sequence[str]
    unit: tuple[float, float] | None

    def collect(self, units: Sequence[Unit]) -> list[Unit]:
        """A draw, ready for the learners. PRIVATE."""
        ...

    def evaluate(self) -> Evaluation | None:
        """Of the present policy on public records; None: the stage has none."""
        ...


class Rollouts:
    """Completions by the fleet, rewards by the scorer."""

    measure = "reward"

    def __init__(self, stage: RLStage, fleet: Fleet, scorer: Any, public: Sequence[Prompt]) -> None:
        self._stage, self._fleet, self._scorer, self._public = stage, fleet, scorer, public
        self.prompts: Sequence[str] = [p.text for p in public]
        self.unit: tuple[float, float] | None = None

    def collect(self, units: Sequence[Unit]) -> list[Unit]:
        if self._stage.scorer.standardise and self.unit is None:
            raise RuntimeError("rewards have no unit yet: evaluate on public prompts first")
        prompts = [e.prompt for unit in units for e in unit]
        rows = self._generate(prompts, self._stage.algorithm.completions_per_prompt)
        done = iter(self._scored(prompts, rows))
        return [tuple(islice(done, len(unit))) for unit in units]

    def evaluate(self) -> Evaluation:
        rows = self._generate(self._public, 1)
        if self._stage.scorer.standardise and self.unit is None:
            pairs = [(p.text, c.text) for p, row in zip(self._public, rows, strict=True) for c in row]
            self.unit = _unit(self._ask_scorer("values", pairs))
        done = self._scored(self._public, rows)
        return Evaluation(  # a prompt that the engine cannot take has neither
            tuple(0.0 if r is None else r.reveal() for e in done for r in (*e.rewards, None)[:1]),
            tuple(text for e in done for text in (*(c.text for c in e.completions), "")[:1]),
        )

    def _generate(self, prompts: Sequence[Prompt], group: int) -> list[tuple[Completion, ...]]:
        """Completions of each prompt: none where a record causes a failure of its own."""
        usable = [p.token_ids for p in prompts if p.token_ids]
        drawn = iter(self._fleet.generate(usable, group) if usable else [])
        return [tuple(next(drawn)) if p.token_ids else () for p in prompts]

    def _scored(self, prompts: Sequence[Prompt], rows: Sequence[tuple[Completion, ...]]) -> list[Experience]:
        """One experience per prompt; one without completions is a null record."""
        texts = [
            (p.text, c.text, penalty(self._stage.scorer, c)) for p, row in zip(prompts, rows, strict=True) for c in row
        ]
        rewards = iter(self._ask_scorer("score", texts, *(self.unit or ())))
        return [Experience(p, row, tuple(islice(rewards, len(row)))) for p, row in zip(prompts, rows, strict=True)]

    def _ask_scorer(self, method: str, rows: Sequence[Any], *constants: float) -> list[Any]:
        """One value per row. In parts, all asked for at once: each has the time that a role has for an answer."""
        ask = getattr(self._scorer, method)
        calls = [ask.remote(rows[i : i + PART], *constants) for i in range(0, len(rows), PART)]
        return [value for call in calls for value in answer(self._scorer, "scorer", method, call)]


def _unit(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and deviation of what a scorer says of PUBLIC texts.

    Raises:
        DprlhfError: it says the same of all.
    """
    known = [x for x in values if x is not None and math.isfinite(x)]
    if len(known) < 2 or not (deviation := pstdev(known)):
        raise DprlhfError("scorer.standardise: the rewards of the public prompts do not differ: is the scorer trained?")
    return fmean(known), deviation


def penalty(scorer: ScorerConfig, completion: Completion) -> float:
    """Taken off a completion's reward before the clip: for its length, and for not having ended by itself."""
    return scorer.length_penalty * len(completion.token_ids) + scorer.missing_eos_penalty * (not completion.finished)


class Records:
    """Demonstrations or pairs: nothing has to be generated, and learners evaluate public ones."""

    def __init__(self, measure: str, learners: LearnerGroup, public: Sequence[Experience]) -> None:
        self.measure, self._learners, self._public = measure, learners, list(public)
        self.prompts: Sequence[str] = ()
        self.unit: tuple[float, float] | None = None

    def collect(self, units: Sequence[Unit]) -> list[Unit]:
        return list(units)

    def evaluate(self) -> Evaluation | None:
        if not self._public:
            return None
        return Evaluation(tuple(self._learners.call("evaluate", [(self._public,)] * self._learners.world)), ())
