"""Sources of a config against each other: nothing is private and public at once, or paid for under two names or ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.data.preflight import Facts, preflight
from dprlhf_ray.errors import ConfigError

PRIVATE = {"epsilon": 8.0, "delta": 1e-5, "expected_batch": 10}
PUBLIC = {"mode": "public", "expected_batch": 10}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    rows = [{"text": f"note {i}", "prompt": "a", "completion": "b", "who": i % 30, "row": i} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(model: Path, data: dict[str, Any], *stages: dict[str, Any], **more: Any) -> Facts:
    small = {"prompt_tokens": 5, "max_completion_tokens": 24}
    tree = {
        "model": {"name": str(model)},
        "rollout": {"max_model_len": 64},
        "data": {name: {**small, **settings} for name, settings in data.items()},
        "stages": [{"name": f"s{i}", "privacy": PRIVATE, **s} for i, s in enumerate(stages)],
        **more,
    }
    return preflight(config_file.parse(tree), available_gib=64.0)


def line(*args: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        check(*args, **more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_one_data_set_of_pairs_serves_all_kinds_beside_public_ones(tiny_model: Path) -> None:
    """False: the whole pipeline, with public SFT data and held-out pairs, would be refused."""
    data = {
        "pairs": {"source": "embedded:review-pairs", "partitions": {"a": 0.4, "b": 0.3, "c": 0.3}},
        "openings": {"source": "embedded:public-openings", "public": True},
        "held": {"source": "embedded:public-pairs", "public": True},
    }
    kinds = {"warm": "sft", "sft": "sft", "rm": "reward_model", "rl": "rl"}
    stages = [{"name": name, "kind": kind, "data": "pairs"} for name, kind in kinds.items()]
    stages[0] |= {"data": "openings", "privacy": PUBLIC}
    stages[1] |= {"partition": "a", "heldout": "openings"}
    stages[2] |= {"partition": "b", "heldout": "held"}
    facts = check(tiny_model, data, *stages)
    assert facts.populations == {"pairs": 4345, "openings": 800, "held": 400} and facts.population == 800
    stages[1]["data"], data["reviews"] = "reviews", {"source": "embedded:movie-reviews", "partitions": {"a": 0.5}}
    assert "are one source" in line(tiny_model, data, *stages)


@pytest.mark.parametrize(
    ("private", "public"),
    [
        ("embedded:review-pairs", "embedded:movie-reviews"),
        ("embedded:public-pairs", "embedded:public-openings"),
    ],
)
def test_a_pair_s_snippets_are_the_same_data_as_the_pair(tiny_model: Path, private: str, public: str) -> None:
    """False: the rows that private pairs are made of could be shown as public, or be partitioned by another id."""
    other = {"evaluation": {"source": "embedded:public-openings" if "review" in private else "embedded:movie-reviews"}}
    mine, stage = {"source": private}, {"data": "mine", "kind": "sft"}
    assert "cannot be both" in line(tiny_model, {"mine": mine, "x": {"source": public, "public": True}}, stage, **other)
    assert "needs public prompts" in line(tiny_model, {"mine": mine}, stage, evaluation={"source": public})
    both = {"mine": {**mine, "dataset": "d"}, "x": {"source": public, "dataset": "d"}}
    assert "two kinds of ids" in line(tiny_model, both, stage, **other)


def test_a_file_is_private_or_public_however_its_path_is_written(tiny_model: Path, notes: Path) -> None:
    alias = notes.parent / "link.jsonl"
    alias.symlink_to(notes)
    stage = {"data": "mine", "kind": "sft", "privacy": {**PRIVATE, "delta": 1e-3}}
    mine, shown = {"source": str(notes)}, {"source": str(notes.parent / ".." / notes.parent.name / "link.jsonl")}
    assert "cannot be both" in line(tiny_model, {"mine": mine, "x": {**shown, "public": True}}, stage)
    rejected = {**mine, "rejected": "public", "rejected_source": shown["source"]}
    says = "data.mine.rejected_source: " + str(notes) + " is also the private data set 'mine'"
    assert line(tiny_model, {"mine": rejected}, stage).startswith(says)
    public = {"mine": {**mine, "public": True}}
    assert check(tiny_model, public, {**stage, "privacy": PUBLIC}, evaluation=shown).populations == {"mine": 90}


def test_splits_of_a_hub_data_set_are_different_data(tiny_model: Path) -> None:
    """False: training on one split and evaluating on another is refused, or the same split may be both."""
    mine, stage = {"mine": {"source": "org/films", "split": "train"}}, {"data": "mine"}
    test = {"source": "org/films", "split": "test"}
    assert check(tiny_model, {**mine, "x": {**test, "public": True}}, stage, evaluation=test).population is None
    assert "needs public prompts" in line(tiny_model, mine, stage, evaluation={**test, "split": "train"})
    assert "needs public prompts" in line(tiny_model, mine, stage, evaluation={"source": "Org/Films", "split": "train"})
    assert "cannot be both" in line(tiny_model, {**mine, "x": {"source": "org/films", "public": True}}, stage)


def test_users_are_counted_where_they_are_the_unit(tiny_model: Path, notes: Path) -> None:
    """False: q would be that of records, while users are drawn."""
    data = {"mine": {"source": str(notes), "unit_column": "who"}}
    user = {**PRIVATE, "unit": "user", "delta": 1e-3}
    assert check(tiny_model, data, {"data": "mine", "privacy": user}).populations == {"mine": 30}
    sampled = {**user, "records_per_user": 2}
    assert check(tiny_model, data, {"data": "mine", "privacy": sampled}).populations == {"mine": 90}
    many = {**user, "expected_batch": 31}
    assert "'mine' has 30 users: use at most 30" in line(tiny_model, data, {"data": "mine", "privacy": many})
    large = {**user, "delta": 0.04}
    assert "(30 users): use a smaller delta" in line(tiny_model, data, {"data": "mine", "privacy": large})
    mixed = [{"data": "mine", "privacy": p} for p in (user, {**user, "unit": "record"})]
    assert "on the same data set 'mine' has unit user: one data set has one unit" in line(tiny_model, data, *mixed)
    assert "have one id in column 'who'" in line(tiny_model, data, mixed[1])


def test_one_file_by_two_columns_of_ids_is_refused(tiny_model: Path, notes: Path) -> None:
    """False: a unit would have two places, and two partitions that hold it be composed in parallel."""
    twice = {name: {"source": str(notes), "unit_column": name, "dataset": "d"} for name in ("row", "who")}
    stage = {"data": "row", "privacy": {**PRIVATE, "delta": 1e-3}}
    assert "data.who: one source under two kinds of ids, row and who" in line(tiny_model, twice, stage)


def test_columns_are_checked_for_every_kind_and_held_out_data_too(tiny_model: Path, notes: Path) -> None:
    stage = {"data": "mine", "kind": "reward_model", "privacy": {**PRIVATE, "delta": 1e-3}}
    assert "no column 'chosen'" in line(tiny_model, {"mine": {"source": str(notes)}}, stage)
    pairs = {"mine": {"source": "embedded:review-pairs"}, "held": {"source": str(notes), "public": True}}
    held = {**stage, "privacy": PRIVATE, "heldout": "held"}
    assert str(notes) in line(tiny_model, pairs, held)
    missing = {"rejected": "public", "rejected_source": str(notes.parent / "none.jsonl")}
    assert "no such file" in line(tiny_model, {"mine": {"source": str(notes), **missing}}, {**stage, "kind": "sft"})


def test_public_prompts_are_checked_before_the_run_and_may_have_other_columns(
    tiny_model: Path, notes: Path, tmp_path: Path
) -> None:
    """False: a source that lacks a column is noticed when all stages are declared, or needs the private one's names."""
    public = tmp_path / "public.jsonl"
    public.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    mine = {"mine": {"source": str(notes), "columns": {"prompt": "text"}}}
    stage, shown = {"data": "mine", "privacy": PRIVATE}, {"source": str(public)}
    assert check(tiny_model, mine, stage, evaluation=shown).populations == {"mine": 90}
    pairs = {"mine": {"source": str(notes), "columns": {"prompt": "text", "completion": "b"}}}
    assert check(tiny_model, pairs, stage, evaluation=shown).populations == {"mine": 90}
    hub = {"source": "org/films"}  # not fetched before the run
    assert check(tiny_model, mine, stage, evaluation=hub).populations == {"mine": 90}
    public.write_text('{"question": "one"}\n')
    assert line(tiny_model, mine, stage, evaluation=shown).startswith("evaluation.source: data source ")
    named = {**shown, "columns": {"prompt": "question"}}
    assert check(tiny_model, mine, stage, evaluation=named).populations == {"mine": 90}
    public.write_text("")
    assert "empty" in line(tiny_model, mine, stage, evaluation=named)
    wrong = {"mine": {"source": str(notes), "columns": {"prompt": "txet"}}}
    assert "data.mine: data source" in (said := line(tiny_model, wrong, stage)) and "columns.prompt names it" in said


def test_each_stage_s_adapter_is_checked(tiny_model: Path) -> None:
    bad = {"adapter": {"target_modules": ["qproj"]}, "data": "mine"}
    mine = {"mine": {"source": "embedded:movie-reviews"}}
    assert "stages.1.adapter.target_modules: 'qproj' matches no layer" in line(tiny_model, mine, {"data": "mine"}, bad)
    full = check(tiny_model, mine, {"data": "mine"}, {"data": "mine", "adapter": {"kind": "full"}})
    small = check(tiny_model, mine, {"data": "mine"})
    assert full.memory_needed is not None and small.memory_needed is not None
    assert full.memory_needed > small.memory_needed


def test_one_token_goes_to_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [
        {"kind": "http", "url": f"https://{host}/score", "sends_private_text": True} for host in ("one", "two", "one")
    ]
    scorer = {"kind": "ensemble", "members": members}
    config = config_file.parse({"stages": [{"privacy": {"epsilon": 8.0}, "scorer": scorer}]})
    preflight(config)
    monkeypatch.setenv("DPRLHF_SCORER_TOKEN", "x")
    with pytest.raises(ConfigError, match="would go to all of one, two"):
        preflight(config)
