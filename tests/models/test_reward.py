"""The reward model: the learner's scores are those of what is exported, and each record's gradient is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    pipeline,
)

from dprlhf_ray import config_file
from dprlhf_ray.config import AdapterConfig, ModelConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models.card import write_cards
from dprlhf_ray.models.policy import VALUE_SCALE
from dprlhf_ray.models.reward import RewardModel, export_reward_model, load_reward_model
from dprlhf_ray.privacy.per_unit import Recorder

KINDS = ["lora", "ffa_lora", "lora_xs", "steering", "full"]
TARGETS = {"Llama": ["q_proj", "v_proj"], "GPT-2": ["c_attn", "mlp.c_proj"]}
PUBLIC = [[5, 6, 7, 8], [9, 10, 11], [40, 41, 42, 43, 44, 45]]
PAD = 0


@pytest.fixture(scope="module")
def bases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama, and a GPT-2 (learned positions, Conv1D) with its tokenizer."""
    gpt2 = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=24, n_layer=2, n_head=2, initializer_range=0.2)
        ).save_pretrained(gpt2)
    tokenizer.save_pretrained(gpt2)
    return {"Llama": tiny_model, "GPT-2": gpt2}


def settings(family: str, kind: str, dtype: str = "float32") -> ModelConfig:
    adapter = AdapterConfig.model_validate({"kind": kind, "rank": 2, "target_modules": TARGETS[family]})
    return ModelConfig.model_validate({"dtype": dtype, "adapter": adapter})


def moved(path: Path, config: ModelConfig) -> RewardModel:
    """As after some training."""
    model = load_reward_model(path, config, seed=0, public_sequences=PUBLIC, longest=32)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
        model.causal_lm.score.weight.mul_(200.0)  # scores about 1
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with the pad token inside, at the end and everywhere, beside ordinary ones of several lengths."""
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, PAD, 13, 14], [15, 16, 17, PAD, PAD], [20, PAD], [PAD, PAD, PAD], [30]]
    tokens = torch.full((len(rows), 9), PAD)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) for row in rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", list(TARGETS))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_exported_scores_as_the_learner_does(
    kind: str, family: str, dtype: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """False: RL would maximise another reward than the one that was learned, or a user would measure another one."""
    base, config = bases[family], settings(family, kind, dtype)
    model, (tokens, lengths) = moved(base, config), batch()
    assert model.pad_id == PAD
    export_reward_model(model, base, str(base), config, AutoTokenizer.from_pretrained(base), tmp_path)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert (merged.config.num_labels, merged.config.problem_type, merged.config.pad_token_id) == (1, "regression", PAD)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    found = [merged]
    if kind != "full":
        found.append(
            AutoPeftModelForSequenceClassification.from_pretrained(
                tmp_path / "adapter", num_labels=1, pad_token_id=PAD, dtype=getattr(torch, dtype)
            ).float()
        )
    with torch.no_grad():
        ours = model(tokens, lengths)
        for other in found:
            theirs = other.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, 0]
            assert ours.std() > 0.3
            tolerance = 1e-4 if dtype == "float32" else 0.1 * float(ours.abs().max())
            assert torch.allclose(ours, theirs, atol=tolerance), f"off by {(ours - theirs).abs().max():.1e}"


def test_padding_and_the_rest_of_the_batch_change_no_score(bases: dict[str, Path]) -> None:
    """False: a record's score depends on how long the others are, or on tokens after its own."""
    model, (tokens, lengths) = moved(bases["GPT-2"], settings("GPT-2", "lora")), batch()
    with torch.no_grad():
        together = model(tokens, lengths)
        for i, n in enumerate(lengths.tolist()):
            assert torch.allclose(model(tokens[i : i + 1, :n], lengths[i : i + 1]), together[i : i + 1], atol=1e-6)
        beyond = tokens.clone()
        beyond[0, 7:] = 99  # after the record's end
        assert torch.equal(model(beyond, lengths), together)


