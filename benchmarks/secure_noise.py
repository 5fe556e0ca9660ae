"""Secure noise over plain Gaussian noise: time of one release, for d = 10^3 .. 10^7 coordinates.

python -m benchmarks.secure_noise [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch

from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.noise import noise_gradient
from dprlhf_ray.privacy.permit import Permit

STEP = DPStep("record", "zero_out", 10_000, 0.01, 1.0, 0.1, 1, 1, None)


def seconds(total: torch.Tensor, step: DPStep) -> float:
    permit = Permit.of("benchmark", "rl", 1, step, "benchmark")
    start = time.perf_counter()
    noise_gradient(total, permit)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    secure = replace(STEP, noise="secure")
    rows = []
    for dimension in (10**3, 10**4, 10**5, 10**6, 10**7):
        total = torch.zeros(dimension)
        seconds(total, secure), seconds(total, STEP)  # warm-up
        pairs = [(seconds(total, secure), seconds(total, STEP)) for _ in range(repeats)]
        rows.append(
            {
                "dimension": dimension,
                "time_ratio": statistics.median(a / b for a, b in pairs),
                "secure_seconds": statistics.median(a for a, _ in pairs),
                "gaussian_seconds": statistics.median(b for _, b in pairs),
            }
        )
    print(json.dumps({"releases": rows}))


if __name__ == "__main__":
    main()
