"""Every setting of a run, once: typed, with its default, unit and meaning.

This module imports no torch, ray, vllm or deepspeed, so that a bad config is refused before anything heavy starts.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


# --------------------------------------------------------------------------------------------------------- model


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


# ---------------------------------------------------------------------------------------------------------- data


class BudgetConfig(Section):
    """What everything on one data set may cost together, over all runs that share the ledger."""

    epsilon: float = Field(gt=0, description="bound on all declared stages, composed; lowered freely, raised by hand")
    delta: float = Field(gt=0, lt=1, description="delta of that bound")


class DataConfig(Section):
    """One private source. The privacy budget belongs to the declared data set that it is part of: `dataset`."""

    dataset: str | None = Field(
        None,
        description="declared name of the data set that pays; sources with one name share one budget and compose "
        "(null: this source's own key)",
    )
    budget: BudgetConfig | None = Field(None, description="null: only the targets of the stages bound it")

    source: str = Field(
        "embedded:movie-reviews",
        description='"embedded:movie-reviews", a .jsonl(.gz)/.parquet/.csv path, or a hub name',
    )
    split: str = Field("train", description="split of a hub data set")
    columns: dict[Literal["prompt"], str] = Field(
        default_factory=dict, description="remap, e.g. {prompt: question}: our name -> column name in the source"
    )
    prompt_tokens: int | None = Field(
        None, ge=1, description="keep only the first n tokens of each prompt (a record-local public rule); null: whole"
    )
    max_prompt_tokens: int = Field(256, ge=1, description="a longer prompt becomes a null record")
    chat_template: bool = Field(False, description="wrap the prompt with the tokenizer's chat template")
    unit_column: str | None = Field(
        None,
        description="column with the real id of each row's unit; null: rows have no id (the embedded data have theirs)",
    )
    partitions: dict[str, float] = Field(
        default_factory=dict,
        description="disjoint shares of the units, e.g. {first: 0.5, second: 0.5}, by a keyed hash of the unit's id",
    )

    @model_validator(mode="after")
    def _partitioned(self) -> DataConfig:
        for name, fraction in self.partitions.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"partition {name!r}: use letters, digits, - and _")
            if fraction <= 0:
                raise ValueError(f"partitions.{name} is {fraction:g}: a fraction is above 0")
        if sum(self.partitions.values()) > 1 + 1e-9:
            raise ValueError(f"partitions add up to {sum(self.partitions.values()):g}: at most 1")
        if self.source.startswith("embedded:"):
            if self.unit_column is not None:
                raise ValueError(f"unit_column: {self.source} has ids of its own: leave it out")
        elif self.partitions and self.unit_column is None:
            raise ValueError("partitions go by a unit's real id: set unit_column to the column that holds it")
        return self


# ------------------------------------------------------------------------------------------------------- privacy


class PrivacyConfig(Section):
    """The guarantee of one stage. There is no default budget: a missing epsilon never means "no limit"."""

    mode: Literal["dp", "clip_only"] = Field(
        "dp", description="clip_only: a control with noise zero; its certificate says that nothing is guaranteed"
    )
    epsilon: float | None = Field(None, gt=0, description="target epsilon of the stage (required in mode dp)")
    delta: float = Field(1e-5, gt=0, lt=1)
    unit: Literal["record", "user"] = Field("record", description="who is protected; user is not supported yet")
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
        if self.mode == "clip_only" and self.epsilon is not None:
            raise ValueError("epsilon has no meaning in mode clip_only: remove it, or set mode: dp")
        if self.adjacency == "replace_one" and self.updates_per_draw > 1:
            raise ValueError("updates_per_draw > 1 is not supported under adjacency replace_one: use zero_out")
        if self.adjacency == "add_remove" and self.declared_size is None:
            raise ValueError("declared_size is required under adjacency add_remove (the true size is private)")
        return self

    @model_validator(mode="after")
    def _figure(self) -> PrivacyConfig:
        if self.unit == "user":
            raise ValueError("unit: user is not supported yet (`dprlhf plan` and `epsilon` account for it): use record")
        if self.records_per_user is not None:
            raise ValueError("records_per_user means nothing for unit record: remove it")
        if self.max_batch is not None and (self.adjacency == "add_remove" or self.updates_per_draw > 1):
            raise ValueError("max_batch has no figure under add_remove or with updates_per_draw > 1: remove it")
        if self.accounting == "adaptive":
            if self.mode == "clip_only":
                raise ValueError("accounting: adaptive means nothing in mode clip_only: remove it")
            if self.adjacency == "replace_one" or self.max_batch is not None:
                raise ValueError("accounting: adaptive has no figure under replace_one or max_batch: fixed_schedule")
        return self


# ----------------------------------------------------------------------------------------------------- algorithms


class AlgorithmConfig(Section):
    """Per-record policy loss; see `dprlhf_ray/algorithms/`."""

    kind: Literal["ppo", "rloo", "grpo", "reinforce"] = "rloo"
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
    kl_coef: float = Field(0.0, ge=0, description="KL to the frozen reference, per token, inside the record (0: none)")
    clip_range: float = Field(0.2, gt=0, description="ppo, grpo: ratio clip")
    gamma: float = Field(1.0, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    value_coef: float = Field(0.1, ge=0)

    @model_validator(mode="after")
    def _group(self) -> AlgorithmConfig:
        if self.kind in ("rloo", "grpo") and self.completions_per_prompt < 2:
            raise ValueError(f"completions_per_prompt must be at least 2 for {self.kind} (reinforce works with 1)")
        return self


class GenerationConfig(Section):
    """How completions are drawn."""

    max_new_tokens: int = Field(24, ge=1)
    temperature: float = Field(1.0, gt=0)
    stop_at_eos: bool = True


class ScorerConfig(Section):
    """The reward: a function of one record's text, stateless."""

    kind: Literal["sentiment_rule", "python"] = Field(
        "sentiment_rule", description="sentiment_rule: VADER compound score in [-1, 1]; python: your own function"
    )
    function: str | None = Field(None, description='python: "package.module:function", (prompt, completion) -> float')
    reward_bound: float = Field(1.0, gt=0, description="rewards are clipped to [-bound, bound], a public constant")

    @model_validator(mode="after")
    def _function(self) -> ScorerConfig:
        if self.kind == "python" and not self.function:
            raise ValueError('function is required for kind python, e.g. "my_rewards:score"')
        return self


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


