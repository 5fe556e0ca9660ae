"""What each kind of stage trains, on which loss, and how its result is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dprlhf_ray.config import AnyStage, ModelConfig, RunConfig
from dprlhf_ray.models import adapters
from dprlhf_ray.models.embedded import hub_name
from dprlhf_ray.models.policy import Policy, export, load_policy, write_start
from dprlhf_ray.models.reward import RewardModel, export_reward_model, load_reward_model
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.stages.objective import Objective
from dprlhf_ray.stages.rl import RLObjective
from dprlhf_ray.stages.supervised import PairObjective, SFTObjective


def group_of(stage: AnyStage) -> int:
    """G: completions per record."""
    if stage.kind == "rl":
        return stage.algorithm.completions_per_prompt
    return 2 if stage.kind == "reward_model" else 1


def model_config(config: RunConfig, stage: AnyStage) -> ModelConfig:
    """The model's settings with the stage's own adapter."""
    return config.model.model_copy(update={"adapter": config.adapter_of(stage)})


def build_model(
    config: RunConfig, stage: AnyStage, start: str | Path, public_sequences: Sequence[Sequence[int]]
) -> nn.Module:
    """What a stage trains, in eval mode. `start`: folder of the weights that it starts from."""
    settings, longest = model_config(config, stage), config.rollout.max_model_len
    if stage.kind == "reward_model":
        return load_reward_model(start, settings, config.seed, public_sequences, longest)
    with_values = stage.kind == "rl" and stage.algorithm.kind == "ppo"
    policy = load_policy(start, settings, config.seed, with_values, longest)
    if settings.adapter.kind == "steering":
        adapters.point_at_mean_input(policy.model, public_sequences)
    return policy


def build_reference(config: RunConfig, stage: AnyStage, start: str | Path) -> Policy | None:
    """A frozen copy of the start, only where there is no adapter to switch off."""
    settings = model_config(config, stage)
    if stage.kind != "rl" or settings.adapter.kind != "full" or not stage.algorithm.kl_coef:
        return None
    return load_policy(start, settings, config.seed).requires_grad_(False)


def build_objective(stage: AnyStage, model: nn.Module, recorder: Recorder, reference: Policy | None) -> Objective:
    """A stage's loss."""
    if stage.kind == "reward_model":
        assert isinstance(model, RewardModel)
        return PairObjective(model, stage, recorder)
    assert isinstance(model, Policy)
    if stage.kind == "sft":
        return SFTObjective(model, stage, recorder)
    return RLObjective(model, stage, recorder, reference)


def write_model(
    config: RunConfig, stage: AnyStage, model: nn.Module, start: str | Path, tokenizer: Any, folder: Path
) -> None:
    """Write `folder/merged` and `folder/adapter`, and what a later stage starts from."""
    settings = model_config(config, stage)
    base_name = hub_name(config.model.name) if config.start_of(stage) is None else str(start)
    if isinstance(model, RewardModel):
        export_reward_model(model, start, base_name, settings, tokenizer, folder)
        return
    assert isinstance(model, Policy)
    export(model, start, base_name, settings, tokenizer, folder)
    later = config.stages[config.stages.index(stage) + 1 :]
    if settings.dtype != "float32" and any(config.start_of(s) == stage.name for s in later):
        write_start(folder, settings.dtype)


def start_folder(dtype: str) -> str:
    """Which folder of an exported model a later stage starts from."""
    return "merged" if dtype == "float32" else dtype
