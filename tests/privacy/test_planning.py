"""From a config to the DP step: the target is met, the metrics get their share, the right figure is certified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.config import RLStage
from dprlhf_ray.data.units import load_stage_data
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.planning import METRIC_NOISE_WITHOUT_EPSILON, composed, plan_stage, share


def stage(**privacy: Any) -> RLStage:
    settings = {"epsilon": 7.9, "expected_batch": 400, "steps": 15, "metrics_share": 0.01, **privacy}
    return RLStage.model_validate({"privacy": settings, "algorithm": {"kind": "ppo"}})


def test_the_quickstart_has_the_noise_that_its_report_was_measured_with() -> None:
    plan = plan_stage(stage(), 8990)
    assert plan.step.noise_multiplier == pytest.approx(0.530, abs=0.001)
    assert plan.step.metric_noise_multiplier == pytest.approx(5.27, abs=0.01)
    assert plan.epsilon is not None and 7.89 < plan.epsilon.pld <= 7.9
    assert plan.certified == plan.epsilon.pld and plan.filter is None


@pytest.mark.parametrize("updates", [1, 4])
@pytest.mark.parametrize("metrics", [0.0, 0.01, 0.5])
def test_gradient_and_metrics_share_the_precision_that_was_calibrated(updates: int, metrics: float) -> None:
    """False: the two together are charged with other noise than was calibrated, or the shares are not the config's."""
    split = share(plan_stage(stage(updates_per_draw=updates), 8990).step, 2.0, metrics)
    assert 2.0 <= split.effective_noise_multiplier < 2.0 * (1 + 1e-11)
    assert updates * split.noise_multiplier**-2 == pytest.approx((1 - metrics) / 4)
    if metrics:
        assert split.metric_noise_multiplier is not None
        assert split.metric_noise_multiplier**-2 == pytest.approx(metrics / 4)
    else:
        assert split.metric_noise_multiplier is None


def test_a_larger_share_costs_the_gradient_not_epsilon() -> None:
    plans = [plan_stage(stage(metrics_share=s, updates_per_draw=2), 8990) for s in (0.0, 0.3)]
    figures = [p.epsilon.pld for p in plans if p.epsilon is not None]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6) and max(figures) <= 7.9
    assert plans[0].step.noise_multiplier < plans[1].step.noise_multiplier


def test_clip_only_has_metrics_with_the_documented_noise_or_none() -> None:
    control = {"mode": "clip_only", "epsilon": None}
    assert plan_stage(stage(**control), 8990).step.metric_noise_multiplier == METRIC_NOISE_WITHOUT_EPSILON
    nothing = plan_stage(stage(**control, metrics_share=0.0), 8990)
    assert nothing.step.metric_noise_multiplier is None and nothing.certified is None


def test_adaptive_accounting_certifies_its_filter_and_all_planned_attempts_fit() -> None:
    """False: the certified epsilon is the schedule's, which nothing holds a later step to; or the plan overruns."""
    from dprlhf_ray.privacy.filter import rho

    plan = plan_stage(stage(accounting="adaptive"), 8990)
    assert plan.filter is not None and plan.epsilon is not None and plan.epsilon.rdp is not None
    assert plan.certified == 7.9 and plan.epsilon.pld < plan.epsilon.rdp <= 7.9
    assert plan.step.steps * rho(plan.step, plan.filter.alpha) <= plan.filter.rho_budget


def test_a_cap_is_part_of_the_step_and_costs_noise() -> None:
    free, capped = (plan_stage(stage(epsilon=0.05, max_batch=cap), 8990) for cap in (None, 450))
    assert capped.step.max_batch == 450 and capped.epsilon is not None and capped.epsilon.pld <= 0.05
    assert capped.step.noise_multiplier > free.step.noise_multiplier
    assert capped.epsilon == accounting.epsilon(capped.step, 1e-5)


def test_users_are_counted_as_users(tmp_path: Path, tiny_model: Path) -> None:
    """False: a user counts as as many as their records, and is drawn more often than the charged q says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"note {i}", "user": f"u{i % 10}"}) + "\n" for i in range(40)))
    data = {"notes": {"source": str(path), "unit_column": "user"}}
    privacy = {"unit": "user", "epsilon": 8.0, "delta": 1e-3, "expected_batch": 5, "steps": 2}
    for own, sampled, noun in (({}, 10, "users"), ({"records_per_user": 4}, 40, "records")):
        for batch in (5, sampled + 1):
            tree = {"data": data, "stages": [{"data": "notes", "privacy": privacy | own | {"expected_batch": batch}}]}
            config = config_file.parse(tree)
            size = len(load_stage_data(config, config.stages[0], tokenizer, bytes(32)).units)
            if batch > sampled:
                with pytest.raises(ConfigError, match=f"exceeds {sampled} {noun}"):
                    plan_stage(config.stages[0], size)
            else:
                step = plan_stage(config.stages[0], size).step
                assert (step.population, step.sampling_rate, step.unit) == (sampled, 5 / sampled, "user")


def test_a_plan_composes_stages_as_partitions_divide_their_units() -> None:
    """False: a user reads the figure of one stage where three compose, or pays for units that no stage shares."""
    data = {"notes": {"source": "n.jsonl", "unit_column": "id", "partitions": {"a": 0.5, "b": 0.5}},
            "more": {"source": "m.jsonl", "dataset": "notes"}}  # fmt: skip
    privacy = {"epsilon": 2.0, "delta": 1e-5, "expected_batch": 20, "steps": 5}
    where = {"x": ("notes", "a"), "y": ("notes", "b"), "z": ("notes", None), "w": ("more", None)}
    stages = [{"name": n, "data": d, "partition": p, "privacy": privacy} for n, (d, p) in where.items()]

    def cost(*names: str) -> float:
        config = config_file.parse({"data": data, "stages": [s for s in stages if s["name"] in names]})
        plans = [plan_stage(s, 2000, dataset=config.dataset_of(s.data)) for s in config.stages]
        (found,) = composed(config, plans).values()
        assert found.bound is not None
        return found.bound.epsilon

    one = cost("x")
    assert cost("x", "y") == one < cost("x", "z") == cost("x", "y", "z") < cost("x", "y", "z", "w")
    assert cost("x", "w") == pytest.approx(cost("x", "z"))  # rows without ids count for everybody
