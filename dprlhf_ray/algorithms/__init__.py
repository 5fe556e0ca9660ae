"""Per-record losses. `build` is the closed list."""

from __future__ import annotations

from dprlhf_ray.algorithms.base import Algorithm, Batch
from dprlhf_ray.algorithms.grpo import GRPO
from dprlhf_ray.algorithms.ppo import PPO
from dprlhf_ray.algorithms.reinforce import Reinforce
from dprlhf_ray.algorithms.rloo import RLOO
from dprlhf_ray.config import AlgorithmConfig

__all__ = ["Algorithm", "Batch", "build"]


def build(config: AlgorithmConfig) -> Algorithm:
    match config.kind:
        case "reinforce":
            return Reinforce(config.kl_coef)
        case "rloo":
            return RLOO(config.kl_coef)
        case "grpo":
            return GRPO(config.clip_range, config.kl_coef)
        case "ppo":
            return PPO(config.clip_range, config.kl_coef, config.gamma, config.gae_lambda, config.value_coef)
