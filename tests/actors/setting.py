"""Real learners without Ray, for tests: their units, their config and step, and the processes that they live in."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import STDOUT
from typing import Any

CLIP, BATCH = 0.05, 8
Unit = tuple[list[int], list[list[int]], list[float | None]]  # prompt, two completions, two rewards


def draw(rows: list[Any], version: int, group: int) -> list[Any]:
    """A draw for a learner. A row is a unit of one record, or {"records": [...]}: a user's."""
    from dprlhf_ray.records import Completion, Experience, Prompt

    def experience(slot: int, record: list[Any]) -> Experience:
        prompt, completions, rewards = record
        done = tuple(Completion(tuple(c), "", False, version) for c in completions[:group])
        return Experience(Prompt(slot, tuple(prompt), ""), done, tuple(rewards[:group]))

    found = []
    for slot, row in enumerate(rows):
        records = row["records"] if isinstance(row, dict) else [row]
        found.append(tuple(experience(slot, record) for record in records))
    return found


def units(count: int, seed: int, longest: int | None = None) -> list[Unit]:
    """Units of a few different lengths, so that micro-batches hold several; the one in the middle, if asked, is
    `longest` tokens in prompt and completions each."""
    rng = random.Random(seed)

    def tokens(*lengths: int) -> list[int]:
        return [rng.randrange(3, 60) for _ in range(rng.choice(lengths))]

    found: list[Unit] = [
        (tokens(2, 4), [tokens(3, 6), tokens(3, 6)], [rng.uniform(-1, 1), rng.uniform(-1, 1)]) for _ in range(count)
    ]
    if longest:
        found[count // 2] = (tokens(longest), [tokens(longest) for _ in range(2)], [0.9, -0.7])
    return found


def setting(
    model: Path, world: int, zero: int, *, kind: str = "lora", rank: int = 4, algorithm: str = "rloo",
    optimizer: str = "sgd", corrected: bool = False, **changed: Any,
) -> dict[str, Any]:  # fmt: skip
    """Config and step (fields changed) of a learner. SGD has rate 1: a weight difference is the released sum / L.

    algorithm: or another kind of stage, sft or reward_model.
    """
    adapter = {"kind": kind, "rank": rank, "alpha": 4.0, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    stage: dict[str, Any] = {
        "privacy": {"mode": "clip_only", "clip_norm": CLIP, "expected_batch": BATCH, "steps": 9},
        "optimizer": {"kind": optimizer, "lr": 1.0 if optimizer == "sgd" else 0.01, "noise_corrected": corrected},
    }
    if algorithm in ("sft", "reward_model"):
        stage["kind"] = algorithm
    else:
        stage["algorithm"] = {"kind": algorithm, "completions_per_prompt": 2, "kl_coef": 0.1}
    tree = {
        "model": {"name": str(model), "dtype": "float32", "adapter": adapter},
        "learner": {"num_workers": world, "zero_stage": zero, "micro_batch_tokens": 64},
        "stages": [stage],
    }
    step = {
        "unit": "record", "adjacency": "zero_out", "population": 100, "sampling_rate": BATCH / 100, "steps": 9,
        "noise_multiplier": 0.0, "clip_norm": CLIP, "updates_per_draw": 1, "metric_noise_multiplier": 5.0,
    }  # fmt: skip
    return {"config": tree, "step": step | changed}


def launch(script: str, out: Path, world: int, plan: dict[str, Any]) -> None:
    """Run `world` processes of a script of this folder on a plan, whose results go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    path = out / "plan.json"
    path.write_text(json.dumps({"world": world, "port": port, "out": str(out)} | plan))
    command = [sys.executable, str(Path(__file__).with_name(script)), str(path)]
    root = str(Path(__file__).parents[2])  # for the tests' own modules
    env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", PYTHONPATH=root)
    logs = [out / f"log{r}" for r in range(world)]
    ranks = [
        subprocess.Popen([*command, str(r)], env=env, stdout=log.open("w"), stderr=STDOUT) for r, log in enumerate(logs)
    ]
    try:
        codes = [p.wait(timeout=280) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-2000:] for log in logs)
