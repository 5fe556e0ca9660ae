"""A stage that starts from another: what it starts from, and what it exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dprlhf_ray.config import AdapterConfig, ModelConfig
from dprlhf_ray.models.policy import Policy, export, load_policy, write_start

TARGETS = ["q_proj", "v_proj"]


def trained(start: Path, config: ModelConfig, seed: int) -> Policy:
    """As after some training: only the adapted matrices move."""
    policy = load_policy(start, config, seed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return policy


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.fixture(scope="module")
def first(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported models of a first stage, and its start for a later one."""
    folder, config = tmp_path_factory.mktemp("first"), ModelConfig()
    policy = trained(tiny_model, config, 1)
    export(policy, tiny_model, str(tiny_model), config, AutoTokenizer.from_pretrained(tiny_model), folder)
    GenerationConfig(max_new_tokens=7).save_pretrained(folder / "merged")
    assert write_start(folder, "bfloat16") == folder / "bfloat16"
    return folder


def test_a_start_is_the_exported_model_rounded_at_random_and_exact_where_nothing_moved(
    first: Path, tiny_model: Path
) -> None:
    """False: a stage starts from other weights than were exported, or an earlier stage's small update is lost."""
    base, merged, start = state(tiny_model), state(first / "merged"), state(first / "bfloat16")
    assert {p.dtype for p in merged.values()} == {torch.float32} and {p.dtype for p in start.values()} == {
        torch.bfloat16
    }
    moved = {n for n in base if not torch.equal(base[n].float(), merged[n])}
    assert moved == {n for n in base if n.split(".")[-2] in TARGETS}
    for name, weight in start.items():
        exact = merged[name]
        if name in moved:
            assert (weight.float() - exact).abs().le(exact.abs() / 128).all(), name  # a step of bfloat16's grid
            up, down = (weight.float() > exact).float().mean(), (weight.float() < exact).float().mean()
            assert 0.4 < up / (up + down) < 0.6, name
            nearest = exact.to(torch.bfloat16)
            assert 0.1 < (weight != nearest).float().mean() < 0.5, f"{name}: rounded to nearest"
        else:
            assert torch.equal(weight.float(), exact), name


def test_a_start_is_a_whole_model_folder_that_is_written_again_in_one_piece(first: Path) -> None:
    """False: engines or learners of a later stage do not open it, or a stale start outlives a repeated export."""
    model = AutoModelForCausalLM.from_pretrained(first / "bfloat16")
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights came apart"
    assert model.generation_config.max_new_tokens == 7
    tokens = [AutoTokenizer.from_pretrained(first / f) for f in ("merged", "bfloat16")]
    assert tokens[0].chat_template and tokens[0].chat_template == tokens[1].chat_template
    assert tokens[0].get_vocab() == tokens[1].get_vocab()
    (first / "bfloat16" / "stale").touch()
    write_start(first, "bfloat16")
    assert not (first / "bfloat16" / "stale").exists() and not list(first.glob(".partial*"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_a_later_stage_exports_is_what_it_trained(kind: str, first: Path, tmp_path: Path) -> None:
    """False: the second stage's export is its update on the first base, without what the first stage learned."""
    config = ModelConfig(dtype="float32", adapter=AdapterConfig.model_validate({"kind": kind}))
    start = first / "bfloat16"
    policy = trained(start, config, 2)
    export(policy, start, str(start), config, AutoTokenizer.from_pretrained(start), tmp_path)
    found = [AutoModelForCausalLM.from_pretrained(tmp_path / "merged")]
    if kind == "lora":
        found.append(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32))
        assert found[-1].peft_config["default"].base_model_name_or_path == str(start)
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = policy(ids, torch.ones(2, dtype=torch.long), ids[:, 1:]).log_probs
        for model in found:
            theirs = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            assert torch.allclose(ours, theirs, atol=1e-4), f"off by {(ours - theirs).abs().max():.1e}"
