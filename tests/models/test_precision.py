"""The dtype that a machine computes in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dprlhf_ray.config import ModelConfig
from dprlhf_ray.models.policy import load_frozen, load_policy
from dprlhf_ray.models.precision import computed_in


def on(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """As on a machine without a GPU whose CPU can so much."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("capability", "dtype", "on_gpu", "expected"),
    [
        ("AVX2", "bfloat16", False, "float32"),
        ("AVX512", "bfloat16", False, "bfloat16"),
        ("AVX2", "float32", False, "float32"),
        ("AVX2", "bfloat16", True, "bfloat16"),
    ],
)
def test_a_cpu_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: str, on_gpu: bool, expected: str
) -> None:
    on(monkeypatch, capability)
    assert computed_in(dtype, on_gpu) == expected


@pytest.mark.parametrize(("capability", "expected"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_a_widened_base_holds_the_same_weights(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capability: str, expected: torch.dtype
) -> None:
    """False: a learner on a CPU without bfloat16 starts from other weights than one with it, or takes them as float32
    from a file that has more digits; or buffers that belong in float32 are rounded."""
    wide = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for p in wide.parameters():
        p.data += 1e-4 * p.data.abs()
    folder = tiny_model.parent / f"wide-{capability}"
    wide.save_pretrained(folder)
    on(monkeypatch, capability)
    model = load_frozen(AutoModelForCausalLM, folder, ModelConfig(), 64)
    names, buffers = dict(wide.named_parameters()), dict(wide.named_buffers())
    for name, p in model.named_parameters():
        assert p.dtype == expected and not p.requires_grad
        assert torch.equal(p.float(), names[name].to(torch.bfloat16).float()), name
    assert buffers, "the model has rotary frequencies"
    for name, b in model.named_buffers():
        assert b.dtype == buffers[name].dtype and torch.equal(b, buffers[name]), name


def test_a_learner_s_model_is_what_transformers_opens(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """False: where bfloat16 is fast, learners compute another function than engines and the exported model, which
    shows at far positions first."""
    on(monkeypatch, "AVX512")
    policy = load_policy(tiny_model, ModelConfig.model_validate({"adapter": {"rank": 2}}), 0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    ids = torch.randint(2, plain.config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here, there = (m(ids).logits.float().log_softmax(-1) for m in (policy.causal_lm, plain))
    assert (here - there).abs().max() < 0.05
