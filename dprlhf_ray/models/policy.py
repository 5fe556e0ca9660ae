"""The policy: a causal language model with an adapter, and a value head where the algorithm wants one."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dprlhf_ray.config import ModelConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models import adapters
from dprlhf_ray.models.precision import learner_on_gpu, widened
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
        hidden = last_hidden_states(lm.get_decoder(), tokens)
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


def last_hidden_states(decoder: Any, tokens: Tensor) -> Tensor:
    """(rows, L, hidden) of right-padded tokens (rows, L) int64: causal attention never looks at the padding."""
    kwargs = {}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        # one row of positions per row of tokens: learned positions that all rows share have no per-record gradient
        last = getattr(decoder.config, "max_position_embeddings", tokens.shape[1]) - 1  # padding may go beyond it
        kwargs["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).clamp(max=last).expand_as(tokens)
    hidden: Tensor = decoder(input_ids=tokens, use_cache=False, **kwargs).last_hidden_state
    return hidden


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

    model = load_frozen(AutoModelForCausalLM, path, config, longest)
    return Policy(adapters.attach(model, config.adapter, seed), value_head).eval()


def load_frozen(auto: Any, path: str | Path, config: ModelConfig, longest: int, **settings: Any) -> Any:
    """Open a model by one of transformers' auto classes: frozen, without dropout, its weights rounded to the config's
    dtype and held in the one that this machine computes in.

    Raises:
        ConfigError: it is no model of that class.
    """
    attention = "eager" if longest <= SHORT and not learner_on_gpu() else "sdpa"
    try:
        model = auto.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=attention,
            **settings,
        )
    except (OSError, ValueError) as e:
        raise ConfigError(f"model.name: cannot load {path}: {str(e).splitlines()[0]}") from None
    model = widened(model, config.dtype, learner_on_gpu()).requires_grad_(False)
    without_dropout(model)
    return model


def without_dropout(model: nn.Module) -> None:
    """Switch off every kind of dropout for good, also in training mode (which gradient checkpointing needs): a ratio to
    the policy that drew the completions, or to the reference, has to compare the same function."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            rate = name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if rate or ("drop" in name and isinstance(value, float)):
                setattr(module, name, 0.0)


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
    """Write `folder/adapter` (PEFT, on `base_name`) and `folder/merged` (a complete model), both with the tokenizer.

    The merged model is float32: rounding W + s B A to bfloat16 would throw part of the learned update away.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(policy.model, adapters.PeftModel):
        adapters.save_peft(policy.model, base_name, config.adapter, folder / "adapter")
        tokenizer.save_pretrained(folder / "adapter")
    model = load_base(AutoModelForCausalLM, base_path, config)
    put(model, exported_weights(policy.model, policy.causal_lm))
    model.save_pretrained(folder / "merged", safe_serialization=True)
    tokenizer.save_pretrained(folder / "merged")


def exported_weights(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """The trained weights, merged, float32, under their Hugging Face names.

    Args:
        model: with its adapter, or the bare `base` under full fine-tuning.
    """
    if isinstance(model, adapters.PeftModel):
        return {f"{n}.weight": adapters.merged(layer) for n, layer in adapters.lora_layers(model)}
    return {n: p.detach().float() for n, p in base.named_parameters()}


def load_base(auto: Any, path: str | Path, config: ModelConfig, **settings: Any) -> Any:
    """The base as the learner saw it: rounded to its dtype, then widened to float32."""
    dtype = getattr(torch, config.dtype)
    return auto.from_pretrained(path, dtype=dtype, trust_remote_code=False, use_safetensors=True, **settings).float()


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite some weights by name."""
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"export: {unknown[0]} is not a weight of the base model")


def write_start(folder: Path, dtype: str) -> Path:
    """Write `folder/DTYPE`, what a later stage's learners and engines start from: the exported `folder/merged`, rounded
    at random without bias (see `adapters.round_to`; weights on the grid stay exact), with its tokenizer.

    Returns:
        The new folder. It appears whole or not at all.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged, target, partial = folder / "merged", folder / dtype, folder / f".partial-{dtype}"
    model = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    for p in model.parameters():  # a tied weight comes once, and stays tied
        p.data = adapters.round_to(p.data, getattr(torch, dtype))
    for path in (partial, target):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(partial, safe_serialization=True)
    AutoTokenizer.from_pretrained(merged, trust_remote_code=False).save_pretrained(partial)
    os.replace(partial, target)
    return target
