"""Where a run runs: learners, rollouts and Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dprlhf_ray.config.section import Section


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
    scorer_gpus: int = Field(
        0, ge=0, description="GPUs for the scorer's models, shared with nobody (0: they run on CPUs)"
    )
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


class RayConfig(Section):
    address: str | None = Field(None, description="cluster address; null starts Ray on this machine")
    dashboard: bool = False
