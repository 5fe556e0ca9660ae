"""What every rollout engine does: hold one weight version, draw completions from it, score fixed sequences with it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dprlhf_ray.config import GenerationConfig, RolloutConfig
from dprlhf_ray.records import Completion

STATE_BYTES = 624 * 4  # of the Mersenne twister that torch has on CPUs
_STATE = slice(24, 24 + 624 * 8)  # where they lie in a generator's state, one 32-bit word in 64


Sampled = tuple[list[int], tuple[float, ...] | None]  # token ids; their log-probabilities, where they are needed


def key_generator(generator: torch.Generator, randomness: bytes) -> None:
    """Start a generator from `STATE_BYTES` random bytes: the whole state on a CPU, 63 bits of seed on a GPU (Philox).

    `manual_seed` keeps 32 bits on CPUs: few enough to try them all against a published completion.
    """
    if generator.device.type != "cpu":
        generator.manual_seed(int.from_bytes(randomness[:8], "little") >> 1)
        return
    state = generator.manual_seed(0).get_state()
    words = np.frombuffer(randomness, dtype=np.uint32).astype(np.uint64)
    state[_STATE] = torch.from_numpy(words.view(np.uint8))
    generator.set_state(state)


class Engine(ABC):
    """One copy of the policy.

    Formal guarantees: none of its own; it sees released weight versions only and its completions stay private. Samples
    are drawn with randomness keyed by the operating system afresh at each `generate`, never by the config: no two draws
    repeat, and completions on public prompts, which are published, tell nothing about the private ones.

    | prompt                                                  | completions                                    |
    | ------------------------------------------------------- | ---------------------------------------------- |
    | empty, too long, or with ids outside the vocabulary     | none (a null record; the others are untouched) |
    | anything else                                           | exactly `completions_per_prompt`               |
    """

    def __init__(self, model_path: str, rollout: RolloutConfig, generation: GenerationConfig, dtype: str) -> None:
        """Open the model of folder (or hub name) `model_path` in `dtype` ("bfloat16" or "float32")."""
        from transformers import AutoConfig, AutoTokenizer
        from transformers import GenerationConfig as HubGenerationConfig

        self.rollout = rollout
        self.generation = generation
        self.version: int | None = None  # None: the weights of `model_path`, before the first `load`
        self.tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
        settings = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        self.vocab_size: int = settings.get_text_config().vocab_size
        try:
            declared = HubGenerationConfig.from_pretrained(model_path).eos_token_id
        except OSError:  # a folder without generation_config.json
            declared = None
        ids = declared if isinstance(declared, list) else [declared]
        self.eos_token_ids = frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    def generate(self, prompts: Sequence[Sequence[int]], completions_per_prompt: int) -> list[list[Completion]]:
        """Draw completions at the configured temperature, without top-k or top-p.

        Args:
            prompts: token ids, one sequence per record.
            completions_per_prompt: G.

        Returns:
            One list per prompt, in order: G completions, or none (see the table above).

        Raises:
            RuntimeError: nothing was loaded yet, so that a completion could not carry its weight version.
        """
        if self.version is None:
            raise RuntimeError("no weight version was loaded into this engine: call load() first")
        usable = [i for i, p in enumerate(prompts) if self._fits(p)]
        self._key_sampler(os.urandom(STATE_BYTES))
        drawn = self._sample([tuple(prompts[i]) for i in usable for _ in range(completions_per_prompt)])
        texts = self.tokenizer.batch_decode(
            [[t for t in ids if t not in self.eos_token_ids] for ids, _ in drawn], skip_special_tokens=True
        )
        done = [
            Completion(tuple(ids), text, bool(ids) and ids[-1] in self.eos_token_ids, self.version, log_probs)
            for (ids, log_probs), text in zip(drawn, texts, strict=True)
        ]
        result: list[list[Completion]] = [[] for _ in prompts]
        for n, i in enumerate(usable):
            result[i] = done[n * completions_per_prompt : (n + 1) * completions_per_prompt]
        return result

    def load(self, version: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Replace the named tensors (complete, Hugging Face parameter names) and become `version`.

        Raises:
            ValueError: a name that the model does not have, or a wrong shape.
        """
        self._load({name: torch.as_tensor(value) for name, value in weights.items()})
        self.version = version

    def _fits(self, prompt: Sequence[int]) -> bool:
        longest = self.rollout.max_model_len - self.generation.max_new_tokens
        return 0 < len(prompt) <= longest and all(0 <= t < self.vocab_size for t in prompt)

    @abstractmethod
    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities (nats, temperature 1) of tokens 1.. of each sequence: lists of length len - 1.

        For fixed public sequences, shorter than `max_model_len`.
        """

    @abstractmethod
    def _key_sampler(self, randomness: bytes) -> None:
        """Start the generators that `_sample` draws from, as `key_generator` does."""

    @abstractmethod
    def _sample(self, prompts: list[tuple[int, ...]]) -> list[Sampled]:
        """One continuation per prompt: token ids, ending with an end-of-sequence token when one was drawn, and their
        log-probabilities where `rollout.staleness` needs them."""

    @abstractmethod
    def _load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors into the model and forget everything computed with the old ones."""
