"""The reward."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dprlhf_ray.config.section import Section
from dprlhf_ray.network import holds_secret


class ScorerConfig(Section):
    """The reward: a function of one record's text, stateless, shifted, scaled and clipped by public constants."""

    kind: Literal["sentiment_rule", "python", "reward_model", "classifier", "http", "ensemble"] = Field(
        "sentiment_rule",
        description="sentiment_rule: VADER compound score in [-1, 1]; python: your own function; reward_model: a "
        "sequence classifier's one number; classifier: log-odds of one label of a public classifier; http: an "
        "endpoint that gets one record at a time; ensemble: the mean of several",
    )
    function: str | None = Field(None, description='python: "package.module:function", (prompt, completion) -> float')
    stage: str | None = Field(None, description="reward_model: the earlier stage of this run that trained it")
    model: str | None = Field(None, description="reward_model, classifier: a folder or hub name, declared public")
    label: str | None = Field(None, description="classifier: the label whose log-odds are the reward, e.g. POSITIVE")
    url: str | None = Field(
        None, description='http: POST {"prompt", "completion"} answers {"reward": number}; https, or this machine'
    )
    sends_private_text: bool = Field(
        False, description="http: has to be true: prompts and completions leave the cluster, beyond the guarantee"
    )
    members: tuple[ScorerConfig, ...] = Field((), description="ensemble: at least two scorers")
    shift: float = Field(0.0, description="public constant, added first")
    scale: float = Field(1.0, description="public constant, multiplied then")
    standardise: bool = Field(
        False,
        description="then subtract the mean, and divide by the deviation, of the starting policy's rewards on the "
        "public evaluation prompts: two public constants, fixed before the first draw",
    )
    reward_bound: float = Field(
        1.0, gt=0, description="rewards are clipped to [-bound, bound] at last, a public constant"
    )
    length_penalty: float = Field(0.0, ge=0, description="taken off per generated token, before the clip")
    missing_eos_penalty: float = Field(0.0, ge=0, description="taken off a completion cut at max_new_tokens")

    @field_validator("url")
    @classmethod
    def _open(cls, value: str | None) -> str | None:
        if value and holds_secret(value):
            raise ValueError("a secret in it would be in config.yaml: leave it out, and set DPRLHF_SCORER_TOKEN")
        return value

    @model_validator(mode="after")
    def _needs(self) -> ScorerConfig:
        needs = {"python": "function", "classifier": "model", "http": "url", "ensemble": "members"}
        if (key := needs.get(self.kind)) and not getattr(self, key):
            example = {"function": ', e.g. "my_rewards:score"'}.get(key, "")
            raise ValueError(f"{key} is required for kind {self.kind}{example}")
        if self.kind == "reward_model" and (self.stage is None) == (self.model is None):
            raise ValueError("kind reward_model takes one of stage (of this run) and model (a folder or hub name)")
        if self.kind == "classifier" and not self.label:
            raise ValueError("label is required for kind classifier: one of the model's labels")
        if self.kind == "http" and not self.sends_private_text:
            raise ValueError("kind http sends prompts and completions to url: say so with sends_private_text: true")
        if self.kind == "ensemble" and len(self.members) < 2:
            raise ValueError("members: an ensemble has at least two scorers")
        return self

    def flat(self) -> tuple[ScorerConfig, ...]:
        """This scorer and all members."""
        return (self, *(m for member in self.members for m in member.flat()))
