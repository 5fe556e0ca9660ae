"""Per-record losses. `build` is the closed list."""

from __future__ import annotations

from dprlhf_ray.algorithms.base import Algorithm, Batch
from dprlhf_ray.algorithms.grpo import GRPO
from dprlhf_ray.algorithms.ppo import PPO
from dprlhf_ray.algorithms.reinforce import Reinforce
from dprlhf_ray.algorithms.reinforce_pp import ReinforcePP
from dprlhf_ray.algorithms.rloo import RLOO
from dprlhf_ray.config import AlgorithmConfig

__all__ = ["Algorithm", "Batch", "build"]

_KINDS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "rloo": RLOO,
    "grpo": GRPO,
    "reinforce": Reinforce,
    "reinforce_pp": ReinforcePP,
}


def build(config: AlgorithmConfig, max_new_tokens: int) -> Algorithm:
    """The loss that the config names; max_new_tokens: public bound on a completion's tokens."""
    return _KINDS[config.kind](config, max_new_tokens)
