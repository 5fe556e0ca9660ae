"""Every exported model says what was guaranteed, and never more than the certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dprlhf_ray import config_file
from dprlhf_ray.config import RunConfig
from dprlhf_ray.models.card import _shown as card_parts
from dprlhf_ray.models.card import lineage, model_card, write_cards
from dprlhf_ray.privacy.certificate import DatasetCost, certificate
from dprlhf_ray.privacy.composition import Part, compose
from dprlhf_ray.privacy.planning import plan_stage


def run(privacy: dict[str, Any], model: str = "embedded") -> tuple[RunConfig, dict[str, Any]]:
    config = config_file.parse(
        {"model": {"name": model}, "stages": [{"privacy": privacy | {"expected_batch": 50, "steps": 3}}]}
    )
    plan = plan_stage(config.stages[0], 1000)
    composed = compose([Part("rl", plan.step, None)], plan.delta)
    ledger = {"head": "ab" * 32, "seq": 4, "epoch": 1, "stages": {"rl": {"dataset": "reviews", "attempts": 3}}}
    return config, certificate(config, [plan], ledger, {"reviews": DatasetCost(composed, composed)})


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_card_holds_the_statement_of_the_certificate_and_opens_as_a_hugging_face_card(kind: str) -> None:
    config, found = run({"epsilon": 4.0})
    card = ModelCard(model_card(kind, config, config.stages[0], found))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.license == "apache-2.0"
    assert card.data.library_name == ("peft" if kind == "adapter" else "transformers")
    assert "differential-privacy" in card.data.tags
    cost = found["data_sets"]["reviews"]["run"]
    for text in (f"epsilon {cost['epsilon']:.4f} at delta 1e-05", "ab" * 32, "one record", "zero_out", '"reviews"'):
        assert text in card.text, text
    for text in (*found["excluded"], *found["assumed"]):
        assert text in card.text
    assert ("AutoPeftModel" in card.text) is (kind == "adapter")


def test_no_card_claims_anything_without_noise_or_before_the_end() -> None:
    config, found = run({"mode": "clip_only"})
    for text in (model_card("merged", config, config.stages[0], c) for c in (found, None)):
        assert "epsilon " not in text and "is differentially private" not in text
    assert "NOT CERTIFIED" in model_card("merged", config, config.stages[0], found)
    assert "Not certified yet" in model_card("merged", config, config.stages[0], None)


def test_the_licence_and_name_of_a_local_base_model_are_its_own(tmp_path: Path) -> None:
    """The path of a folder tells where its owner keeps it, and is no name of a model."""
    base = tmp_path / "my-base"
    base.mkdir()
    config, found = run({"epsilon": 4.0}, str(base))
    card = ModelCard(model_card("merged", config, config.stages[0], found))
    assert card.data.license is None and card.data.base_model is None
    assert "my-base" in card.text and str(tmp_path) not in str(card)
    assert (
        card_parts(["films = /home/me/films.jsonl", "org/books", "~/notes.csv"])
        == "films = films.jsonl, org/books, notes.csv"
    )
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    assert ModelCard(model_card("merged", config, config.stages[0], found)).data.license == "mit"


def test_every_exported_folder_gets_one_and_it_is_written_again(tmp_path: Path) -> None:
    config, found = run({"epsilon": 4.0})
    (tmp_path / "merged").mkdir()
    assert write_cards(tmp_path, config, config.stages[0], None) == [tmp_path / "merged" / "README.md"]
    (tmp_path / "adapter").mkdir()
    assert len(write_cards(tmp_path, config, config.stages[0], found)) == 2
    assert all("Not certified yet" not in (tmp_path / k / "README.md").read_text() for k in ("adapter", "merged"))


STAGES = [
    {"kind": "sft", "name": "warm", "data": "shown", "privacy": {"mode": "public", "expected_batch": 50, "steps": 3}},
    {"kind": "reward_model", "name": "rm", "data": "pairs", "privacy": {
        "epsilon": 4.0, "unit": "user", "expected_batch": 50, "steps": 3}},
    {"name": "alone", "data": "reviews", "start": "model", "privacy": {
        "epsilon": 2.0, "expected_batch": 50, "steps": 3}},
    {"name": "last", "data": "reviews", "start": "warm", "scorer": {"kind": "ensemble", "members": [
        {"kind": "reward_model", "stage": "rm"}, {"kind": "sentiment_rule"}]}, "privacy": {
        "epsilon": 2.0, "expected_batch": 50, "steps": 3}},
]  # fmt: skip
DATA = {
    "shown": {"source": "shown.jsonl", "public": True},
    "pairs": {"source": "pairs.jsonl", "unit_column": "author"},
    "reviews": {},
}


def pipeline_run() -> tuple[RunConfig, dict[str, Any]]:
    """Public SFT, a reward model on users' pairs, and two RL stages of which only the last builds on the others."""
    config = config_file.parse({"model": {"name": "org/base"}, "data": DATA, "stages": STAGES})
    plans = [plan_stage(s, 1000) for s in config.stages]
    ledger = {
        "head": "ab" * 32,
        "seq": 9,
        "epoch": 1,
        "stages": {p.ledger_stage: {"dataset": p.dataset, "attempts": 3} for p in plans},
    }
    costs = {}
    for name in ("pairs", "reviews"):
        mine = [p for p in plans if p.dataset == name]
        composed = compose([Part(p.stage, p.step, None) for p in mine], mine[0].delta)
        costs[name] = DatasetCost(composed, composed)
    return config, certificate(config, plans, ledger, costs)


