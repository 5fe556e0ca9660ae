"""Seconds of one whole private RL iteration: reserve, draw, 64 completions of 24 tokens by vLLM, score, learn with
per-record clipping and noise, publish, verify the engines, checkpoint. The real pipeline with its real roles.

Sixteen prompts at sampling rate 1, so that every draw is all of them: 16 prompts x 4 completions, as on the other side.

    python -m benchmarks.rl_iteration --iterations 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.workload import COMPLETIONS, LORA_ALPHA, LORA_RANK, LORA_TARGETS, NEW_TOKENS, openings
from dprlhf_ray import config_file
from dprlhf_ray.models.embedded import embedded_model_path

GROUP = 4


def measure(iterations: int) -> dict[str, Any]:
    """Median seconds per iteration after one that warms up."""
    from transformers import AutoTokenizer

    from dprlhf_ray import pipeline
    from dprlhf_ray.observability.progress import RunProgress

    prompts = COMPLETIONS // GROUP
    texts = openings(AutoTokenizer.from_pretrained(embedded_model_path()), prompts)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "prompts.jsonl")
        data.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts), encoding="utf-8")
        config = config_file.parse(
            {
                "name": "benchmark",
                "model": {
                    "adapter": {"rank": LORA_RANK, "alpha": LORA_ALPHA, "target_modules": list(LORA_TARGETS)}
                },
                "data": {"openings": {"source": str(data), "max_prompt_tokens": 16}},
                "stages": [
                    {
                        "data": "openings",
                        "privacy": {
                            "epsilon": 8.0, "delta": 1e-5, "expected_batch": prompts, "steps": iterations + 1
                        },
                        "algorithm": {"kind": "rloo", "completions_per_prompt": GROUP},
                        "generation": {"max_new_tokens": NEW_TOKENS, "stop_at_eos": False},
                        "optimizer": {"lr": 1e-4},
                    }
                ],
                "rollout": {"max_model_len": 64},
                "evaluation": {"prompts": 8, "samples": 0},
            }
        )  # fmt: skip
        times: list[float] = []
        pipeline.run(
            config,
            Path(folder, "run"),
            on_step=lambda attempt, roles: times.append(time.perf_counter()),
            progress=RunProgress(quiet=True),
        )
    each = [b - a for a, b in zip(times, times[1:], strict=False)]
    return {"seconds_per_iteration": statistics.median(each), "seconds": each, "completions": COMPLETIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3)
    print(json.dumps(measure(parser.parse_args().iterations)))


if __name__ == "__main__":
    main()
