"""How an iteration scales with rollout replicas and learner ranks, with and without a draw ahead.

    python -m benchmarks.scaling [--iterations 3] [--output scaling.json] [--one "2 replicas"]

SIMULATED: the time of the rollout engines, and nothing else. Real engines would share the cores of one machine, and
their number would measure that. Each replica is a real rollout actor with a real transformers engine, which holds the
weights, loads every new version and is checked against the learner; but in place of sampling it sleeps for as long as
300 tokens/s take, and answers with random tokens. A fixed rate is that of an engine that computes at its limit: one
with few sequences is slower per token than one with many.

Real: a Llama of 13 million parameters (random, with the embedded model's tokenizer) in the learners, one thread per
rank, with per-record clipping and noise; Ray, scorer, accountant, ledger, sync with its check, checkpoints, the driver.
Whatever is real shares the cores of this machine, with as many replicas as there are: their loading and their checks
after a sync take turns on them, which those on machines of their own would not.

Work per iteration is the same everywhere: 48 prompts x 2 completions x 24 tokens, 2,304 tokens, 7.68 s of one engine.
What an iteration should take is the bound: rollout (reserve + collect + sync) plus learning (learn + checkpoint), or
with a draw ahead (`rollout.staleness: 1`) the longer of the two. Medians over the timed iterations, after one more;
with a draw ahead after two more.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from benchmarks.run import machine, run_benchmark
from benchmarks.workload import LORA_ALPHA, LORA_RANK, LORA_TARGETS, NEW_TOKENS

PROMPTS, GROUP = 48, 2
TOKENS = PROMPTS * GROUP * NEW_TOKENS
RATE = 300.0  # tokens per second of one simulated engine
LAPS = ("reserve", "collect", "sync", "learn", "checkpoint")


@dataclass(frozen=True)
class Setting:
    """One line. ahead: draws ahead of the learners (`rollout.staleness`)."""

    replicas: int
    learners: int
    ahead: int


def settings() -> dict[str, Setting]:
    """All settings by name."""
    found = {}
    for ahead, suffix in ((0, ""), (1, ", ahead")):
        for n in (1, 2, 4, 8):
            found[f"{n} replica{'s' if n > 1 else ''}{suffix}"] = Setting(n, 1, ahead)
        found[f"2 learners{suffix}"] = Setting(4, 2, ahead)
    return found


# ---------------------------------------------------------------------------------------------------- the measurement


def write_model(folder: Path) -> None:
    """A random model with the embedded tokenizer: small, so that learning and checks fit next to each other."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dprlhf_ray.models.embedded import embedded_model_path

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, text: str, count: int) -> None:
    """So many prompts, each with its number in it."""
    path.write_text("".join(json.dumps({"prompt": text.format(i)}) + "\n" for i in range(count)), encoding="utf-8")


def config_tree(folder: Path, setting: Setting, steps: int) -> dict[str, Any]:
    """Config of a run; sampling rate 1, so that every draw is all prompts."""
    return {
        "name": "scaling",
        "model": {
            "name": str(folder / "model"), "dtype": "float32",
            "adapter": {"rank": LORA_RANK, "alpha": LORA_ALPHA, "target_modules": list(LORA_TARGETS)},
        },
        "data": {"openings": {"source": str(folder / "private.jsonl"), "max_prompt_tokens": 16}},
        "stages": [
            {
                "data": "openings",
                "privacy": {"epsilon": 8.0, "delta": 1e-5, "expected_batch": PROMPTS, "steps": steps},
                "algorithm": {"kind": "rloo", "completions_per_prompt": GROUP},
                "generation": {"max_new_tokens": NEW_TOKENS, "stop_at_eos": False},
                "optimizer": {"lr": 1e-4},
            }
        ],
        "learner": {"num_workers": setting.learners, "threads": 1},
        "rollout": {
            "engine": "transformers", "replicas": setting.replicas, "staleness": setting.ahead, "threads": 1,
            "max_model_len": 64, "sync_tolerance": 0.01,
        },
        "evaluation": {"source": str(folder / "public.jsonl"), "prompts": 8, "samples": 0},
    }  # fmt: skip


