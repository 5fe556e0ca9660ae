"""One rank of a learner without Ray, for tests: `python learner_process.py CASE.json RANK`.

Builds the real Learner (real DeepSpeed, real process group), applies updates to fixed experiences and writes what the
published weights became.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(sys.argv[2]), case["world"]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(case["port"]), RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_RANK=str(rank))  # fmt: skip
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    from dprlhf_ray import config_file
    from dprlhf_ray.actors.learner import Learner
    from dprlhf_ray.actors.learner_spec import LearnerSpec
    from dprlhf_ray.privacy.mechanism import DPStep
    from dprlhf_ray.privacy.permit import Permit
    from dprlhf_ray.stages.batching import deal
    from dprlhf_ray.stages.build import group_of
    from tests.actors.setting import draw

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    config = config_file.parse(case["config"])
    spec = LearnerSpec(config, 0, DPStep(**case["step"]), case["out"], ((5, 6, 7, 8),), config.model.name)
    learner = Learner(spec)
    if case.get("restore"):
        learner.restore()
    trajectory = []
    for attempt, unit_rows in enumerate(case["draws"]):
        units = draw(unit_rows, learner.version, group_of(config.stages[0]))
        share = deal(units, world)[rank]

        def redeem(attempt: int = attempt) -> Permit:
            permit = Permit.of(f"test-{attempt}", "rl", attempt, spec.step, "test")
            return replace(permit, sigma=case.get("permit_sigma", permit.sigma))  # noise off, all else as planned

        released = learner.update(share, attempt + 1, case.get("baseline", 0.0), redeem)
        if rank == 0:
            trajectory.append([r.as_dict() for r in released])
    _, weights = learner.weights()
    with learner._gathered(learner.recorder.parameters):
        raw = {n: p.detach().clone() for n, p in zip(learner.recorder.names, learner.recorder.parameters, strict=True)}
    if case.get("save"):
        learner.save(len(case["draws"]), "0" * 64)
    save_file({f"trained/{n}": v.contiguous() for n, v in raw.items()}
              | {f"published/{n}": v.contiguous() for n, v in weights.items()},
              f"{case['out']}/rank{rank}.safetensors")  # fmt: skip
    Path(case["out"], f"rank{rank}.json").write_text(
        json.dumps({"released": trajectory, "log_probs": learner.public_log_probs(), "version": learner.version})
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
