"""The certificate states what a run guarantees, all of it, and nothing for a run without noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.config import RunConfig
from dprlhf_ray.privacy.certificate import DatasetCost, certificate, readable, write_certificate
from dprlhf_ray.privacy.composition import Bound, Composition, Group, Part, compose
from dprlhf_ray.privacy.partitions import Units
from dprlhf_ray.privacy.planning import StagePlan, plan_stage

DP = {"epsilon": 4.0, "steps": 3, "expected_batch": 50}
CLIP_ONLY = {"mode": "clip_only", "steps": 3, "expected_batch": 50}
HEAD = "cd" * 32


def _config(*privacy: dict[str, Any], data: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    names = list(data or {"reviews": {}})
    stages = [{"name": f"stage{i}", "data": names[min(i, len(names) - 1)], "privacy": p} for i, p in enumerate(privacy)]
    return config_file.parse({"data": data or {"reviews": {}}, "stages": stages, **more})


def _plans(config: RunConfig) -> list[StagePlan]:
    return [plan_stage(s, 1000, dataset=config.dataset_of(s.data)) for s in config.stages]


def _ledger(plans: list[StagePlan], attempts: int = 3) -> dict[str, Any]:
    stages = {p.ledger_stage: {"dataset": p.dataset, "attempts": attempts} for p in plans}
    return {"head": HEAD, "seq": 7, "epoch": 2, "stages": stages}


def _costs(plans: list[StagePlan], units: dict[str, Units] | None = None) -> dict[str, DatasetCost]:
    """What an accountant would say that knows of these plans only."""
    found = {}
    for name in dict.fromkeys(p.dataset for p in plans if not p.public):
        parts = [Part(p.ledger_stage, p.step, (units or {}).get(p.stage)) for p in plans if p.dataset == name]
        composed = compose(parts, min(p.delta for p in plans if p.dataset == name))
        found[name] = DatasetCost(composed, composed)
    return found


def _certificate(*privacy: dict[str, Any], **more: Any) -> tuple[dict[str, Any], list[StagePlan]]:
    config = _config(*privacy, **more)
    plans = _plans(config)
    return certificate(config, plans, _ledger(plans), _costs(plans)), plans


def test_clip_only_is_never_certified_and_has_no_epsilon_anywhere() -> None:
    found, _ = _certificate(CLIP_ONLY)
    assert found["certified"] is False and "stage0" in found["voided_by"][0]
    data = found["data_sets"]["reviews"]
    assert found["stages"][0]["epsilon"] is None
    for cost in (data["run"], data["cumulative"], *data["partitions"], *data["run"]["groups"]):
        assert [v for k, v in cost.items() if k.startswith(("epsilon", "delta"))] == [None] * 4
    text = readable(found)
    assert "NOT CERTIFIED" in text and found["statement"] not in text and "no guarantee" in text


def test_one_stage_without_noise_voids_the_whole_run() -> None:
    """A private stage cannot make up for one that released the same data set's gradients without noise."""
    found, _ = _certificate(DP, CLIP_ONLY)
    assert found["certified"] is False
    assert found["data_sets"]["reviews"]["run"]["epsilon"] is None


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
    whole, early = (certificate(config, plans, _ledger(plans, n), _costs(plans)) for n in (3, 1))
    assert early["data_sets"] == whole["data_sets"]
    assert early["stages"][0]["attempts_charged"] == 1


def test_nothing_that_the_contract_demands_is_missing() -> None:
    found, plans = _certificate(DP)
    assert set(found) >= {
        "certified", "voided_by", "data_sets", "stages", "sampler", "noise", "metrics_released", "public",
        "accounting_mode", "ledger", "assumed", "excluded", "software",
    }  # fmt: skip
    stage = found["stages"][0]
    mechanism = stage["mechanism"]
    assert set(mechanism) >= {
        "sampling_rate", "noise_multiplier", "metric_noise_multiplier", "clip_norm", "updates_per_draw", "steps",
        "unit", "adjacency", "population",
    }  # fmt: skip
    assert mechanism == plans[0].step.parameters()
    assert set(stage["epsilon"]) == {"certified", "pld", "rdp"}
    assert stage["epsilon"]["certified"] == stage["epsilon"]["pld"] <= stage["epsilon_target"]
    assert stage["epsilon"]["pld"] <= stage["epsilon"]["rdp"]
    assert found["ledger"] == {"head": HEAD, "seq": 7, "epoch": 2, "anchored": False}
    assert set(found["public"]) >= {"model", "scorers"}
    data = found["data_sets"]["reviews"]
    assert set(data) >= {"role", "sources", "unit", "adjacency", "partitions", "run", "cumulative"}
    assert (data["role"], data["ledger_knows"]) == ("private", "this run only")
    assert data["partitions"][0]["units"] == 1000 and data["run"]["reason"] == "one stage"
    assert {"torch", "dp-accounting", "ray"} <= set(found["software"])


