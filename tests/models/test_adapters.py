"""Adapters: what trains, how it merges, rounds and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dprlhf_ray.config import AdapterConfig, ModelConfig
from dprlhf_ray.data.preflight import model_facts
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models import adapters
from dprlhf_ray.models.policy import load_policy, sync_weights
from dprlhf_ray.privacy.planning import trainable_numbers

KINDS = ["lora", "ffa_lora", "lora_xs", "steering", "full"]
TARGETS = {"Llama": ["q_proj", "v_proj"], "GPT-2": ["c_attn", "mlp.c_proj"]}


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with random weights: its Conv1D layers keep W as (in, out)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=16, n_embd=12, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


def _policy(model: Path, kind: str, targets: list[str] = TARGETS["Llama"]):  # type: ignore[no-untyped-def]
    tree = {"kind": kind, "rank": 2, "target_modules": targets}
    return load_policy(model, ModelConfig(dtype="float32", adapter=AdapterConfig.model_validate(tree)), seed=0)


def _move(policy: torch.nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("family", list(TARGETS))
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_policy(kind: str, family: str, tiny_model: Path, tiny_gpt2: Path) -> None:
    """False: engines would run another policy than the learner's."""
    path = tiny_model if family == "Llama" else tiny_gpt2
    policy = _policy(path, kind, TARGETS[family])
    _move(policy)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = {n: p.clone() for n, p in plain.state_dict().items()}
    weights = sync_weights(policy, torch.float32)
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    assert any(not torch.equal(before[n], p) for n, p in plain.state_dict().items()), "nothing moved"
    ids = torch.randint(3, 200, (2, 9))
    with torch.no_grad():
        a = plain(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        b = policy(ids, torch.ones(2, dtype=torch.long), ids[:, 1:]).log_probs
    assert torch.allclose(a, b, atol=1e-4), f"largest difference {(a - b).abs().max():.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_the_plan_counts_what_trains(kind: str, layers: tuple[int, ...] | None, tiny_model: Path) -> None:
    """False: `dprlhf plan` promises another dimension, and so another noise, than the learner has."""
    adapter = AdapterConfig.model_validate(
        {"kind": kind, "rank": 2, "target_modules": ["q_proj", "v_proj"], "layers": layers}
    )
    policy = load_policy(tiny_model, ModelConfig(dtype="float32", adapter=adapter), seed=0)
    facts = model_facts(str(tiny_model))
    assert facts is not None
    trains = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert trainable_numbers(adapter, facts.parameters, facts.linears) == trains


@pytest.mark.parametrize("kind", ["lora", "ffa_lora", "lora_xs", "steering"])
def test_the_start_is_the_base_model(kind: str, tiny_model: Path) -> None:
    """False: an adapter changes the policy before anything was learned."""
    policy, base = _policy(tiny_model, kind), AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for name, weight in sync_weights(policy, torch.float32).items():
        assert torch.equal(weight, base.state_dict()[name])


def test_random_rounding_is_unbiased_and_exact_on_the_grid() -> None:
    """False: small updates vanish in bfloat16, or weights that did not change move."""
    torch.manual_seed(0)
    grid = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(adapters.round_to(grid.float(), torch.bfloat16), grid)
    w = torch.full((200_000,), 1.0 + 2.0**-10)  # an eighth of the way to the next bfloat16
    rounded = adapters.round_to(w, torch.bfloat16).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(rounded.mean().item() - w[0].item()) < 3e-5
    assert (w.to(torch.bfloat16).float() == 1.0).all(), "rounding to nearest would have lost the update"


def test_a_target_that_matches_nothing_is_one_line(tiny_model: Path) -> None:
    """False: a typo in target_modules trains nothing while epsilon counts."""
    with pytest.raises(ConfigError, match="target_modules"):
        _policy(tiny_model, "lora", ["no_such_layer"])