def test_a_model_is_made_of_what_it_starts_from_and_of_what_scored_it() -> None:
    """False: a card is silent on people whose data shaped the model."""
    config, _ = pipeline_run()
    made = {s.name: [x.name for x in lineage(config, s)] for s in config.stages}
    assert made == {"warm": ["warm"], "rm": ["warm", "rm"], "alone": ["alone"], "last": ["warm", "rm", "last"]}


def test_a_card_states_the_cost_of_every_data_set_that_its_model_is_made_of_and_of_no_other() -> None:
    """False: a card names one of two private data sets, or one that its model never saw."""
    config, found = pipeline_run()
    cards = {s.name: ModelCard(model_card("merged", config, s, found)) for s in config.stages}
    bounds = {n: f"epsilon {found['data_sets'][n]['run']['epsilon']:.4f} at delta" for n in ("pairs", "reviews")}
    for name, told in {"warm": set(), "rm": {"pairs"}, "alone": {"reviews"}, "last": {"pairs", "reviews"}}.items():
        assert {n for n, bound in bounds.items() if bound in cards[name].text} == told, name
    assert (
        "Nothing private was read to make this model" in cards["warm"].text and "declared public" in cards["warm"].text
    )
    assert "all records of one id together; the ids are in column author" in cards["rm"].text
    for name, units in {"rm": "one user", "alone": "one record", "last": "one user or one record"}.items():
        assert f"tells about {units}." in cards[name].text
    assert "Differential privacy" not in cards["warm"].text and "does not cover" not in cards["warm"].text


@pytest.mark.parametrize(("kind", "opens"), [("adapter", "AutoPeftModel"), ("merged", "AutoModel")])
def test_a_reward_models_card_says_how_it_is_opened(kind: str, opens: str) -> None:
    """False: its page on a hub offers text generation."""
    config, found = pipeline_run()
    card = ModelCard(model_card(kind, config, config.stages[1], found))
    assert card.data.pipeline_tag == "text-classification" and f"{opens}ForSequenceClassification" in card.text
    assert ("belongs on the model of stage warm" in card.text) is (kind == "adapter")
    assert ModelCard(model_card(kind, config, config.stages[3], found)).data.pipeline_tag == "text-generation"
    assert "Bradley-Terry" in card.text
