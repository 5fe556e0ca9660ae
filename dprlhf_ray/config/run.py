"""A whole run, and what its sections have to do with each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from dprlhf_ray.config.data import BudgetConfig, Column, DataConfig, Split
from dprlhf_ray.config.model import AdapterConfig, ModelConfig
from dprlhf_ray.config.resources import LearnerConfig, RayConfig, RolloutConfig
from dprlhf_ray.config.section import Section
from dprlhf_ray.config.stages import AnyStage
from dprlhf_ray.network import holds_database_password


class EvaluationConfig(Section):
    """Public prompts: reward before and after, and samples. Costs no budget."""

    source: str = Field("embedded:public-openings", description="as data.source; public, disjoint from private data")
    split: Split = Field("test", description="split of a hub data set, by its plain name: no slices")
    columns: dict[Column, str] = Field(
        default_factory=dict, description="as data.columns (empty: those of the stage's data set)"
    )
    prompts: int = Field(400, ge=2, description="number of public prompts scored before and after")
    every: int = Field(0, ge=0, description="also every n steps (0: only before and after)")
    samples: int = Field(4, ge=0, description="continuations shown before and after")


class TrackingConfig(Section):
    """Extra sinks for the released metrics."""

    tensorboard: bool = False
    wandb_project: str | None = None


class RunConfig(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$")
    seed: int = Field(
        0, ge=0, description="public randomness only (initial adapters, public evaluation); never protects anyone"
    )
    ledger: str | None = Field(
        None,
        description="path (SQLite) or PostgreSQL URL of a ledger shared by runs; null: ledger.db in the run directory",
    )
    ledger_key: str | None = Field(None, description="key file of the ledger; null: beside the ledger's file")
    ledger_anchor: str | None = Field(
        None, description="file outside the run directory that remembers the ledger's newest entry; null: none"
    )
    model: ModelConfig = ModelConfig()
    data: dict[str, DataConfig] = Field(default_factory=lambda: {"reviews": DataConfig()}, min_length=1)
    stages: Annotated[tuple[AnyStage, ...], Field(min_length=1)]
    learner: LearnerConfig = LearnerConfig()
    rollout: RolloutConfig = RolloutConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("ledger", "ledger_key", "ledger_anchor")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """One file, whatever folder a process works in."""
        return value if value is None or "://" in value else os.path.abspath(os.path.expanduser(value))

    @field_validator("ledger")
    @classmethod
    def _place(cls, value: str | None) -> str | None:
        if value and "://" in value and not value.startswith("postgresql"):
            raise ValueError("a URL means PostgreSQL (postgresql+psycopg://user@host/name): for SQLite, give a path")
        if value and holds_database_password(value):
            raise ValueError("a password in it would be in config.yaml: leave it out, and set PGPASSWORD or ~/.pgpass")
        return value

    @field_validator("data")
    @classmethod
    def _names(cls, value: dict[str, DataConfig]) -> dict[str, DataConfig]:
        for name in (*value, *(d.dataset for d in value.values() if d.dataset)):
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"data set name {name!r}: use letters, digits, - and _")
        return value

    @model_validator(mode="after")
    def _refs(self) -> RunConfig:
        if self.ledger and "://" in self.ledger and not self.ledger_key:
            raise ValueError("ledger_key is required with a database URL: the path of a file only you can read")
        budgets = self.budgets()
        for name, data in self.data.items():
            if not data.public and self.dataset_of(name) in (n for n, d in self.data.items() if d.public):
                raise ValueError(f"data.{name}.dataset: {data.dataset!r} is declared public: give another name")
        if self.rollout.transport == "nccl" and not self.learner.use_gpu:
            raise ValueError("rollout.transport: nccl needs learners on GPUs: learner.use_gpu is false")
        for s in self.stages:
            if s.kind == "rl" and self.rollout.weights == "adapter":
                self._check_served(s.name, self.adapter_of(s))
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ: {names}")
        units: dict[str, tuple[str, str]] = {}
        for i, s in enumerate(self.stages):
            self._check_stage(s, self.stages[:i], budgets)
            first = units.setdefault(self.dataset_of(s.data), (s.privacy.unit, s.name))
            if s.privacy.mode != "public" and first[0] != s.privacy.unit:
                raise ValueError(
                    f"stage {s.name!r}: unit {s.privacy.unit}, but stage {first[1]!r} on the same data set "
                    f"{self.dataset_of(s.data)!r} has unit {first[0]}: one data set has one unit"
                )
        return self

    def _check_served(self, stage: str, adapter: AdapterConfig) -> None:
        """vLLM serves no other adapters."""
        served = f"stage {stage!r}: rollout.weights: adapter, but"
        if adapter.kind == "full":
            raise ValueError(f"{served} it trains all weights: use merged")
        if adapter.rank > 512:
            raise ValueError(f"{served} its rank is {adapter.rank}, above 512: use merged")
        if "lm_head" in adapter.target_modules:
            raise ValueError(f"{served} it trains lm_head, with which engines could not be checked: use merged")

    def _check_stage(self, s: AnyStage, earlier: Sequence[AnyStage], budgets: Mapping[str, BudgetConfig]) -> None:
        for name in (s.data, *([s.heldout] if s.heldout else [])):
            if name not in self.data:
                raise ValueError(
                    f"stage {s.name!r} uses data set {name!r}, which is not declared under data: {sorted(self.data)}"
                )
        data = self.data[s.data]
        if s.privacy.mode == "public" and not data.public:
            raise ValueError(f"stage {s.name!r}: mode public needs data declared public: data.{s.data}.public is false")
        if s.privacy.mode != "public" and data.public:
            raise ValueError(f"stage {s.name!r}: data.{s.data} is declared public: set privacy.mode: public")
        if s.heldout is not None and not self.data[s.heldout].public:
            raise ValueError(f"stage {s.name!r}: heldout {s.heldout!r} is not declared public: data.{s.heldout}.public")
        if s.privacy.mode == "clip_only" and self.dataset_of(s.data) in budgets:
            raise ValueError(f"stage {s.name!r}: mode clip_only is refused on a data set with a budget: remove one")
        if s.privacy.unit == "user" and data.unit_column is None:
            raise ValueError(f"stage {s.name!r}: unit user needs data.{s.data}.unit_column, the column of users' ids")
        if s.partition is not None and s.partition not in data.partitions:
            raise ValueError(
                f"stage {s.name!r} uses partition {s.partition!r}, which is not one of data.{s.data}.partitions: "
                f"{sorted(data.partitions)}"
            )
        policies = [e.name for e in earlier if e.kind != "reward_model"]
        if s.start not in (None, "model", *policies):
            raise ValueError(f"stage {s.name!r}: start {s.start!r} is no earlier sft or rl stage: {policies or 'none'}")
        adjacency = s.privacy.adjacency
        moves_rows = adjacency == "add_remove" or (adjacency == "replace_one" and s.privacy.unit == "user")
        if moves_rows and data.rejected == "public" and s.kind == "reward_model":
            raise ValueError(
                f"stage {s.name!r}: rejected: public goes by a row's number, which a row more or less would change for "
                "all after it: use adjacency zero_out"
            )
        if adjacency == "replace_one" and s.partition is not None:
            raise ValueError(
                f"stage {s.name!r}: under replace_one a replaced unit may be of another partition, whose size would "
                "tell: use adjacency zero_out, or leave partition out"
            )
        longest = data.prompt_tokens or data.max_prompt_tokens
        new, what = data.max_completion_tokens, "completion tokens"
        if s.kind == "rl":
            new, what = s.generation.max_new_tokens, "new tokens"
            trained = [e.name for e in earlier if e.kind == "reward_model"]
            for scorer in s.scorer.flat():
                if scorer.stage is not None and scorer.stage not in trained:
                    raise ValueError(
                        f"stage {s.name!r}: scorer.stage {scorer.stage!r} is no earlier reward_model stage: "
                        f"{trained or 'none'}"
                    )
        if longest + new > self.rollout.max_model_len:
            raise ValueError(
                f"rollout.max_model_len is {self.rollout.max_model_len}, but prompts of up to {longest} tokens and "
                f"{new} {what} need {longest + new}"
            )

    def adapter_of(self, stage: AnyStage) -> AdapterConfig:
        """What trains in a stage."""
        return stage.adapter or self.model.adapter

    def start_of(self, stage: AnyStage) -> str | None:
        """Name of the earlier stage whose policy a stage starts from; None: model.name."""
        if stage.start is not None:
            return None if stage.start == "model" else stage.start
        before = self.stages[: self.stages.index(stage)]
        return next((s.name for s in reversed(before) if s.kind != "reward_model"), None)

    def budgets(self) -> dict[str, BudgetConfig]:
        """Budgets by declared data set; ValueError when two of its sources give it different ones."""
        found: dict[str, BudgetConfig] = {}
        for source, data in self.data.items():
            name = self.dataset_of(source)
            if data.budget is not None and found.setdefault(name, data.budget) != data.budget:
                raise ValueError(f"data.{source}.budget: data set {name!r} has another one: write one")
        return found

    def dataset_of(self, source: str) -> str:
        """Declared name of the data set that pays for a source (a key of `data`)."""
        return self.data[source].dataset or source