def test_a_shared_ledger_is_named_as_such() -> None:
    found, _ = _certificate(DP, ledger="postgresql://db/ledger", ledger_key="ledger.key")
    assert found["data_sets"]["reviews"]["ledger_knows"] == "all runs that share this ledger"


def test_the_cumulative_epsilon_of_the_ledger_stands_beside_that_of_the_run() -> None:
    """False: what other runs spent on the data set is left out, or takes the place of this run's own figure."""
    config = _config(DP, ledger="shared.db")
    plans = [plan_stage(config.stages[0], 1000, "a-run")]
    bound = Bound(9.5, 9.5, 11.25)
    both = Composition(bound, 1e-5, (Group(("old/stage0", "a-run/stage0"), bound),), "sequential: of two runs")
    found = certificate(config, plans, _ledger(plans), {"reviews": DatasetCost(_costs(plans)["reviews"].run, both)})
    data = found["data_sets"]["reviews"]
    cumulative = data["cumulative"]
    assert [cumulative[k] for k in ("epsilon", "epsilon_pld", "epsilon_rdp", "delta")] == [9.5, 9.5, 11.25, 1e-5]
    text = readable(found)
    assert data["run"]["epsilon"] <= 4.0 and "share this ledger: epsilon 9.5000" in text and "of two runs" in text
    assert data["stages_in_ledger"] == ["a-run/stage0"]
    assert (found["stages"][0]["stage"], found["stages"][0]["attempts_charged"]) == ("stage0", 3)


def test_both_files_are_written_and_tell_the_same(tmp_path: Path) -> None:
    config = _config(DP)
    plans = _plans(config)
    found = write_certificate(tmp_path, config, plans, _ledger(plans), _costs(plans))
    assert json.loads((tmp_path / "certificate.json").read_text()) == found
    text = (tmp_path / "certificate.md").read_text()
    assert f"epsilon {found['data_sets']['reviews']['run']['epsilon']:.4f}" in text and HEAD in text
    for line in [*found["excluded"], *found["assumed"], *found["metrics_released"].values(), found["noise"]]:
        assert line in text


def _units(letters: str) -> Units:
    return Units(frozenset(c.encode() * 16 for c in letters))


def test_two_disjoint_partitions_and_an_overlapping_stage() -> None:
    """A unit of the first pays for stages 0 and 2, one of the second for 1 and 2; the run costs the dearer of both."""
    data = {"reviews": {"partitions": {"first": 0.5, "second": 0.5}}}
    config = _config(DP, DP | {"epsilon": 2.0}, DP | {"epsilon": 1.0}, data=data)
    pairs = zip(config.stages, ("first", "second", None), strict=True)
    config = config.model_copy(update={"stages": tuple(s.model_copy(update={"partition": p}) for s, p in pairs)})
    plans = _plans(config)
    units = {"stage0": _units("ab"), "stage1": _units("cd"), "stage2": _units("abcd")}
    found = certificate(config, plans, _ledger(plans), _costs(plans, units))
    first, second, everybody = found["data_sets"]["reviews"]["partitions"]
    assert (first["partition"], second["partition"], everybody["partition"]) == ("first", "second", None)
    assert 4.0 < first["epsilon"] < 5.0 and 2.0 < second["epsilon"] < 3.0
    assert first["epsilon"] == everybody["epsilon"] == found["data_sets"]["reviews"]["run"]["epsilon"]
    text = readable(found)
    for p in (first, second):
        assert f"| reviews | {p['partition']} (0.5) | 1000 | {p['stages'][0]} | epsilon {p['epsilon']:.4f}" in text
    assert "parallel over groups" in text