def test_a_pipeline_gives_the_same_reward_for_a_text(bases: dict[str, Path], tmp_path: Path) -> None:
    """False: what a user does first with the exported model gives another number (a sigmoid of it, for one)."""
    base, config = bases["Llama"], settings("Llama", "lora")
    model, tokenizer = moved(base, config), AutoTokenizer.from_pretrained(base)
    export_reward_model(model, base, str(base), config, tokenizer, tmp_path)
    texts = ["the movie was good", "a story"]
    rows = pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")(texts, batch_size=2)
    for text, row in zip(texts, rows, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert row["score"] == pytest.approx(float(model(ids, torch.tensor([ids.shape[1]]))), abs=1e-4)
        assert row["label"] == "reward"


@pytest.mark.parametrize("family", list(TARGETS))
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_gradients_are_those_of_one_record_at_a_time(kind: str, family: str, bases: dict[str, Path]) -> None:
    """False: a clip would bound something other than a pair's own gradient, adapter and head together."""
    config, (tokens, lengths) = settings(family, kind), batch()
    model, plain = moved(bases[family], config), moved(bases[family], config)
    recorder = Recorder(model)
    assert any("score" in n for n in recorder.names)
    with recorder.record(3, 2):
        scores = model(tokens, lengths).view(3, 2)
        (scores[:, 0] - scores[:, 1]).sum().backward()
        grads = recorder.take()
    for u in range(3):
        plain.zero_grad()
        pair = plain(tokens[2 * u : 2 * u + 2], lengths[2 * u : 2 * u + 2])
        (pair[0] - pair[1]).backward()
        expected = [p.grad for p in plain.parameters() if p.requires_grad]
        for name, own, grad in zip(recorder.names, grads, expected, strict=True):
            assert grad is not None and torch.allclose(own[u], grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("family", list(TARGETS))
def test_the_start_is_zero_and_the_heads_input_is_as_long_as_a_values(family: str, bases: dict[str, Path]) -> None:
    """False: an untrained model prefers something, or the head drowns the adapter in the clip they share."""
    model = load_reward_model(bases[family], settings(family, "lora"), 0, PUBLIC, 32)
    tokens, lengths = batch()
    assert torch.equal(model(tokens, lengths), torch.zeros(len(tokens)))
    seen: list[torch.Tensor] = []
    model.causal_lm.score.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for s in PUBLIC:
        model(torch.tensor([s]), torch.tensor([len(s)]))
    assert torch.cat(seen).norm(dim=1).mean().item() == pytest.approx(VALUE_SCALE, rel=1e-5)
    assert not model.training and "scale" in model.state_dict()


def test_a_model_without_a_sequence_classifier_is_one_line(bases: dict[str, Path], tmp_path: Path) -> None:
    """False: a stack trace, or a stage that is paid for and cannot be exported."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=310, num_key_value_heads=2, pad_token_id=0, **sizes)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bases["Llama"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="^model.name: .* GraniteForCausalLM$"):
        load_reward_model(tmp_path, settings("Llama", "lora"), 0, PUBLIC, 32)


def test_the_code_on_the_cards_gives_the_learners_score(bases: dict[str, Path], tmp_path: Path) -> None:
    """False: whoever follows the card gets an error, or another reward."""
    base, config = bases["GPT-2"], settings("GPT-2", "lora")
    model, tokenizer = moved(base, config), AutoTokenizer.from_pretrained(base)
    export_reward_model(model, base, str(base), config, tokenizer, tmp_path)
    run = config_file.parse({"stages": [{"kind": "reward_model", "privacy": {"epsilon": 4.0}}]})
    ids = torch.tensor([tokenizer("PROMPTRESPONSE")["input_ids"]])
    with torch.no_grad():
        expected = float(model(ids, torch.tensor([ids.shape[1]])))
    cards = write_cards(tmp_path, run, run.stages[0], None)
    assert len(cards) == 2
    for card in cards:
        code = card.read_text().split("```python")[1].split("```")[0]
        found: dict[str, torch.Tensor] = {}
        exec(code.replace("PATH_OF_THIS_FOLDER", str(card.parent)), found)
        assert found["reward"].item() == pytest.approx(expected, abs=1e-4)
