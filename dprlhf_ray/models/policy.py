"""The policy: a causal language model with an adapter, and a value head where the algorithm wants one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dprlhf_ray.config import ModelConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models import adapters
from dprlhf_ray.privacy.private import Private

VALUE_SCALE = 0.1  # length of the value head's input: policy and value share one clip, and hidden states are long


@dataclass(frozen=True, repr=False)
class Scored(Private):
    """What one forward pass says of the response tokens.

    log_probs, values: (rows, T) float32 (values None: no head).
    """

    log_probs: Tensor
    values: Tensor | None


class Policy(nn.Module):
    """log-probabilities (and values) of given completions.

    Args:
        model: causal LM, adapter attached.
        value_head: add a linear value head on the direction of the last hidden state, trained in the same vector as the
            policy.
    """

    def __init__(self, model: nn.Module, value_head: bool) -> None:
        super().__init__()
        self.model = model
        hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.value_head = nn.Linear(hidden, 1, dtype=torch.float32) if value_head else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model below the adapter."""
        return self.model.get_base_model() if isinstance(self.model, adapters.PeftModel) else self.model

    def forward(self, tokens: Tensor, prompt_lengths: Tensor, responses: Tensor, temperature: float = 1.0) -> Scored:
        """Score responses.

        Args:
            tokens: (rows, L) int64, prompt then response, padded on the right (causal attention never looks there).
            prompt_lengths: (rows,) int64, at least 1.
            responses: (rows, T) int64, padded.
            temperature: log-probabilities are those of softmax(logits / temperature).
        """
        lm = self.causal_lm
        decoder, kwargs = lm.get_decoder(), {}
        if "position_ids" in inspect.signature(decoder.forward).parameters:
            # one row of positions per row of tokens: learned positions that all rows share have no per-record gradient
            last = getattr(lm.config, "max_position_embeddings", tokens.shape[1]) - 1  # padding may go beyond it
            kwargs["position_ids"] = (
                torch.arange(tokens.shape[1], device=tokens.device).clamp(max=last).expand_as(tokens)
            )
        hidden = decoder(input_ids=tokens, use_cache=False, **kwargs).last_hidden_state
        where = prompt_lengths.unsqueeze(1) - 1 + torch.arange(responses.shape[1], device=tokens.device)
        where = where.clamp(max=tokens.shape[1] - 1)
        picked = hidden.gather(1, where.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        wide = torch.promote_types(picked.dtype, torch.float32)
        logits = lm.get_output_embeddings()(picked).to(wide)  # only where a response token is scored
        if temperature != 1.0:
            logits = logits / temperature
        flat = F.cross_entropy(logits.flatten(0, 1), responses.flatten(), reduction="none")
        values = None
        if self.value_head is not None:
            values = self.value_head(VALUE_SCALE * F.normalize(picked.to(wide), dim=-1)).squeeze(-1)
        return Scored(-flat.view(responses.shape), values)


SHORT = 128  # tokens: below, plain attention beats the fused CPU kernel (a step took 0.77 of its time at 21 tokens)


def load_policy(
    path: str | Path, config: ModelConfig, seed: int, value_head: bool = False, longest: int = SHORT + 1
) -> Policy:
    """Load a causal LM (safetensors, no remote code), attach the adapter; eval mode: dropout stays off.

    Args:
        longest: tokens of the longest sequence to come; chooses the attention kernel, which changes speed only.

    Raises:
        ConfigError: not a causal language model, or the adapter finds nothing to adapt.
    """
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.dtype)
    attention = "eager" if longest <= SHORT and not torch.cuda.is_available() else "sdpa"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, attn_implementation=attention
        )
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.name: cannot load {path}: {str(e).splitlines()[0]}") from None
    model.requires_grad_(False)
    without_dropout(model)
    return Policy(adapters.attach(model, config.adapter, seed), value_head).eval()


def without_dropout(model: nn.Module) -> None:
    """Switch off every kind of dropout for good, also in training mode (which gradient checkpointing needs): a ratio to
    the policy that drew the completions, or to the reference, has to compare the same function."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            rate = name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if rate or ("drop" in name and isinstance(value, float)):
                setattr(module, name, 0.0)


def sync_names(policy: Policy) -> list[str]:
    """Hugging Face names of the weights that training changes."""
    if isinstance(policy.model, adapters.PeftModel):
        return [f"{name}.weight" for name, _ in adapters.lora_layers(policy.model)]
    return [n for n, p in policy.causal_lm.named_parameters() if p.requires_grad]


def sync_weights(policy: Policy, dtype: torch.dtype) -> dict[str, Tensor]:
    """The changed weights, merged, under their Hugging Face names, as a rollout engine of `dtype` wants them."""
    if isinstance(policy.model, adapters.PeftModel):
        return {
            f"{name}.weight": adapters.round_to(adapters.merged(layer), dtype)
            for name, layer in adapters.lora_layers(policy.model)
        }
    return {n: p.detach().to(dtype).clone() for n, p in policy.causal_lm.named_parameters() if p.requires_grad}


def export(
    policy: Policy, base_path: str | Path, base_name: str, config: ModelConfig, tokenizer: Any, folder: Path
) -> None:
    """Write `folder/adapter` (PEFT) and `folder/merged` (a complete model), both with the tokenizer.

    The merged model is float32: rounding W + s B A to bfloat16 would throw part of the learned update away.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(policy.model, adapters.PeftModel):
        adapters.save_peft(policy.model, base_name, config.adapter, folder / "adapter")
        tokenizer.save_pretrained(folder / "adapter")
        state = {f"{n}.weight": adapters.merged(layer) for n, layer in adapters.lora_layers(policy.model)}
    else:
        state = {n: p.detach().float() for n, p in policy.causal_lm.named_parameters()}
    # the base as the learner saw it: rounded to its dtype, then widened
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=getattr(torch, config.dtype), trust_remote_code=False)
    model = model.float()
    missing = model.load_state_dict(state, strict=False).unexpected_keys
    if missing:
        raise RuntimeError(f"export: {missing[0]} is not a weight of {base_path}")
    model.save_pretrained(folder / "merged", safe_serialization=True)
    tokenizer.save_pretrained(folder / "merged")
