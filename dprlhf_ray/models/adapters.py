"""Adapters on a frozen base: which numbers train, how they merge into the base, how they are saved.

All kinds are PEFT LoRA layers, so all of them export as an ordinary LoRA adapter:

    lora      W + s B A            A, B train                                    (Hu et al. 2021, arXiv 2106.09685)
    ffa_lora  W + s B A            B trains, A stays at its random start         (Sun et al. 2024, arXiv 2403.12313)
    lora_xs   W + s U R V^T        R (r x r) trains; U, V: leading singular vectors of W
                                                                                 (Balazy et al. 2024, arXiv 2405.17604)
    steering  W + b a^T            b trains; a: the mean input on public text, scaled so that a^T x is 1 on average: an
                                   added output vector per matrix (Turner et al. 2023, arXiv 2308.10248), learned
    full      all weights train, no adapter

with s = alpha / rank. Fewer trainable numbers mean less noise: its norm grows with their square root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dprlhf_ray.config import AdapterConfig
from dprlhf_ray.errors import ConfigError

ADAPTER = "default"


class CoreB(nn.Module):
    """The "B" of LoRA-XS: h -> U (R h). R trains in float32, U is frozen."""

    def __init__(self, left: Tensor, rank: int) -> None:
        super().__init__()
        self.core = nn.Linear(rank, rank, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.core.weight)
        self.left = nn.Parameter(left, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The equivalent LoRA B, (out, r) float32."""
        return self.left.float() @ self.core.weight.float()

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(self.core(h.to(self.core.weight.dtype)).to(self.left.dtype), self.left)


def attach(model: nn.Module, config: AdapterConfig, seed: int) -> nn.Module:
    """Freeze `model` and put the adapter on it (kind full: make all weights trainable float32).

    Args:
        seed: of the adapter's public random start.

    Raises:
        ConfigError: no layer matches `target_modules`.
    """
    if config.kind == "full":
        for p in model.parameters():
            p.requires_grad_(True)
        return model.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft = get_peft_model(model, lora_config(config))
        except ValueError as e:
            raise ConfigError(f"model.adapter.target_modules: {str(e).splitlines()[0]}") from None
        for _, layer in lora_layers(peft):
            if config.kind in ("ffa_lora", "steering"):
                layer.lora_A[ADAPTER].weight.requires_grad_(False)
            elif config.kind == "lora_xs":
                _to_core(layer, config.rank)
    return peft


def lora_config(config: AdapterConfig, task: str | None = None) -> LoraConfig:
    """As PEFT writes it.

    Args:
        task: which of PEFT's classes opens a saved adapter (CAUSAL_LM, SEQ_CLS); training uses none of their additions.
    """
    steering = config.kind == "steering"
    return LoraConfig(
        r=1 if steering else config.rank,
        lora_alpha=1.0 if steering else config.alpha,  # type: ignore[arg-type]  # PEFT divides by r, a float is fine
        target_modules=list(config.target_modules),
        layers_to_transform=None if config.layers is None else list(config.layers),
        lora_dropout=0.0,
        bias="none",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the base model, layer) of every adapted linear layer."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and ADAPTER in module.lora_A:
            yield name.removeprefix("base_model.model."), module


def _to_core(layer: Any, rank: int) -> None:
    weight = _out_in(layer, layer.base_layer.weight.detach())
    left, _, right = torch.svd_lowrank(weight.float(), q=min(2 * rank + 4, *weight.shape), niter=6)
    a = nn.Linear(weight.shape[1], rank, bias=False, dtype=weight.dtype)
    a.weight = nn.Parameter(right[:, :rank].T.contiguous().to(weight.dtype), requires_grad=False)
    layer.lora_A[ADAPTER] = a
    layer.lora_B[ADAPTER] = CoreB(left[:, :rank].contiguous().to(weight.dtype), rank)


def _out_in(layer: Any, weight: Tensor) -> Tensor:
    """A weight as (out, in): GPT-2's Conv1D keeps it transposed. Its own inverse."""
    return weight.T if layer.fan_in_fan_out else weight


def point_at_mean_input(model: nn.Module, sequences: Sequence[Sequence[int]]) -> None:
    """Kind steering: set each a to m / |m|^2, m the matrix's mean input over tokens 1.. of public sequences (the first
    token is left out: its activations are of another size)."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, layer in lora_layers(model):

        def watch(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            total = inputs[0][:, 1:].float().sum((0, 1))
            sums[name] = sums[name] + total if name in sums else total

        hooks.append(layer.register_forward_pre_hook(watch))
    device = next(model.parameters()).device
    decoder = model.get_base_model().base_model  # type: ignore[operator]
    with torch.no_grad():
        for sequence in sequences:
            decoder(input_ids=torch.tensor([list(sequence)], device=device))
    for hook in hooks:
        hook.remove()
    count = sum(len(s) - 1 for s in sequences)
    for name, layer in lora_layers(model):
        mean = sums[name] / count
        layer.lora_A[ADAPTER].weight.data.copy_((mean / mean.square().sum()).unsqueeze(0))


def frozen_parts(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's frozen tensors (random A, singular vectors): needed to resume on another machine."""
    return {
        n: p.detach()
        for n, p in model.named_parameters()
        if not p.requires_grad and (".lora_A." in n or ".lora_B." in n)
    }


def load_frozen_parts(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    for name, value in tensors.items():
        own[name].data.copy_(value)


# ------------------------------------------------------------------------------------------------ merge and export


def lora_factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """(A (r, in), B (out, r), s), float32, of one adapted layer."""
    return (
        layer.lora_A[ADAPTER].weight.detach().float(),
        layer.lora_B[ADAPTER].weight.detach().float(),
        float(layer.scaling[ADAPTER]),
    )


def merged(layer: Any) -> Tensor:
    """W + s B A in float32, laid out as the base keeps W."""
    a, b, s = lora_factors(layer)
    return layer.base_layer.weight.detach().float() + _out_in(layer, s * (b @ a))


def served_factors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, float32, its scale s inside B: what an engine serves with a scale of 1."""
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        a, b, s = lora_factors(layer)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (s * b).contiguous()
    return tensors


def round_to(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to bfloat16 at random, without bias: a small update survives on average where rounding to nearest
    would swallow it, because the base weights lie exactly on bfloat16's grid. Post-processing of released weights."""
    if dtype != torch.bfloat16:
        return weight.to(dtype)
    bits = weight.contiguous().view(torch.int32)
    dither = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return ((bits + dither) & -65536).view(torch.float32).to(torch.bfloat16)


def save_peft(
    model: nn.Module, base_name: str, config: AdapterConfig, folder: Path, score: Tensor | None = None
) -> None:
    """Write an ordinary PEFT LoRA adapter (adapter_config.json, adapter_model.safetensors, float32).

    Args:
        score: (1, hidden) float32, the head of a sequence classifier, saved with it; None: a causal language model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {} if score is None else {"base_model.model.score.weight": score.contiguous()}
    for name, layer in lora_layers(model):
        a, b, _ = lora_factors(layer)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config = lora_config(config, "CAUSAL_LM" if score is None else "SEQ_CLS")
    peft_config.base_model_name_or_path = base_name
    peft_config.inference_mode = True
    peft_config.save_pretrained(str(folder))


__all__ = [
    "ADAPTER", "CoreB", "PeftModel", "attach", "frozen_parts", "load_file", "load_frozen_parts",
    "lora_factors", "point_at_mean_input", "lora_layers", "merged", "round_to", "save_peft", "served_factors",
]  # fmt: skip
