"""One rank that replays many cases on real learners, without Ray: `python replay_process.py PLAN.json RANK`.

The plan names settings (config and step) and cases (draws, clip norm, baseline). Every draw starts from the same
weights, whatever the draw before has made of them; metric noise is zero. Rank r writes what the trainable weights
became after each draw, and rank 0 what was released.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"


def replay(
    setting: dict[str, Any], cases: list[dict[str, Any]], rank: int, world: int, run_dir: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights by "case/draw", released metrics by "case/draw") of the cases under one setting."""
    import torch
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    from dprlhf_ray import config_file
    from dprlhf_ray.actors.learner import Learner
    from dprlhf_ray.actors.learner_spec import LearnerSpec
    from dprlhf_ray.privacy.mechanism import DPStep
    from dprlhf_ray.privacy.permit import Permit
    from dprlhf_ray.stages import build
    from dprlhf_ray.stages.batching import deal
    from tests.actors import setting as settings

    config = config_file.parse(setting["config"])
    step = DPStep(**setting["step"])
    learner = Learner(LearnerSpec(config, 0, step, run_dir, ((5, 6, 7, 8),), config.model.name))
    parameters, zero = learner.recorder.parameters, config.learner.zero_stage

    def weights() -> torch.Tensor:
        with learner._gathered(parameters):
            return torch.cat([p.detach().flatten().clone() for p in parameters])

    def force(flat: torch.Tensor) -> None:
        """Every copy that DeepSpeed keeps: the parameters and the optimizer's shards of them."""
        parts = flat.split(learner.recorder.sizes)
        with learner._gathered(parameters, modify=True), torch.no_grad():
            for p, value in zip(parameters, parts, strict=True):
                p.copy_(value.view(p.shape))
        for p, value in zip(parameters, parts, strict=True):
            if zero == 3:  # shards are padded to equal lengths
                size = p.ds_tensor.ds_numel
                shard = torch.nn.functional.pad(value, (0, size * world - value.numel()))[rank * size :][:size]
                safe_set_local_fp32_param(p, shard)
            elif zero:
                safe_set_full_fp32_param(p, value.view(p.shape))

    # away from the start, where B = 0 hides gradients of A, the KL and the value head
    generator = torch.Generator().manual_seed(3)
    start = weights()
    start = start + 0.02 * torch.randn(start.shape, generator=generator)

    after: dict[str, Any] = {"start": start}
    released: dict[str, Any] = {}
    stage = learner.stage
    for case in cases:
        learner.objective.clip_norm = case.get("clip_norm", stage.privacy.clip_norm)
        for n, draw in enumerate(case["draws"]):
            force(start)
            learner.version = 0

            def redeem() -> Permit:
                permit = Permit.of("test", "rl", 1, step, "test")
                permit.metric_sigma = 0.0
                return permit

            share = deal(settings.draw(draw, 0, build.group_of(stage)), world)[rank]
            metrics = learner.update(share, 1, case.get("baseline", 0.1), redeem)
            after[f"{case['name']}/{n}"] = weights()
            released[f"{case['name']}/{n}"] = {m.name: m.value for m in metrics}
    return after, released


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    rank, world, out = int(sys.argv[2]), plan["world"], Path(plan["out"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(plan["port"]), RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_RANK=str(rank))  # fmt: skip
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for name, setting in plan["settings"].items():
        after, released = replay(setting, plan["cases"], rank, world, plan["out"])
        save_file(after, out / f"{name}.rank{rank}.safetensors")
        if rank == 0:
            (out / f"{name}.json").write_text(json.dumps(released))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