def test_sources_of_one_declared_data_set_are_one_budget() -> None:
    """Two sources that paid from two budgets would each show half of what their people lose."""
    data = {"prompts": {"dataset": "people"}, "pairs": {"source": "pairs.jsonl", "dataset": "people"}}
    found, plans = _certificate(DP, DP, data=data)
    assert list(found["data_sets"]) == ["people"]
    people = found["data_sets"]["people"]
    assert set(people["sources"]) == {"prompts", "pairs"}
    assert plans[0].epsilon is not None and people["run"]["epsilon"] > plans[0].epsilon.pld * 1.1


def test_secure_noise_is_named_and_its_residue_is_not_excluded_for_nothing() -> None:
    plain, secure = _certificate(DP)[0], _certificate(DP | {"noise": "secure"})[0]
    assert "secure" in secure["noise"] and "secure" not in plain["noise"]
    assert any("finite precision" in e for e in plain["excluded"])
    assert not any("finite precision" in e for e in secure["excluded"])


def test_an_adaptive_stage_certifies_its_filter_and_not_its_plan() -> None:
    """What an adaptive stage really draws may differ from the plan, so that the plan's PLD is no bound."""
    config = _config(DP | {"accounting": "adaptive"})
    plans = _plans(config)
    gate = plans[0].filter
    assert gate is not None
    composed = compose([Part("stage0", plans[0].step, None, "", gate.alpha, gate.rho_budget)], 1e-5)
    found = certificate(config, plans, _ledger(plans), {"reviews": DatasetCost(composed, composed)})
    run, stage = found["data_sets"]["reviews"]["run"], found["stages"][0]
    assert found["accounting_mode"] == stage["accounting"] == "adaptive"
    assert run["epsilon"] == pytest.approx(4.0, rel=1e-6) and run["epsilon_pld"] is None
    assert stage["epsilon"]["certified"] == 4.0 > stage["epsilon"]["pld"]
    assert "epsilon 4.0000" in readable(found)


# ------------------------------------------------------------------------------------ public stages, users, scorers

PUBLIC = {"mode": "public", "steps": 2, "expected_batch": 50}
OPENINGS = {"source": "embedded:public-openings", "public": True}


def _run(stages: list[dict[str, Any]], data: dict[str, Any]) -> tuple[dict[str, Any], str]:
    config = config_file.parse({"data": data, "stages": stages})
    plans = _plans(config)
    found = certificate(config, plans, _ledger(plans), _costs(plans))
    return found, readable(found)


def test_a_public_stage_costs_nothing_voids_nothing_and_is_named() -> None:
    """False: a warm start on public data voids a private run, is charged to it, or hides what was declared public."""
    stages = [
        {"kind": "sft", "data": "openings", "privacy": PUBLIC, "heldout": "held"},
        {"kind": "rl", "data": "reviews", "privacy": DP},
    ]
    data = {"openings": OPENINGS, "reviews": {}, "held": {"source": "held.jsonl", "public": True}}
    found, text = _run(stages, data)
    alone, _ = _certificate(DP)
    assert found["certified"] and found["voided_by"] == []
    assert list(found["data_sets"]) == ["reviews"]
    assert found["data_sets"]["reviews"]["run"] == alone["data_sets"]["reviews"]["run"] | {
        "groups": [alone["data_sets"]["reviews"]["run"]["groups"][0] | {"stages": ["rl"]}]
    }
    for same in ("noise", "accounting_mode", "statement", "excluded"):
        assert found[same] == alone[same]
    free, private = found["stages"]
    assert (free["guarantee"], free["epsilon"], free["delta"], free["attempts_charged"]) == ("public", None, None, 3)
    assert (private["guarantee"], private["epsilon_target"]) == ("dp", 4.0)
    assert found["public"]["data sets"] == ["openings = embedded:public-openings", "held = held.jsonl"]
    assert found["public"]["held-out data sets"] == ["held"]
    assert found["post_processing"] == ["stage rl starts from what stage sft released"]
    assert "private/*" in found["metrics_released"] and "private/* of stage sft" in found["metrics_released"]
    assert "public: costs nothing" in text and "openings = embedded:public-openings" in text


