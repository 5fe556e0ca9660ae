"""The policy before training, and which of its numbers are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dprlhf_ray.config.section import Section


class AdapterConfig(Section):
    """Which numbers are trained."""

    kind: Literal["lora", "ffa_lora", "lora_xs", "steering", "full"] = Field(
        "lora",
        description="lora: A and B; ffa_lora: B only, A frozen (Sun et al. 2024); lora_xs: an r x r core between the "
        "frozen singular vectors of each matrix (Balazy et al. 2024), very few numbers; steering: one output vector "
        "per matrix, keyed by its mean input on public text (rank 1); full: all weights.",
    )
    rank: int = Field(4, ge=1, description="rank r of the update")
    alpha: float = Field(8.0, gt=0, description="the update is scaled by alpha / rank")
    target_modules: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1, description="suffixes of linear layers")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="numbers of the transformer layers to adapt, from 0 (null: all)"
    )


class ModelConfig(Section):
    """The policy before training."""

    name: str = Field("embedded", description='"embedded", a local folder in Hugging Face format, or a hub name')
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of the frozen base weights")
    adapter: AdapterConfig = AdapterConfig()
