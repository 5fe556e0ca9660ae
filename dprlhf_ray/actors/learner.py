"""One rank of the learner group: DeepSpeed around the model, and the order of one DP step.

The optimizer's gradient is written exactly once per update, from a noised value: the backward pass that DeepSpeed sees
is that of the surrogate sum_i <p_i, g_i>, whose gradient with respect to p is the noised g itself. Raw per-record
gradients never exist as `.grad` (see privacy/per_unit.py), so there is nothing else that DeepSpeed could reduce or
apply, at any ZeRO stage, with its default settings. Before the optimizer moves, the gradient it holds is compared with
what was written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file, save_file
from torch import Tensor

from dprlhf_ray.actors.compilers import compilers_of_this_environment, unlock_builds
from dprlhf_ray.actors.learner_spec import CHECK_SEQUENCES, LearnerSpec
from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import DprlhfError
from dprlhf_ray.models import adapters
from dprlhf_ray.models.optimizer import build_optimizer, set_lr
from dprlhf_ray.models.policy import sync_weights
from dprlhf_ray.models.precision import computed_in, learner_on_gpu
from dprlhf_ray.privacy.noise import noise_gradient, noise_metrics
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.privacy.permit import Permit
from dprlhf_ray.privacy.release import Released, release_means
from dprlhf_ray.records import Experience, Unit
from dprlhf_ray.run_dir import check_checkpoints
from dprlhf_ray.stages import batching, build
from dprlhf_ray.stages.objective import Draw

GRADIENT_BYTES = 256 << 20  # per-record gradients held at once; speed and memory only

compilers_of_this_environment()


class WriteCheckFailed(RuntimeError):
    """The optimizer held something other than the noised gradient; nothing was applied."""


class Learner:
    """Rank `rank` of `world`. Needs an initialised process group (gloo or nccl)."""

    def __init__(self, spec: LearnerSpec) -> None:
        config, self.spec = spec.config, spec
        os.umask(os.umask(0o022) | 0o022)  # a checkpoint that others may write is not read again
        if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
            unlock_builds(folder)
        self.stage = config.stages[spec.stage_index]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if config.learner.threads or not config.learner.use_gpu:
            torch.set_num_threads(config.learner.threads or max(1, (os.cpu_count() or 1) // self.world))
        torch.manual_seed(config.seed)
        self._agree_on_dtype()
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(spec.start, trust_remote_code=False)
        pad = self.tokenizer.pad_token_id
        self.pad_id = int(pad if pad is not None else self.tokenizer.eos_token_id)
        model = build.build_model(config, self.stage, spec.start, spec.public_sequences)
        if config.learner.gradient_checkpointing:
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator, union-attr]
            model.causal_lm.train()  # type: ignore[union-attr]
        if config.learner.use_gpu:
            model = model.cuda()
        trainable = [p for p in model.parameters() if p.requires_grad]
        noise_std = spec.step.noise_multiplier * spec.step.clip_norm / spec.step.expected_batch
        self.optimizer = build_optimizer(trainable, self.stage.optimizer, noise_std)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=_deepspeed_config(config, self.world),
            dist_init_required=False,
        )
        self.model: Any = self.engine.module
        self.recorder = Recorder(self.model)
        reference = build.build_reference(config, self.stage, spec.start)
        if reference is not None:
            reference = reference.to(self.engine.device)
        self.objective = build.build_objective(self.stage, self.model, self.recorder, reference)
        self.version = 0

    def _agree_on_dtype(self) -> None:
        """Raises DprlhfError where some ranks would hold bfloat16 weights and others float32."""
        own = computed_in(self.spec.config.model.dtype, learner_on_gpu())
        found: list[str] = [""] * self.world
        dist.all_gather_object(found, own)
        if len(set(found)) > 1:
            raise DprlhfError(
                "learner: only some ranks are on CPUs that compute in bfloat16 (AVX-512): set model.dtype to float32, "
                "or learner.node_labels to nodes of one kind"
            )

    # ------------------------------------------------------------------------------------------------- the DP step

    def update(self, units: Sequence[Unit], attempt: int, baseline: float, redeem: Any) -> list[Released]:
        """One draw: K updates, each clipped, summed over ranks, noised once, divided by the public expected batch.

        Args:
            units: this rank's share of the draw. PRIVATE.
            attempt: counted from 1; for schedules.
            baseline: a public constant or a released value.
            redeem: () -> Permit, called on rank 0 only, just before the first noise is drawn.

        Returns:
            The metrics released with this draw (rank 0; empty elsewhere, and where none were charged).
        """
        self._check_versions(units)
        draw = Draw(self._micro_batches(units), attempt, baseline)
        measured = self.spec.step.metric_noise_multiplier is not None
        permit: Permit | None = None
        released: list[Released] = []
        for k in range(self.spec.step.updates_per_draw):
            total, metrics = self.objective.clipped_sum(draw)
            self._sum_to_first(total.total)
            if measured and k == 0:
                self._sum_to_first(metrics)
            value = torch.empty_like(total.total, dtype=torch.float32)
            if self.rank == 0:
                permit = permit or self._checked(redeem())
                value = noise_gradient(total.total, permit).value
                if measured and k == 0:
                    released = self._release(metrics, permit)
            dist.broadcast(value, 0)
            self._write_and_step(value / self.spec.step.expected_batch)
        self.version += 1
        return released

    def _check_versions(self, units: Sequence[Unit]) -> None:
        """Completions are of this version, or of one that is older by no more than was agreed, and then they come with
        the log-probabilities that weigh them."""
        bound = self.spec.config.rollout.staleness
        for c in (c for unit in units for e in unit for c in e.completions):
            if c.version is None:
                continue
            if not 0 <= self.version - c.version <= bound or (bound and c.log_probs is None):
                raise RuntimeError(
                    f"completions of weight version {c.version} reached a learner at version {self.version}"
                )

    def _checked(self, permit: Permit) -> Permit:
        """What was charged has to be what was clipped."""
        step = self.spec.step
        if (permit.clip_norm, permit.updates) != (step.clip_norm, step.updates_per_draw):
            raise RuntimeError("the permit is for another clip norm or number of updates; nothing was released")
        return permit

    def _micro_batches(self, units: Sequence[Unit]) -> list[batching.MicroBatch]:
        group = build.group_of(self.stage)
        max_units = max(1, GRADIENT_BYTES // (4 * self.recorder.dimension))
        batches = batching.plan(units, group, self.spec.config.learner.micro_batch_tokens, max_units, self.pad_id)
        count = torch.tensor(len(batches), device=self.engine.device)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return batches + [batching.empty(group, self.pad_id)] * (int(count) - len(batches))

    def evaluate(self, public: Sequence[Experience]) -> list[float]:
        """Quality of the present weights on each of these PUBLIC records, in their order; every rank computes all."""
        units = [(e,) for e in public]
        tokens, group = self.spec.config.learner.micro_batch_tokens, build.group_of(self.stage)
        batches = batching.plan(units, group, tokens, len(units), self.pad_id)
        found = torch.cat([self.objective.quality(b.to(self.engine.device)) for b in batches]).tolist()
        return [value for _, value in sorted(zip(batching.order(units), found, strict=True))]

    def _sum_to_first(self, x: Tensor) -> None:
        if self.world > 1:
            dist.reduce(x, 0, dist.ReduceOp.SUM)

    def _release(self, metrics: Tensor, permit: Permit) -> list[Released]:
        own = self.objective.metrics
        return release_means(noise_metrics(metrics, permit, own.bound), own.scales, self.spec.step)

    def _write_and_step(self, gradient: Tensor) -> None:
        """Hand `gradient` (d,) to the optimizer as the whole gradient, check that it arrived, step."""
        if not torch.isfinite(gradient).all():
            raise WriteCheckFailed("the noised gradient is not finite; nothing was applied")
        set_lr(self.engine.optimizer, self.stage.optimizer, self.version, self.spec.step.steps)
        parts = gradient.split(self.recorder.sizes)
        with self._gathered(self.recorder.parameters):
            pairs = list(zip(self.recorder.parameters, parts, strict=True))
            self.engine.backward(torch.stack([(p * g.view(p.shape).to(p.dtype)).sum() for p, g in pairs]).sum())
        for name, p, g in zip(self.recorder.names, self.recorder.parameters, parts, strict=True):
            held = safe_get_full_grad(p)
            if held is None or not torch.allclose(held.flatten().float(), g, rtol=1e-4, atol=1e-12):
                raise WriteCheckFailed(f"{name}: the optimizer does not hold the noised gradient; nothing was applied")
        self.engine.step()

    @contextlib.contextmanager
    def _gathered(self, parameters: Sequence[torch.nn.Parameter], modify: bool = False) -> Iterator[None]:
        """Full parameters on every rank (ZeRO-3 partitions them)."""
        if self.spec.config.learner.zero_stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if modify else None):
            yield

    # ---------------------------------------------------------------------------------------------------- weights

    def weights(self) -> tuple[int, dict[str, Tensor]]:
        """(version, what changed) as the rollout engines take it: merged weights by their Hugging Face names, or the
        adapter's factors."""
        with self._gathered(list(self.model.parameters())):
            if self.spec.config.rollout.weights == "adapter":
                return self.version, adapters.served_factors(self.model.model)
            return self.version, sync_weights(self.model, getattr(torch, self.spec.config.model.dtype))

    def public_log_probs(self) -> list[list[float]]:
        """log-probabilities of tokens 1.. of the fixed public sequences, under the current weights."""
        sequences = self.spec.public_sequences[:CHECK_SEQUENCES]
        width = max(len(s) for s in sequences)
        ids = torch.tensor([[*s, *[self.pad_id] * (width - len(s))] for s in sequences], device=self.engine.device)
        with torch.no_grad():
            scored = self.model(ids, torch.ones(len(ids), dtype=torch.long, device=ids.device), ids[:, 1:])
        return [row[: len(s) - 1] for row, s in zip(scored.log_probs.tolist(), sequences, strict=True)]

    def export(self, folder: str) -> None:
        """Write the released model (adapter, merged model, tokenizer); rank 0 writes."""
        with self._gathered(list(self.model.parameters())):
            if self.rank == 0:
                config = self.spec.config
                build.write_model(config, self.stage, self.model, self.spec.start, self.tokenizer, Path(folder))
        dist.barrier()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, attempt: int, ledger_head: str) -> None:
        """Write a checkpoint of released values only: trainable weights, optimizer state, no random-number state."""
        root = Path(self.spec.run_dir) / "checkpoints" / self.stage.name
        final, partial = root / f"version-{self.version:06d}", root / f".partial-{self.version:06d}"
        self.engine.save_checkpoint(str(partial), tag="state", exclude_frozen_parameters=True, save_latest=False)
        with self._gathered(list(self.model.parameters())):
            frozen = adapters.frozen_parts(self.model) if self.rank == 0 else {}
        dist.barrier()
        if self.rank == 0:
            if frozen:
                save_file({k: v.contiguous() for k, v in frozen.items()}, partial / "frozen.safetensors")
            meta = {"version": self.version, "attempt": attempt, "world": self.world, "ledger_head": ledger_head,
                    "zero_stage": self.spec.config.learner.zero_stage}  # fmt: skip
            (partial / "meta.json").write_text(json.dumps(meta))
            if final.exists():
                _remove(final)
            os.replace(partial, final)
            for old in sorted(root.glob("version-*"))[:-2]:
                _remove(old)
        dist.barrier()

    def restore(self) -> int:
        """Load the newest complete checkpoint; returns its version (0: none).

        Raises:
            RuntimeError: the checkpoint was written by another number of workers or at another ZeRO stage.
        """
        root = Path(self.spec.run_dir) / "checkpoints" / self.stage.name
        found = sorted(root.glob("version-*/meta.json"))
        if not found:
            return 0
        check_checkpoints(Path(self.spec.run_dir))
        folder, meta = found[-1].parent, json.loads(found[-1].read_text())
        here = {"world": self.world, "zero_stage": self.spec.config.learner.zero_stage}
        for key, value in here.items():
            if meta[key] != value:
                raise RuntimeError(f"checkpoint {folder} was written with {key} {meta[key]}, this run has {value}")
        if (folder / "frozen.safetensors").exists():
            with self._gathered([p for p in self.model.parameters() if not p.requires_grad], modify=True):
                adapters.load_frozen_parts(self.model, load_file(folder / "frozen.safetensors"))
        path, _ = self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=False)
        if path is None:
            raise RuntimeError(f"checkpoint {folder} cannot be read")
        self.version = int(meta["version"])
        return self.version

    def info(self) -> dict[str, Any]:
        return {"version": self.version, "trainable": self.recorder.dimension}


def _deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.learner.zero_stage, "overlap_comm": False},
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