def test_a_run_of_public_stages_is_certified_for_nothing_private_and_says_so() -> None:
    found, text = _run([{"kind": "sft", "data": "openings", "privacy": PUBLIC}], {"openings": OPENINGS})
    assert found["certified"] and found["data_sets"] == {} and found["voided_by"] == []
    assert found["statement"].startswith("Nothing private was read") and found["statement"] in text
    assert "differentially private" not in text and "no guarantee" not in text and "epsilon 0" not in text
    assert (found["noise"], found["accounting_mode"]) == ("none", "none")
    assert not any("finite precision" in e for e in found["excluded"])


def test_a_public_stage_does_not_make_up_for_a_control() -> None:
    stages = [{"kind": "sft", "data": "openings", "privacy": PUBLIC}, {"data": "reviews", "privacy": CLIP_ONLY}]
    found, text = _run(stages, {"openings": OPENINGS, "reviews": {}})
    assert not found["certified"] and len(found["voided_by"]) == 1 and "stage rl" in found["voided_by"][0]
    assert found["data_sets"]["reviews"]["run"]["epsilon"] is None and "NOT CERTIFIED" in text


def test_users_are_named_by_their_column_with_what_one_brings_to_a_draw() -> None:
    """False: whoever reads the certificate takes it for a guarantee of single records, or cannot tell whose."""
    data = {
        "pairs": {"source": "pairs.jsonl", "dataset": "people", "unit_column": "author"},
        "prompts": {"source": "prompts.jsonl", "dataset": "people", "unit_column": "user"},
    }
    users = DP | {"unit": "user", "records_per_draw": 7}
    stages = [
        {"kind": "reward_model", "data": "pairs", "privacy": users},
        {"kind": "rl", "data": "prompts", "privacy": DP | {"unit": "user", "records_per_user": 3}},
    ]
    found, text = _run(stages, data)
    people = found["data_sets"]["people"]
    assert people["unit"] == "user" and "author (pairs), user (prompts)" in people["unit_means"]
    first, second = found["stages"]
    assert "users are sampled" in first["records"] and "at most 7 of their own" in first["records"]
    assert "records are sampled" in second["records"] and "at most 3 records" in second["records"]
    assert first["mechanism"]["records_per_user"] is None and second["mechanism"]["records_per_user"] == 3
    assert [p["of"] for p in people["partitions"]] == ["user", "record"]
    assert any("a user is one person" in a for a in found["assumed"])
    for said in (people["unit_means"], first["records"], second["records"], "1000 records"):
        assert said in text
    record = _certificate(DP)[0]
    assert record["data_sets"]["reviews"]["unit_means"] == "one record" and record["stages"][0]["records"] is None
    assert not any("a user is" in a for a in record["assumed"])


def test_scorers_are_public_or_post_processing_or_leave_the_cluster() -> None:
    """False: a reward model of private pairs counts as public, or nobody is told that texts are sent away."""
    members = [
        {"kind": "reward_model", "stage": "judge"},
        {"kind": "classifier", "model": "org/sentiment", "label": "POSITIVE"},
        {"kind": "http", "url": "https://judge.example.org/v1?version=internal-7", "sends_private_text": True},
    ]
    stages = [
        {"kind": "reward_model", "name": "judge", "data": "reviews", "privacy": DP},
        {"kind": "rl", "data": "reviews", "privacy": DP, "scorer": {"kind": "ensemble", "members": members}},
    ]
    found, text = _run(stages, {"reviews": {}})
    assert found["certified"]
    assert found["public"]["scorers"] == ["classifier org/sentiment", "http judge.example.org"]
    assert found["post_processing"] == ["stage rl is scored by the reward model that stage judge released"]
    assert any("judge.example.org" in e and "leave the cluster" in e for e in found["excluded"])
    assert any("http scorers" in a for a in found["assumed"])
    assert "internal-7" not in text  # the host is all that a certificate says of an address
    plain = _certificate(DP)[0]
    assert not any("leave the cluster" in e for e in plain["excluded"]) and plain["post_processing"] == []
