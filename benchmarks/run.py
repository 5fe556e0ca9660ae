"""All benchmarks, each in its own process: a table of ratios with their targets, and `benchmarks.json`.

    python -m benchmarks.run [--rounds 2] [--iterations 3] [--output benchmarks.json]

The two sides of the iteration ratio alternate, ours and TRL's, so that a slow minute of the machine hits both. Times
are medians; every single measurement is in the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dprlhf_ray import __version__

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ratio:
    """One ratio of the table: smaller is better, `target` is the largest value that passes."""

    name: str
    value: float
    target: float
    detail: str

    @property
    def met(self) -> bool:
        return self.value <= self.target


def run_benchmark(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m benchmarks.<module>` and read the JSON object on the last line of its output.

    Raises:
        RuntimeError: it failed, or its last line is not a JSON object; carries the end of its error output.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            result = json.loads(lines[-1])
        except json.JSONDecodeError:
            result = None
        if isinstance(result, dict):
            return result
    tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
    raise RuntimeError(f"benchmarks.{module} ended with code {done.returncode} and no JSON line:\n{tail}")


def ratios(dp_steps: list[dict[str, Any]], ours: list[dict[str, Any]], trl: list[dict[str, Any]]) -> list[Ratio]:
    """The three ratios with their targets from the raw measurements (medians over rounds)."""
    our_seconds = statistics.median(r["seconds_per_iteration"] for r in ours)
    trl_seconds = statistics.median(r["seconds_per_iteration"] for r in trl)
    return [
        Ratio(
            "DP step / same step without clipping and noise, time",
            statistics.median(r["time_ratio"] for r in dp_steps),
            1.05,
            f"{len(dp_steps)} rounds",
        ),
        Ratio(
            "DP step / same step without clipping and noise, peak memory",
            statistics.median(r["memory_ratio"] for r in dp_steps),
            1.10,
            f"{len(dp_steps)} rounds",
        ),
        Ratio(
            "RL iteration / TRL GRPO, non-private",
            our_seconds / trl_seconds,
            0.5,
            f"{our_seconds:.1f} s / {trl_seconds:.1f} s",
        ),
    ]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "dprlhf_ray": __version__,
    }


def table(rows: list[Ratio]) -> Table:
    """The rows as a rich table."""
    view = Table(title="dprlhf_ray benchmarks (smaller is better)")
    view.add_column("ratio")
    for name in ("value", "target", "met"):
        view.add_column(name, justify="right")
    view.add_column("measured")
    for row in rows:
        view.add_row(row.name, f"{row.value:.3f}", f"<= {row.target:.2f}", "yes" if row.met else "NO", row.detail)
    return view


def main() -> int:
    """Run everything; 0 when every target is met, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="rounds of all benchmarks in turn (default 2)")
    parser.add_argument("--iterations", type=int, default=3, help="timed RL iterations per round and side (default 3)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"))
    args = parser.parse_args()
    if args.rounds < 1 or args.iterations < 1:
        parser.error("--rounds and --iterations must be at least 1")

    console = Console(width=None if sys.stdout.isatty() else 140)
    started = time.time()
    before = machine()
    raw: dict[str, list[dict[str, Any]]] = {"dp_step": [], "rl_iteration": [], "trl_grpo": []}
    for number in range(1, args.rounds + 1):
        for module, measured in raw.items():
            arguments = () if module == "dp_step" else ("--iterations", str(args.iterations))
            console.print(f"round {number}/{args.rounds}: {module} ...", highlight=False)
            measured.append(run_benchmark(module, *arguments))

    rows = ratios(raw["dp_step"], raw["rl_iteration"], raw["trl_grpo"])
    result = {
        "machine": before,
        "seconds": round(time.time() - started, 1),
        "ratios": [asdict(row) | {"met": row.met} for row in rows],
        "measurements": raw,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(table(rows))
    console.print(f"written: {args.output}", highlight=False)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