class RLStage(Section):
    """Reinforcement learning on private prompts."""

    kind: Literal["rl"] = "rl"
    name: str = Field("rl", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    data: str = Field("reviews", description="name of a data set declared under `data`")
    partition: str | None = Field(
        None, description="the stage sees this partition of its data only (one of `data.NAME.partitions`); null: all"
    )
    privacy: PrivacyConfig
    algorithm: AlgorithmConfig = AlgorithmConfig(kind="reinforce")
    generation: GenerationConfig = GenerationConfig()
    scorer: ScorerConfig = ScorerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

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
        return self


# ------------------------------------------------------------------------------------------------- where it runs


class LearnerConfig(Section):
    """The learner group: Ray Train workers with DeepSpeed."""

    num_workers: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    use_gpu: bool = False
    micro_batch_tokens: int = Field(
        2048, ge=16, description="tokens (with padding) per micro-batch; speed and memory only"
    )
    gradient_checkpointing: bool = False
    threads: int | None = Field(
        None, ge=1, description="torch threads per worker (null: cores of the machine / num_workers)"
    )
    checkpoint_every: int = Field(1, ge=1, description="steps between checkpoints")
    max_failures: int = Field(3, ge=0, description="restarts of the learner group before the run gives up")


class RolloutConfig(Section):
    """The rollout fleet."""

    engine: Literal["vllm", "transformers"] = "vllm"
    replicas: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    gpus_per_replica: float = Field(0.0, ge=0)
    max_model_len: int = Field(512, ge=8, description="tokens of prompt and completion together")
    max_num_seqs: int = Field(128, ge=1)
    kv_cache_gib: float = Field(1.0, gt=0)
    threads: int | None = Field(None, ge=1, description="threads per engine (null: all cores of the machine)")
    sync_tolerance: float = Field(
        0.15,
        gt=0,
        description="largest root-mean-square difference of log-probabilities (nats), engine against learner; bfloat16 "
        "rounding alone gives about 0.08, float32 about 0.001",
    )


class EvaluationConfig(Section):
    """Public prompts: reward before and after, and samples. Costs no budget."""

    source: str = Field("embedded:public-openings", description="as data.source; public, disjoint from private data")
    prompts: int = Field(400, ge=2, description="number of public prompts scored before and after")
    every: int = Field(0, ge=0, description="also every n steps (0: only before and after)")
    samples: int = Field(4, ge=0, description="continuations shown before and after")


class RayConfig(Section):
    address: str | None = Field(None, description="cluster address; null starts Ray on this machine")
    dashboard: bool = False


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
    stages: Annotated[tuple[RLStage, ...], Field(min_length=1)]
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
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ: {names}")
        for s in self.stages:
            if s.data not in self.data:
                raise ValueError(
                    f"stage {s.name!r} uses data set {s.data!r}, which is not declared under data: {sorted(self.data)}"
                )
            if s.privacy.mode == "clip_only" and self.dataset_of(s.data) in budgets:
                raise ValueError(f"stage {s.name!r}: mode clip_only is refused on a data set with a budget: remove one")
            if s.partition is not None and s.partition not in self.data[s.data].partitions:
                raise ValueError(
                    f"stage {s.name!r} uses partition {s.partition!r}, which is not one of data.{s.data}.partitions: "
                    f"{sorted(self.data[s.data].partitions)}"
                )
            longest = self.data[s.data].prompt_tokens or self.data[s.data].max_prompt_tokens
            if longest + s.generation.max_new_tokens > self.rollout.max_model_len:
                raise ValueError(
                    f"rollout.max_model_len is {self.rollout.max_model_len}, but prompts of up to {longest} tokens and "
                    f"{s.generation.max_new_tokens} new tokens need {longest + s.generation.max_new_tokens}"
                )
        return self

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
