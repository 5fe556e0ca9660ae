"""The guarantee of a stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dprlhf_ray.config.section import Section


class PrivacyConfig(Section):
    """The guarantee of one stage. There is no default budget: a missing epsilon never means "no limit"."""

    mode: Literal["dp", "clip_only", "public"] = Field(
        "dp",
        description="clip_only: a control with noise zero; its certificate says that nothing is guaranteed; public: a "
        "stage on data declared public, without noise and free of charge",
    )
    epsilon: float | None = Field(None, gt=0, description="target epsilon of the stage (required in mode dp)")
    delta: float = Field(1e-5, gt=0, lt=1)
    unit: Literal["record", "user"] = Field(
        "record", description="who is protected: a record, or all records of one id in the data's unit_column together"
    )
    records_per_draw: int = Field(
        4, ge=1, description="unit user: a drawn user brings at most this many records, chosen at random"
    )
    records_per_user: int | None = Field(
        None, ge=1, description="unit user: records are sampled, and a user owns at most this many (null: users are)"
    )
    adjacency: Literal["zero_out", "add_remove", "replace_one"] = "zero_out"
    clip_norm: float = Field(0.1, gt=0, description="C: bound on one unit's gradient (L2, all trainable parameters)")
    expected_batch: int = Field(400, ge=1, description="L = q N: expected units per draw, a public constant")
    steps: int = Field(20, ge=1, description="T: number of attempts (draws) planned and charged")
    updates_per_draw: int = Field(1, ge=1, description="K: updates on one draw, all charged up front")
    max_batch: int | None = Field(
        None, ge=1, description="cap on a draw, charged as truncated Poisson sampling; near the mean it is ruinous"
    )
    accounting: Literal["fixed_schedule", "adaptive"] = Field(
        "fixed_schedule",
        description="fixed_schedule: certifies the PLD epsilon of the schedule; adaptive: sigma and q may follow "
        "released values, a Renyi filter is the gate, and its epsilon is certified",
    )
    metrics_share: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="share of a draw's precision (1/sigma^2) that the private metrics get; 0: none is released",
    )
    declared_size: int | None = Field(
        None, ge=2, description="add_remove only: a declared constant that stands for the private data set size"
    )
    allow_large_delta: bool = Field(False, description="accept delta >= 1/N")
    noise: Literal["gaussian", "secure"] = Field(
        "gaussian",
        description="secure: sum and noise rounded to a public grid, so that no low bit of what is released tells "
        "anything of the data",
    )

    @model_validator(mode="after")
    def _budget(self) -> PrivacyConfig:
        if self.mode == "dp" and self.epsilon is None:
            raise ValueError("epsilon is not set: give a target such as 8.0 (a missing epsilon never means no limit)")
        if self.mode != "dp" and self.epsilon is not None:
            raise ValueError(f"epsilon has no meaning in mode {self.mode}: remove it, or set mode: dp")
        if self.adjacency == "replace_one" and self.updates_per_draw > 1:
            raise ValueError("updates_per_draw > 1 is not supported under adjacency replace_one: use zero_out")
        if self.adjacency == "add_remove" and self.declared_size is None:
            raise ValueError("declared_size is required under adjacency add_remove (the true size is private)")
        return self

    @model_validator(mode="after")
    def _figure(self) -> PrivacyConfig:
        if self.records_per_user is not None and self.unit == "record":
            raise ValueError("records_per_user means nothing for unit record: remove it")
        if self.max_batch is not None and (self.adjacency == "add_remove" or self.updates_per_draw > 1):
            raise ValueError("max_batch has no figure under add_remove or with updates_per_draw > 1: remove it")
        if self.accounting == "adaptive":
            if self.mode != "dp":
                raise ValueError(f"accounting: adaptive means nothing in mode {self.mode}: remove it")
            if self.adjacency == "replace_one" or self.max_batch is not None:
                raise ValueError("accounting: adaptive has no figure under replace_one or max_batch: fixed_schedule")
        return self
