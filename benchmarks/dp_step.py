"""A DP step over the same step without clipping and noise: time and peak memory, the embedded model, 2 cores.

Both sides train the same adapter on the same 128 records (5 + 24 tokens, one completion each) with the same
micro-batches and AdamW. The plain side is an ordinary loop of `loss.sum().backward()` and `optimizer.step()`; the
private side takes per-record gradients, clips, adds noise and writes the result for the optimizer. They take turns
inside one process for the time; peak memory is that of one process each.

    python -m benchmarks.dp_step [--adapter lora|lora_xs] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.workload import LORA_ALPHA, LORA_RANK, LORA_TARGETS, NEW_TOKENS, PROMPT_TOKENS
from dprlhf_ray import config_file
from dprlhf_ray.models.embedded import embedded_model_path
from dprlhf_ray.models.policy import load_policy
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.noise import noise_gradient
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.privacy.permit import Permit
from dprlhf_ray.records import Completion, Experience, Prompt
from dprlhf_ray.stages import batching
from dprlhf_ray.stages.objective import Draw
from dprlhf_ray.stages.rl import RLObjective

RECORDS = 128


def build(side: str, adapter: str) -> Callable[[], None]:
    """One step of a side, as a function."""
    config = config_file.parse(
        {
            "model": {
                "adapter": {
                    "kind": adapter, "rank": LORA_RANK, "alpha": LORA_ALPHA, "target_modules": list(LORA_TARGETS)
                }
            },
            "stages": [{"privacy": {"mode": "clip_only", "clip_norm": 0.1, "expected_batch": RECORDS}}],
        }
    )  # fmt: skip
    policy = load_policy(embedded_model_path(), config.model, 0, longest=64)
    rng = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(100, 40_000) for _ in range(n))

    units = [
        (
            Experience(
                Prompt(i, tokens(PROMPT_TOKENS), ""), (Completion(tokens(NEW_TOKENS), "", False, 0),), (rng.random(),)
            ),
        )
        for i in range(RECORDS)
    ]
    batches = batching.plan(units, 1, config.learner.micro_batch_tokens, RECORDS, 0)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    if side == "plain":

        def plain() -> None:
            for b in batches:
                scored = policy(b.tokens, b.prompt_lengths, b.responses)
                per_row = -(scored.log_probs * b.mask.flatten(0, 1)).sum(1) / b.mask.flatten(0, 1).sum(1)
                ((per_row * b.rewards.flatten()).sum() / RECORDS).backward()
            optimizer.step()
            optimizer.zero_grad()

        return plain
    recorder = Recorder(policy)
    objective = RLObjective(policy, config.stages[0], recorder)
    step = DPStep("record", "zero_out", 10_000, RECORDS / 10_000, 1.0, 0.1, 1, 1, 5.0)

    def private() -> None:
        total, _ = objective.clipped_sum(Draw(batches, 1))
        noised = noise_gradient(total.total, Permit.of("benchmark", "rl", 1, step, "benchmark")).value / RECORDS
        parts = noised.split(recorder.sizes)
        torch.stack([(p * g.view(p.shape)).sum() for p, g in zip(parameters, parts, strict=True)]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return private


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def own_peak_mib() -> float:
    """VmHWM of this process. Not ru_maxrss, which a child inherits from the process that started it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_mib(side: str, adapter: str) -> float:
    """Peak resident memory of a process that runs two steps of one side."""
    command = [sys.executable, "-m", "benchmarks.dp_step", "--memory-of", side, "--adapter", adapter]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", choices=("lora", "lora_xs"), default="lora")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=("plain", "private"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if args.memory_of:
        step = build(args.memory_of, args.adapter)
        step()
        step()
        print(json.dumps({"peak_mib": own_peak_mib()}))
        return
    plain, private = build("plain", args.adapter), build("private", args.adapter)
    plain(), private()  # warm-up
    pairs = [(seconds(private), seconds(plain)) for _ in range(args.repeats)]
    memory = {side: peak_mib(side, args.adapter) for side in ("plain", "private")}
    print(
        json.dumps(
            {
                "adapter": args.adapter,
                "records": RECORDS,
                "time_ratio": statistics.median(a / b for a, b in pairs),
                "memory_ratio": memory["private"] / memory["plain"],
                "private_seconds": [a for a, _ in pairs],
                "plain_seconds": [b for _, b in pairs],
                "peak_mib": memory,
            }
        )
    )


if __name__ == "__main__":
    main()
