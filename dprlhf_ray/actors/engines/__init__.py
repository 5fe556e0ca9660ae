"""Rollout engines, one file per kind, and the chooser."""

from __future__ import annotations

from dprlhf_ray.actors.engines.base import Engine
from dprlhf_ray.config import AdapterConfig, GenerationConfig, RolloutConfig

__all__ = ["Engine", "build_engine"]


def build_engine(
    model_path: str, rollout: RolloutConfig, generation: GenerationConfig, dtype: str, adapter: AdapterConfig
) -> Engine:
    """The engine named by `rollout.engine`; imports only that one.

    Args:
        adapter: what trains, and is served where `rollout.weights` says so.
    """
    if rollout.engine == "vllm":
        from dprlhf_ray.actors.engines.vllm import VllmEngine

        return VllmEngine(model_path, rollout, generation, dtype, adapter)
    from dprlhf_ray.actors.engines.transformers import TransformersEngine

    return TransformersEngine(model_path, rollout, generation, dtype)
