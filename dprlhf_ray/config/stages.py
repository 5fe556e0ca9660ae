"""Stages by kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dprlhf_ray.config.algorithm import AlgorithmConfig, GenerationConfig, OptimizerConfig
from dprlhf_ray.config.model import AdapterConfig
from dprlhf_ray.config.privacy import PrivacyConfig
from dprlhf_ray.config.scorer import ScorerConfig
from dprlhf_ray.config.section import Section


class Stage(Section):
    """What all stages have in common."""

    name: str = Field("stage", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    data: str = Field("reviews", description="name of a data set declared under `data`")
    partition: str | None = Field(
        None, description="the stage sees this partition of its data only (one of `data.NAME.partitions`); null: all"
    )
    privacy: PrivacyConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig | None = Field(None, description="null: model.adapter")
    start: str | None = Field(
        None,
        description='weights to start from: an earlier sft or rl stage, or "model" (null: the newest such stage, else '
        "the model)",
    )
    heldout: str | None = Field(
        None, description="sft, reward_model: a public data set that is evaluated before and after (null: none)"
    )


class SFTStage(Stage):
    """Supervised fine-tuning on demonstrations: columns prompt and completion, or text, or messages."""

    kind: Literal["sft"]
    name: str = Field("sft", pattern=r"^[a-z0-9][a-z0-9_-]*$")


class RewardModelStage(Stage):
    """A Bradley-Terry reward model on pairs: columns chosen, rejected, and prompt or none. A pair is one record."""

    kind: Literal["reward_model"]
    name: str = Field("reward_model", pattern=r"^[a-z0-9][a-z0-9_-]*$")


class RLStage(Stage):
    """Reinforcement learning on prompts."""

    kind: Literal["rl"] = "rl"
    name: str = Field("rl", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    algorithm: AlgorithmConfig = AlgorithmConfig()
    generation: GenerationConfig = GenerationConfig()
    scorer: ScorerConfig = ScorerConfig()

    @model_validator(mode="after")
    def _released_baseline(self) -> RLStage:
        if (
            self.algorithm.kind == "reinforce"
            and self.algorithm.baseline == "released_mean"
            and self.privacy.metrics_share == 0
        ):
            raise ValueError(
                "algorithm.baseline released_mean needs released metrics: metrics_share above 0, or constant"
            )
        if self.algorithm.mask_truncated and not self.generation.stop_at_eos:
            raise ValueError("algorithm.mask_truncated with stop_at_eos false: no completion would ever finish")
        if self.heldout is not None:
            raise ValueError("heldout is for kinds sft and reward_model: rl is evaluated on evaluation.source")
        return self


def _kind(value: Any) -> str:
    """Of a stage; a stage without one is rl."""
    return str(value.get("kind", "rl") if isinstance(value, dict) else getattr(value, "kind", "rl"))


AnyStage = Annotated[
    Annotated[RLStage, Tag("rl")] | Annotated[SFTStage, Tag("sft")] | Annotated[RewardModelStage, Tag("reward_model")],
    Discriminator(_kind),
]
STAGES: dict[str, type[Stage]] = {"rl": RLStage, "sft": SFTStage, "reward_model": RewardModelStage}
