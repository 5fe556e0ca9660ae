"""Engines key their own sampling: no seed of the config, and no constant, decides what they draw."""

from __future__ import annotations

from pathlib import Path

import torch

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
