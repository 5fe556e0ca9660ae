"""The dtype that a machine computes in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dprlhf_ray.config import ModelConfig
from dprlhf_ray.models.policy import load_frozen
from dprlhf_ray.models.precision import computed_in


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [("AVX2", "bfloat16", "float32"), ("AVX512", "bfloat16", "bfloat16"), ("AVX2", "float32", "float32")],
)
def test_a_cpu_without_bfloat16_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: str, expected: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert computed_in(dtype) == expected


@pytest.mark.parametrize(("capability", "expected"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_a_widened_base_holds_the_same_weights(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capability: str, expected: torch.dtype
) -> None:
    """False: a learner on a CPU without bfloat16 starts from other weights than one with it, or takes them as float32
    from a file that has more digits."""
    wide = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for p in wide.parameters():
        p.data += 1e-4 * p.data.abs()
    folder = tiny_model.parent / f"wide-{capability}"
    wide.save_pretrained(folder)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = load_frozen(AutoModelForCausalLM, folder, ModelConfig(), 64)
    names = dict(wide.named_parameters())
    for name, p in model.named_parameters():
        assert p.dtype == expected and not p.requires_grad
        assert torch.equal(p.float(), names[name].to(torch.bfloat16).float()), name
