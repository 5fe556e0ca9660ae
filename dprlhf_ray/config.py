"""Every setting of a run, once: typed, with its default, unit and meaning.

This module imports no torch, ray, vllm or deepspeed, so that a bad config is refused before anything heavy starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dprlhf_ray.network import holds_database_password, holds_secret


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """true is not the number 1."""
        annotation = str(cls.model_fields[info.field_name].annotation) if info.field_name else ""
        parts = value if isinstance(value, list | tuple) else [value]
        if isinstance(value, dict):
            parts = list(value.values()) if annotation.startswith("dict") else []  # a section checks its own
        for part in parts if "bool" not in annotation else ():
            if isinstance(part, bool):
                raise ValueError(f"should not be {str(part).lower()}")
        return value


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


Column = Literal["prompt", "completion", "chosen", "rejected", "text", "messages"]


def _plain(split: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", split) or split.lower() == "all":
        raise ValueError(f"{split!r} is not the plain name of a split: slices and sums could overlap unseen")
    return split


Split = Annotated[str, AfterValidator(_plain)]


class DataConfig(Section):
    """One source. The privacy budget belongs to the declared data set that it is part of: `dataset`."""

    public: bool = Field(
        False, description="declared public: nothing in it is protected, stages on it cost nothing, and it may be shown"
    )
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
    split: Split = Field("train", description="split of a hub data set, by its plain name: no slices")
    columns: dict[Column, str] = Field(
        default_factory=dict, description="remap, e.g. {prompt: question}: our name -> column name in the source"
    )
    rejected: Literal["column", "truncated", "public"] = Field(
        "column",
        description="pairs: the rejected response is a column's; or, where nobody compared any, the first third of the "
        "chosen one (truncated), or a completion of `rejected_source` (public)",
    )
    rejected_source: str | None = Field(None, description="rejected public: a public source with column completion")
    prompt_tokens: int | None = Field(
        None, ge=1, description="keep only the first n tokens of each prompt (a record-local public rule); null: whole"
    )
    max_prompt_tokens: int = Field(256, ge=1, description="a longer prompt becomes a null record")
    max_completion_tokens: int = Field(
        256, ge=1, description="a longer demonstration or response is cut there (a record-local public rule)"
    )
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
        if self.public and (self.budget is not None or self.dataset is not None):
            raise ValueError("public: data declared public has no budget and belongs to no private data set: remove it")
        if (self.rejected == "public") != (self.rejected_source is not None):
            raise ValueError("rejected_source goes with rejected: public, and the other way round")
        return self


# ------------------------------------------------------------------------------------------------------- privacy


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


# ----------------------------------------------------------------------------------------------------- algorithms


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
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="only on nodes with these Ray labels, e.g. {dprlhf-role: learners}"
    )
    checkpoint_every: int = Field(1, ge=1, description="steps between checkpoints")
    max_failures: int = Field(3, ge=0, description="restarts of the learner group before the run gives up")


class RolloutConfig(Section):
    """The rollout fleet."""

    engine: Literal["vllm", "transformers"] = "vllm"
    replicas: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    gpus_per_replica: float = Field(0.0, ge=0)
    node_labels: dict[str, str] = Field(
        default_factory=dict, description="only on nodes with these Ray labels, e.g. {dprlhf-role: rollouts}"
    )
    max_model_len: int = Field(512, ge=8, description="tokens of prompt and completion together")
    max_num_seqs: int = Field(128, ge=1)
    kv_cache_gib: float = Field(1.0, gt=0)
    threads: int | None = Field(None, ge=1, description="threads per engine (null: all cores of the machine)")
    transport: Literal["objects", "nccl", "gloo"] = Field(
        "objects",
        description="how weights reach the engines: objects: Ray's shared memory and its own transfers, any cluster; "
        "nccl: from GPU to GPU; gloo: a process group between hosts without GPUs",
    )
    weights: Literal["merged", "adapter"] = Field(
        "merged",
        description="what is sent: every changed matrix with the adapter merged into it, any engine; or the adapter's "
        "factors alone, which vLLM serves as a LoRA (small messages, slower tokens)",
    )
    staleness: int = Field(
        0,
        ge=0,
        le=8,
        description="draws generated ahead, while learners work, so with weights older by this many versions (always "
        "exactly so many, whatever takes how long); 0: strictly on-policy",
    )
    sync_tolerance: float = Field(
        0.15,
        gt=0,
        description="largest root-mean-square difference of log-probabilities (nats), engine against learner; bfloat16 "
        "rounding alone gives about 0.08, float32 about 0.001",
    )

    @model_validator(mode="after")
    def _can_be_sent(self) -> RolloutConfig:
        if self.weights == "adapter" and self.engine != "vllm":
            raise ValueError(f"weights: adapter is served by vLLM only: engine is {self.engine}; use weights: merged")
        if self.transport == "nccl" and not self.gpus_per_replica:
            raise ValueError("transport: nccl needs GPUs: gpus_per_replica is 0; use objects, or gloo")
        if self.transport == "nccl" and self.tensor_parallel_size > 1:
            raise ValueError(
                "transport: nccl sends to engines on one GPU: with tensor_parallel_size above 1 use objects"
            )
        return self


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
