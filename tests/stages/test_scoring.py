"""Scorers: bounded, stateless, and one record's failure is its own."""

from __future__ import annotations

import math

import pytest

from dprlhf_ray.actors.scorer import ScorerActor
from dprlhf_ray.config import ScorerConfig
from dprlhf_ray.stages.scoring import PythonFunction, build_scorer, score_records


def test_sentiment_rule_orders_texts_and_reads_the_completion_only() -> None:
    scorer = build_scorer(ScorerConfig())
    good, bad = scorer.score("x", "a wonderful, brilliant film"), scorer.score("x", "a terrible, boring mess")
    assert -1 <= bad < 0 < good <= 1
    assert scorer.score("terrible", "a wonderful, brilliant film") == good
    assert scorer.score("x", "") == 0


def test_one_failing_record_gives_none_and_leaves_the_others_and_the_log_alone(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def score(prompt: str, completion: str) -> float:
        return {"nan": math.nan, "inf": math.inf, "big": 9.0, "small": -9.0, "ok": 0.5}[completion]

    pairs = [("p", c) for c in ("ok", "private-text", "nan", "inf", "big", "small", "ok")]
    scores = [None if r is None else r.reveal() for r in score_records(PythonFunction(score), pairs, 2.0)]
    assert scores == [0.5, None, None, None, 2.0, -2.0, 0.5]
    assert "".join(capfd.readouterr()) + caplog.text == ""


def test_actor_scores_with_the_function_that_the_config_names() -> None:
    actor = ScorerActor(ScorerConfig(kind="python", function="math:pow"))
    assert actor.ping()
    assert actor.score([("a", "b")]) == [None]  # pow of texts fails: the record is null, the actor lives
