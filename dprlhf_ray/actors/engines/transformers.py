"""The transformers engine: for machines that vLLM does not support, and for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dprlhf_ray.actors.engines.base import Engine, Sampled, key_generator
from dprlhf_ray.config import GenerationConfig, RolloutConfig
from dprlhf_ray.models.precision import widened


class TransformersEngine(Engine):
    """Batched sampling with a key-value cache; batches of up to `max_num_seqs` prompts, padded on the left."""

    def __init__(self, model_path: str, rollout: RolloutConfig, generation: GenerationConfig, dtype: str) -> None:
        super().__init__(model_path, rollout, generation, dtype)
        from transformers import AutoModelForCausalLM

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
        )
        self._model = widened(model, dtype, self._device.type == "cuda").to(self._device).eval()
        self._generator = torch.Generator(self._device)
        if rollout.threads:
            torch.set_num_threads(rollout.threads)

    @torch.inference_mode()
    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        result = []
        for ids in sequences:
            tokens = torch.tensor([list(ids)], device=self._device)
            log_probs = self._model(tokens).logits[0, :-1].float().log_softmax(-1)
            result.append(log_probs.gather(1, tokens[0, 1:, None])[:, 0].tolist())
        return result

    def _key_sampler(self, randomness: bytes) -> None:
        key_generator(self._generator, randomness)

    def _sample(self, prompts: list[tuple[int, ...]]) -> list[Sampled]:
        size = self.rollout.max_num_seqs
        # Neighbours in length share a batch, so that little is computed for padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        drawn: list[Sampled] = [([], None) for _ in prompts]
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            for i, sampled in zip(batch, self._sample_batch([prompts[i] for i in batch]), strict=True):
                drawn[i] = sampled
        return drawn

    @torch.inference_mode()
    def _sample_batch(self, prompts: list[tuple[int, ...]]) -> list[Sampled]:
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        drawn: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        cache = None
        for _ in range(self.generation.max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = self._model(
                tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            probs = (out.logits[:, -1].float() / self.generation.temperature).softmax(-1)
            tokens = torch.multinomial(probs, 1, generator=self._generator)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            chosen = probs.gather(1, tokens).log()[:, 0].tolist()
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in open_rows:
                    drawn[row].append(token)
                    log_probs[row].append(chosen[row])
                    if self.generation.stop_at_eos and token in self.eos_token_ids:
                        open_rows.discard(row)
            if not open_rows:
                break
        wanted = bool(self.rollout.staleness)
        return [(ids, tuple(own) if wanted else None) for ids, own in zip(drawn, log_probs, strict=True)]

    @torch.no_grad()
    def _load(self, weights: Mapping[str, torch.Tensor]) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name, value in weights.items():
            if name not in parameters:
                raise ValueError(f"the model has no parameter {name!r}")
            if parameters[name].shape != value.shape:
                raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {tuple(parameters[name].shape)}")
            parameters[name].copy_(value)