def measure(setting: Setting, iterations: int) -> dict[str, Any]:
    """Seconds and phases of some iterations, after one that warms up."""
    from dprlhf_ray import config_file, pipeline
    from dprlhf_ray.actors.engines.base import Sampled
    from dprlhf_ray.actors.engines.transformers import TransformersEngine
    from dprlhf_ray.actors.fleet import Fleet
    from dprlhf_ray.actors.rollout import RolloutActor
    from dprlhf_ray.config import GenerationConfig, RolloutConfig
    from dprlhf_ray.observability.progress import RunProgress
    from dprlhf_ray.privacy.release import Operational, Released

    class SimulatedEngine(TransformersEngine):
        """Real weights; sampling takes the time that a fixed rate gives, and says random tokens."""

        def _sample(self, prompts: list[tuple[int, ...]]) -> list[Sampled]:
            length = self.generation.max_new_tokens
            time.sleep(len(prompts) * length / RATE)
            each = (-math.log(self.vocab_size),) * length if self.rollout.staleness else None
            return [([random.randrange(100, self.vocab_size) for _ in range(length)], each) for _ in prompts]

    class SimulatedActor(RolloutActor):
        """The rollout actor around a simulated engine."""

        def __init__(
            self, model_path: str, rollout: RolloutConfig, generation: GenerationConfig, dtype: str, adapter: Any = None
        ) -> None:
            self._engine = SimulatedEngine(model_path, rollout, generation, dtype)

    class WholeFleet(Fleet):
        """Does not begin before all its replicas serve."""

        def sync(self, *arguments: Any) -> None:
            super().sync(*arguments)
            while self._replicas.counts()[0] < self._replicas.target:
                self._replicas.admit()
                time.sleep(0.05)

    class Recorder(RunProgress):
        """Keeps what the driver shows of every step, with the time."""

        def __init__(self) -> None:
            super().__init__(quiet=True)
            self.steps: list[tuple[float, dict[str, float]]] = []

        def step(
            self, stage: str, attempt: int, total: int, target: float | None, released: Sequence[Released],
            fleet: Sequence[Operational], laps: Sequence[Operational],
        ) -> None:  # fmt: skip
            figures = {f.name: f.value for f in [*fleet, *laps]}
            self.steps.append((time.perf_counter(), {"sync": figures["sync_seconds"]} | figures))
            shown = ", ".join(f"{name} {self.steps[-1][1][name]:.2f}" for name in LAPS)
            print(f"draw {attempt} of {total}: {shown}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_prompts(folder / "private.jsonl", "the movie {} was one that", PROMPTS)
        write_prompts(folder / "public.jsonl", "the story {} is one that you will", 8)
        config = config_file.parse(config_tree(folder, setting, iterations + 1 + setting.ahead))
        show = Recorder()
        with mock.patch.object(pipeline, "Fleet", partial(WholeFleet, actor_class=SimulatedActor)):
            pipeline.run(config, folder / "run", progress=show)
    timed = show.steps[setting.ahead :]  # the first update, which is slow, hides the draws that were made beside it
    times = [when for when, _ in timed]
    each = [
        {"seconds": after - before} | {name: figures[name] for name in LAPS}
        for before, after, (_, figures) in zip(times, times[1:], timed[1:], strict=False)
    ]
    return {"replicas": setting.replicas, "learners": setting.learners, "ahead": setting.ahead, "iterations": each}


# ------------------------------------------------------------------------------------------------------------ figures


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Medians of one setting, and what they are compared with.

    rollout, learning: seconds of the fleet's side and of the learners'. bound: their sum, with a draw ahead the longer
    one. engines: seconds of sampling alone, shared evenly.
    """
    each = found["iterations"]
    result: dict[str, float] = {n: statistics.median(e[n] for e in each) for n in ("seconds", *LAPS)}
    result["rollout"] = result["reserve"] + result["collect"] + result["sync"]
    result["learning"] = result["learn"] + result["checkpoint"]
    pair = (result["rollout"], result["learning"])
    result["bound"] = max(pair) if found["ahead"] else sum(pair)
    result["over_bound"] = result["seconds"] / result["bound"]
    result["tokens_per_second"] = TOKENS / result["seconds"]
    result["engines"] = TOKENS / RATE / found["replicas"]
    return result


def table(measured: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per setting."""
    view = Table(
        title=f"one iteration of {TOKENS} tokens; engines SIMULATED at {RATE:.0f} tokens/s each, all else real",
        caption="seconds, medians; engines: sampling alone; bound: rollout (reserve, collect, sync) + learning (learn, "
        "checkpoint), ahead: the longer",
    )
    view.add_column("setting")
    for name in ("iteration", "tokens/s", "engines", *LAPS, "rollout", "learning", "bound", "iteration / bound"):
        view.add_column(name, justify="right")
    for name, found in measured.items():
        f = figures(found)
        seconds = [f"{f[n]:.2f}" for n in ("engines", *LAPS, "rollout", "learning", "bound")]
        view.add_row(
            name, f"{f['seconds']:.2f}", f"{f['tokens_per_second']:.0f}", *seconds, f"{f['over_bound']:.2f}"
        )  # fmt: skip
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=3, help="timed iterations per setting (default 3)")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--one", choices=tuple(settings()), help="only this setting; JSON on the last line")
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error("--iterations must be at least 1")
    if args.one:
        print(json.dumps(measure(settings()[args.one], args.iterations)))
        return
    console = Console(width=None if sys.stdout.isatty() else 180)
    before, measured = machine(), {}
    for name in settings():
        console.print(f"{name} ...", highlight=False)
        measured[name] = run_benchmark("scaling", "--one", name, "--iterations", str(args.iterations))
    summary = {name: figures(found) for name, found in measured.items()}
    result = {"machine": before, "tokens": TOKENS, "rate": RATE, "figures": summary, "measurements": measured}
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(table(measured))
    console.print(f"written: {args.output}", highlight=False)


if __name__ == "__main__":
    main()
