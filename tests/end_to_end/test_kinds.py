"""The whole pipeline with the other algorithms, adapters, ranks and ZeRO stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dprlhf_ray import config_file, pipeline
from tests.end_to_end.runs import World, attempts, final_version


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "adapter", "updates", "workers", "zero"),
    [
        ("ppo", "lora", 2, 2, 2),
        ("grpo", "ffa_lora", 1, 1, 0),
        ("rloo", "steering", 1, 2, 3),
        ("reinforce", "full", 1, 1, 0),
    ],
)
def test_a_run_with_every_algorithm_and_adapter(
    algorithm: str, adapter: str, updates: int, workers: int, zero: int, world: World, tmp_path: Path
) -> None:
    """False: a combination that the config accepts cannot be run, or is charged something else than planned."""
    tree = world.tree(2, learner__num_workers=workers, learner__zero_stage=zero)
    tree["model"]["adapter"] = {"kind": adapter, "rank": 2, "target_modules": ["down_proj", "q_proj"]}
    stage = tree["stages"][0]
    stage["algorithm"] = {"kind": algorithm, "completions_per_prompt": 2, "kl_coef": 0.05}
    stage["privacy"]["updates_per_draw"] = updates
    pipeline.run(config_file.parse(tree), tmp_path / "out")
    assert attempts(tmp_path / "out") == [1, 2] and final_version(tmp_path / "out") == 2
    (found,) = json.loads((tmp_path / "out" / "certificate.json").read_text())["stages"]
    assert found["mechanism"]["updates_per_draw"] == updates and found["epsilon"]["pld"] <= 6.0
