"""The certificate states what a run guarantees, all of it, and nothing for a run without noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import config as cfg
from dprlhf_ray.config import RunConfig
from dprlhf_ray.privacy.accounting import EpsilonReport
from dprlhf_ray.privacy.certificate import certificate, readable, write_certificate
from dprlhf_ray.privacy.planning import StagePlan, plan_stage

DP = {"epsilon": 4.0, "steps": 3, "expected_batch": 50}
CLIP_ONLY = {"mode": "clip_only", "steps": 3, "expected_batch": 50}
HEAD = "cd" * 32


def _config(*privacy: dict[str, Any], data: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    names = list(data or {"reviews": {}})
    stages = [{"name": f"stage{i}", "data": names[min(i, len(names) - 1)], "privacy": p} for i, p in enumerate(privacy)]
    return cfg.parse({"data": data or {"reviews": {}}, "stages": stages, **more})


def _plans(config: RunConfig) -> list[StagePlan]:
    return [plan_stage(s, 1000) for s in config.stages]


def _ledger(plans: list[StagePlan], attempts: int = 3) -> dict[str, Any]:
    stages = {p.ledger_stage: {"dataset": p.dataset, "attempts": attempts} for p in plans}
    return {"head": HEAD, "epoch": 2, "stages": stages}


def _cumulative(plans: list[StagePlan]) -> dict[str, EpsilonReport | None]:
    """What a ledger would say that knows of the last plan of each data set only."""
    return {p.dataset: p.epsilon for p in plans}


def _certificate(*privacy: dict[str, Any], **more: Any) -> tuple[dict[str, Any], list[StagePlan]]:
    config = _config(*privacy, **more)
    plans = _plans(config)
    return certificate(config, plans, _ledger(plans), _cumulative(plans)), plans


def test_clip_only_is_never_certified_and_has_no_epsilon_anywhere() -> None:
    found, _ = _certificate(CLIP_ONLY)
    assert found["certified"] is False and "stage0" in found["voided_by"][0]
    data = found["data_sets"]["reviews"]
    assert found["stages"][0]["epsilon"] is None and data["run"] is None and data["cumulative"] is None
    text = readable(found)
    assert "NOT CERTIFIED" in text and found["statement"] not in text and "no guarantee" in text


def test_one_stage_without_noise_voids_the_whole_run() -> None:
    """A private stage cannot make up for one that released the same data set's gradients without noise."""
    found, _ = _certificate(DP, CLIP_ONLY)
    assert found["certified"] is False
    assert found["data_sets"]["reviews"]["run"] is None


def test_two_stages_on_one_data_set_cost_more_than_either_and_less_than_their_sum() -> None:
    """Sequential composition at one delta: taking the larger of the two would be parallel composition."""
    found, plans = _certificate(DP, DP | {"epsilon": 2.0})
    each = [p.epsilon.pld for p in plans if p.epsilon is not None]
    run = found["data_sets"]["reviews"]["run"]
    assert len(each) == 2 and run["delta"] == 1e-5
    assert max(each) * 1.01 < run["epsilon_pld"] < sum(each)


def test_stages_on_different_data_sets_are_stated_separately() -> None:
    found, plans = _certificate(DP, DP | {"epsilon": 2.0}, data={"reviews": {}, "letters": {}})
    for name, plan in zip(("reviews", "letters"), plans, strict=True):
        assert plan.epsilon is not None
        assert found["data_sets"][name]["run"]["epsilon_pld"] == pytest.approx(plan.epsilon.pld, rel=1e-3)


def test_a_run_that_stopped_early_certifies_the_planned_epsilon() -> None:
    """The number of attempts may depend on the data, so that fewer of them prove nothing less."""
    config = _config(DP)
    plans = _plans(config)
    whole, early = (certificate(config, plans, _ledger(plans, n), _cumulative(plans)) for n in (3, 1))
    assert early["data_sets"] == whole["data_sets"]
    assert early["stages"][0]["attempts_charged"] == 1


def test_nothing_that_the_contract_demands_is_missing() -> None:
    found, plans = _certificate(DP)
    assert set(found) >= {
        "certified", "voided_by", "data_sets", "stages", "sampler", "noise", "metrics_released", "public",
        "accounting_mode", "ledger", "excluded", "software",
    }  # fmt: skip
    stage = found["stages"][0]
    mechanism = stage["mechanism"]
    assert set(mechanism) >= {
        "sampling_rate", "noise_multiplier", "metric_noise_multiplier", "clip_norm", "updates_per_draw", "steps",
        "unit", "adjacency", "population",
    }  # fmt: skip
    assert mechanism == plans[0].step.parameters()
    assert set(stage["epsilon"]) == {"pld", "rdp"} and stage["epsilon"]["pld"] <= stage["epsilon_target"]
    assert stage["epsilon"]["pld"] <= stage["epsilon"]["rdp"]
    assert found["ledger"] == {"head": HEAD, "epoch": 2}
    assert set(found["public"]) >= {"model", "scorers"}
    data = found["data_sets"]["reviews"]
    assert (data["role"], data["records"], data["ledger_knows"]) == ("private", 1000, "this run only")
    assert {"torch", "dp-accounting", "ray"} <= set(found["software"])


def test_a_shared_ledger_is_named_as_such() -> None:
    found, _ = _certificate(DP, ledger="postgresql://db/ledger", ledger_key="ledger.key")
    assert found["data_sets"]["reviews"]["ledger_knows"] == "all runs that share this ledger"


def test_the_cumulative_epsilon_of_the_ledger_stands_beside_that_of_the_run() -> None:
    """False: what other runs spent on the data set is left out, or takes the place of this run's own figure."""
    config = _config(DP, ledger="shared.db")
    plans = [plan_stage(config.stages[0], 1000, "a-run")]
    all_runs = EpsilonReport(9.5, 11.25)
    found = certificate(config, plans, _ledger(plans), {"reviews": all_runs})
    data = found["data_sets"]["reviews"]
    assert data["cumulative"] == {"epsilon_pld": 9.5, "epsilon_rdp": 11.25, "delta": 1e-5}
    assert data["run"]["epsilon_pld"] <= 4.0 and "cumulative in this ledger: 9.5000" in readable(found)
    assert data["stages_in_ledger"] == ["a-run/stage0"]
    assert (found["stages"][0]["stage"], found["stages"][0]["attempts_charged"]) == ("stage0", 3)


def test_both_files_are_written_and_tell_the_same(tmp_path: Path) -> None:
    config = _config(DP)
    plans = _plans(config)
    found = write_certificate(tmp_path, config, plans, _ledger(plans), _cumulative(plans))
    assert json.loads((tmp_path / "certificate.json").read_text()) == found
    text = (tmp_path / "certificate.md").read_text()
    assert f"epsilon {found['data_sets']['reviews']['run']['epsilon_pld']:.4f}" in text and HEAD in text
    for excluded in found["excluded"]:
        assert excluded in text
