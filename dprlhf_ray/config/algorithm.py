"""What an RL stage does with a draw, and what every stage does with a noised gradient."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dprlhf_ray.config.section import Section


class AlgorithmConfig(Section):
    """Per-record policy loss; see `dprlhf_ray/algorithms/`."""

    kind: Literal["ppo", "rloo", "grpo", "reinforce", "reinforce_pp"] = "reinforce"
    completions_per_prompt: int = Field(
        1, ge=1, description="G: completions of one prompt; together they are one record"
    )
    baseline: Literal["constant", "released_mean"] = Field(
        "released_mean",
        description="reinforce: a public constant, or the mean reward released (noised, charged) by earlier steps",
    )
    baseline_value: float = Field(
        0.0,
        description="reinforce: the constant (before there is a released mean, the mean of the public prompts is used)",
    )
    advantage_scale: float | None = Field(
        None,
        gt=0,
        description="advantages are divided by this public constant (null: 1, but grpo by its group's own deviation)",
    )
    clip_range: float = Field(0.2, gt=0, description="ppo, grpo, reinforce_pp: the ratio is clipped at 1 - this, below")
    clip_range_high: float | None = Field(
        None, gt=0, description="ppo, grpo, reinforce_pp: and at 1 + this, above (null: as clip_range)"
    )
    normalisation: Literal["own_length", "group_tokens", "max_length", "sum"] = Field(
        "own_length",
        description="own_length: mean over each completion's own tokens; group_tokens: sum over a record's tokens / "
        "their number; max_length: sum over a completion's tokens / max_new_tokens; sum: that sum alone",
    )
    mask_truncated: bool = Field(
        False, description="completions cut at max_new_tokens give no policy gradient (their rewards stay in the group)"
    )
    importance_cap: float = Field(
        2.0, ge=1, description="completions of an older policy: per-token importance weights are truncated there"
    )
    kl_coef: float = Field(0.0, ge=0, description="KL to the frozen reference, per token, inside the record (0: none)")
    kl_in: Literal["loss", "reward"] | None = Field(None, description="null: the reward for ppo, the loss otherwise")
    kl_estimator: Literal["k1", "k2", "k3"] | None = Field(
        None,
        description="with d = log(policy / reference): k1: d; k2: d^2 / 2; k3: exp(-d) + d - 1 (null: k1 in the "
        "reward; in the loss k2 for reinforce_pp, k3 otherwise)",
    )
    kl_schedule: Literal["constant", "linear"] = Field(
        "constant", description="linear: kl_coef falls to 0 over the stage's attempts"
    )
    gamma: float = Field(1.0, ge=0, le=1, description="ppo: discount")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="ppo: lambda of generalised advantage estimation")
    value_coef: float = Field(0.1, ge=0, description="ppo: weight of the value loss")

    CLIPPED: ClassVar[tuple[str, ...]] = ("ppo", "grpo", "reinforce_pp")
    ONLY_FOR: ClassVar[dict[str, tuple[str, ...]]] = {
        "baseline": ("reinforce",),
        "baseline_value": ("reinforce",),
        "clip_range": CLIPPED,
        "clip_range_high": CLIPPED,
        "gamma": ("ppo",),
        "gae_lambda": ("ppo",),
        "value_coef": ("ppo",),
    }

    @model_validator(mode="after")
    def _group(self) -> AlgorithmConfig:
        if self.kind in ("rloo", "grpo", "reinforce_pp") and self.completions_per_prompt < 2:
            raise ValueError(f"completions_per_prompt must be at least 2 for {self.kind} (reinforce works with 1)")
        return self

    @model_validator(mode="after")
    def _meaning(self) -> AlgorithmConfig:
        def changed(key: str) -> bool:
            return bool(getattr(self, key) != AlgorithmConfig.model_fields[key].default)

        for key, kinds in self.ONLY_FOR.items():
            if self.kind not in kinds and changed(key):
                raise ValueError(f"{key} means nothing for {self.kind}: remove it (it is for {', '.join(kinds)})")
        for key in ("kl_in", "kl_estimator", "kl_schedule"):
            if not self.kl_coef and changed(key):
                raise ValueError(f"{key} means nothing while kl_coef is 0: remove it, or set kl_coef above 0")
        if (self.kl_place, self.kl_kind) == ("loss", "k1"):
            raise ValueError(
                "kl_estimator k1 in the loss has no gradient in expectation: use k2 or k3, or kl_in: reward"
            )
        return self

    @property
    def kl_place(self) -> Literal["loss", "reward"]:
        """`kl_in`, resolved."""
        return self.kl_in or ("reward" if self.kind == "ppo" else "loss")

    @property
    def kl_kind(self) -> Literal["k1", "k2", "k3"]:
        """`kl_estimator`, resolved."""
        in_loss: Literal["k2", "k3"] = "k2" if self.kind == "reinforce_pp" else "k3"
        return self.kl_estimator or ("k1" if self.kl_place == "reward" else in_loss)


class GenerationConfig(Section):
    """How completions are drawn."""

    max_new_tokens: int = Field(24, ge=1)
    temperature: float = Field(1.0, gt=0)
    stop_at_eos: bool = True


class OptimizerConfig(Section):
    """What is done with the noised gradient (post-processing)."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-2, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    noise_corrected: bool = Field(
        False, description="adamw: subtract the noise's variance from the second moment (Tang et al. 2024, DP-AdamBC)"
    )

    @model_validator(mode="after")
    def _correction(self) -> OptimizerConfig:
        if self.noise_corrected and self.kind != "adamw":
            raise ValueError(f"noise_corrected has no meaning for kind {self.kind}: remove it, or set kind: adamw")
        return self
