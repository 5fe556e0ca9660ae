"""Starts the processes of `replay_process.py` and reads what they found."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT
from typing import Any

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("replay_process.py")
CLIP, BATCH = 0.05, 8
Unit = tuple[list[int], list[list[int]], list[float | None]]  # prompt, two completions, two rewards


def units(count: int, seed: int, longest: int = 8) -> list[Unit]:
    """Units of uneven lengths; the one in the middle is `longest` tokens in prompt and completions each."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 250) for _ in range(rng.randint(low, high))]

    found: list[Unit] = [
        (tokens(2, 6), [tokens(1, 8), tokens(1, 8)], [rng.uniform(-1, 1), rng.uniform(-1, 1)]) for _ in range(count)
    ]
    if count:
        found[count // 2] = (tokens(longest, longest), [tokens(longest, longest) for _ in range(2)], [0.9, -0.7])
    return found


def setting(
    model: Path, world: int, zero: int, algorithm: str, cases: list[dict[str, Any]], sigma: float = 0.0, rank: int = 2
) -> dict[str, Any]:
    """One learner and its cases: plain SGD, learning rate 1, so that a weight difference is the released sum / L."""
    adapter = {"kind": "lora", "rank": rank, "alpha": 4.0, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    stage = {
        "privacy": {"mode": "clip_only", "clip_norm": CLIP, "expected_batch": BATCH, "steps": 9},
        "algorithm": {"kind": algorithm, "completions_per_prompt": 2, "kl_coef": 0.05},
        "optimizer": {"kind": "sgd", "lr": 1.0},
    }
    tree = {
        "model": {"name": str(model), "dtype": "float32", "adapter": adapter},
        "learner": {"num_workers": world, "zero_stage": zero, "micro_batch_tokens": 64},
        "stages": [stage],
    }
    step = {
        "unit": "record", "adjacency": "zero_out", "population": 100, "sampling_rate": BATCH / 100,
        "noise_multiplier": sigma, "clip_norm": CLIP, "updates_per_draw": 1, "steps": 9, "metric_noise_multiplier": 5.0,
    }  # fmt: skip
    return {"name": f"{algorithm}-zero{zero}", "config": tree, "step": step, "cases": cases}


@dataclass(frozen=True)
class Found:
    """One setting: weights by "start" and "case/draw" (of rank 0), the other ranks' too, and released metrics."""

    weights: dict[str, torch.Tensor]
    others: list[dict[str, torch.Tensor]]
    released: dict[str, dict[str, float]]

    def sum(self, case: str, draw: int = 0) -> torch.Tensor:
        """What one update released, as a sum: the weight difference times L (float64)."""
        return (self.weights["start"].double() - self.weights[f"{case}/{draw}"].double()) * BATCH

    def metrics(self, case: str, draw: int = 0) -> torch.Tensor:
        """The released metrics of one update, in order of name."""
        return torch.tensor([v for _, v in sorted(self.released[f"{case}/{draw}"].items())], dtype=torch.float64)


def launch(out: Path, world: int, settings: list[dict[str, Any]], seconds: float = 280) -> dict[str, Found]:
    """Run all settings in `world` processes; results by name of the setting."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = out / "plan.json"
    path.write_text(json.dumps({"world": world, "port": port, "out": str(out), "settings": settings}))
    env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    logs = [out / f"log{r}" for r in range(world)]
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(path), str(r)], env=env, stdout=log.open("w"), stderr=STDOUT)
        for r, log in enumerate(logs)
    ]
    try:
        codes = [p.wait(timeout=seconds) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-2000:] for log in logs)
    return {
        s["name"]: Found(
            load_file(out / f"{s['name']}.rank0.safetensors"),
            [load_file(out / f"{s['name']}.rank{r}.safetensors") for r in range(1, world)],
            json.loads((out / f"{s['name']}.json").read_text()),
        )
        for s in settings
    }
