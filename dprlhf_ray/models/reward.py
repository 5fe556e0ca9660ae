"""The reward model: a decoder with an adapter, and a linear score at the last token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dprlhf_ray.config import ModelConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.models import adapters
from dprlhf_ray.models.policy import VALUE_SCALE, exported_weights, last_hidden_states, load_base, load_frozen, put


class RewardModel(nn.Module):
    """One number per sequence.

    score = w . (scale * h), h the last hidden state at the last token that is not padding. Adapter and w share one
    clip, and hidden states are long: `scale` is a public constant that makes the head's input about VALUE_SCALE long,
    as the value head's is. A constant, and not each token's own norm: so that scale * w is an ordinary linear head.

    Args:
        model: a sequence classifier with one label, its adapter attached; `score` is float32 and trains.
        scale: of the head's input.
        pad_id: token that rows are padded with.
    """

    def __init__(self, model: nn.Module, scale: float, pad_id: int) -> None:
        super().__init__()
        self.model, self.pad_id = model, pad_id
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))  # so that a resumed run has the same

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model below the adapter."""
        return self.model.get_base_model() if isinstance(self.model, adapters.PeftModel) else self.model

    @property
    def exported_head(self) -> Tensor:
        """(1, hidden) float32: what transformers' own head is on unscaled hidden states."""
        return self.causal_lm.score.weight.detach().float() * self.scale

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Scores.

        Args:
            tokens: (rows, L) int64, padded on the right.
            lengths: (rows,) int64, at least 1; what follows is padding, whatever its tokens are.

        Returns:
            (rows,) float32, at the rightmost token before `lengths` that is not the pad token (the first, where all
            are): what transformers picks.
        """
        lm = self.causal_lm
        hidden = last_hidden_states(lm.base_model, tokens)
        at = torch.arange(tokens.shape[1], device=tokens.device)
        own = (tokens != self.pad_id) & (at < lengths.unsqueeze(1))
        last = hidden[torch.arange(len(tokens), device=tokens.device), (at * own).argmax(1)]
        scores: Tensor = lm.score(self.scale * last.to(lm.score.weight.dtype)).squeeze(1)
        return scores


def load_reward_model(
    path: str | Path, config: ModelConfig, seed: int, public_sequences: Sequence[Sequence[int]], longest: int
) -> RewardModel:
    """A reward model on a causal LM's decoder (safetensors, no remote code): adapter attached (kind steering is pointed
    at its directions), head zero; eval mode: dropout stays off.

    Args:
        seed: of the adapter's public random start.
        public_sequences: token ids of public texts, none empty, from which `scale` is computed.
        longest: tokens of the longest sequence to come; chooses the attention kernel, which changes speed only.

    Raises:
        ConfigError: transformers has no sequence classifier for this model, or the adapter finds nothing to adapt.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model = _classifier(load_frozen(AutoModelForCausalLM, path, config, longest))
    trained = adapters.attach(model, config.adapter, seed)
    if config.adapter.kind == "steering":
        adapters.point_at_mean_input(trained, public_sequences)
    model.score.requires_grad_(True)
    return RewardModel(trained, VALUE_SCALE / _mean_norm(model.base_model, public_sequences), int(pad_id)).eval()


def export_reward_model(
    model: RewardModel, base_path: str | Path, base_name: str, config: ModelConfig, tokenizer: Any, folder: Path
) -> None:
    """Write `folder/merged` (a float32 sequence classifier that transformers and its pipelines open) and
    `folder/adapter` (PEFT on `base_name`, with the head), both with the tokenizer."""
    from transformers import AutoModelForCausalLM

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.convert_ids_to_tokens(model.pad_id)
    if isinstance(model.model, adapters.PeftModel):
        adapters.save_peft(model.model, base_name, config.adapter, folder / "adapter", model.exported_head)
        tokenizer.save_pretrained(folder / "adapter")
    whole = _classifier(load_base(AutoModelForCausalLM, base_path, config))
    whole.config.pad_token_id = model.pad_id
    put(whole, exported_weights(model.model, model.causal_lm) | {"score.weight": model.exported_head})
    whole.save_pretrained(folder / "merged", safe_serialization=True)
    tokenizer.save_pretrained(folder / "merged")


def _classifier(lm: Any) -> Any:
    """transformers' sequence classifier with one label on a causal LM's own decoder; its head is zero, float32."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(lm.config)
    config.num_labels, config.problem_type = 1, "regression"
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    try:
        with torch.device("meta"):  # its own weights are not wanted
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        model = None
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(f"model.name: transformers has no reward model with a linear score for {type(lm).__name__}")
    setattr(model, model.base_model_prefix, lm.base_model)
    model.score = nn.Linear(model.score.in_features, 1, bias=False, dtype=torch.float32)
    nn.init.zeros_(model.score.weight)
    return model


def _mean_norm(decoder: Any, sequences: Sequence[Sequence[int]]) -> float:
    """Of the last hidden state at the end of public sequences."""
    with torch.no_grad():
        ends = [last_hidden_states(decoder, torch.tensor([list(s)]))[0, -1].float().norm() for s in sequences]
    return float(torch.stack(ends).mean())
