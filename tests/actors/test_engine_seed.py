"""Engines key their own sampling: no seed of the config, and no constant, decides what they draw."""

from __future__ import annotations

from pathlib import Path

import torch

from dprlhf_ray.actors.engines.base import STATE_BYTES, key_generator
from dprlhf_ray.actors.engines.transformers import TransformersEngine
from dprlhf_ray.config import GenerationConfig, RolloutConfig


def test_an_engine_that_starts_again_draws_something_else(tiny_model: Path) -> None:
    """False: a restarted replica repeats its completions, or anyone who knows the seed knows the draws."""
    rollout = RolloutConfig(engine="transformers", max_model_len=32)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        engine = TransformersEngine(str(tiny_model), rollout, GenerationConfig(max_new_tokens=16), "float32")
        engine.load(0, {})
        draws.append([c.token_ids for c in engine.generate([(5, 6, 7)], 4)[0]])
    assert draws[0] != draws[1]


def test_the_whole_state_of_a_generator_comes_from_the_operating_system() -> None:
    """False: 32 bits decide what an engine draws, so that a published completion gives away the private ones."""
    one, other = torch.Generator(), torch.Generator()
    first = bytes(range(256)) * 9 + bytes(192)
    assert len(first) == STATE_BYTES

    def draws(generator: torch.Generator, randomness: bytes) -> torch.Tensor:
        key_generator(generator, randomness)
        return torch.rand(2000, generator=generator)

    assert torch.equal(draws(one, first), draws(other, first))
    for place in (7, 1000, STATE_BYTES - 1):
        changed = bytearray(first)
        changed[place] ^= 0x80
        assert not torch.equal(draws(one, first), draws(other, bytes(changed))), f"byte {place} decides nothing"


def test_two_calls_of_one_engine_draw_independently(tiny_model: Path) -> None:
    """False: a call continues the stream of the one before, and published completions tell how much came between."""
    rollout = RolloutConfig(engine="transformers", max_model_len=32)
    engine = TransformersEngine(str(tiny_model), rollout, GenerationConfig(max_new_tokens=16), "float32")
    engine.load(0, {})
    states = []
    for _ in range(2):
        engine.generate([(5, 6, 7)], 1)
        states.append(engine._generator.get_state())
    assert (states[0] == states[1]).float().mean() < 0.6
