"""What 10, 100 and 1,000 rollout replicas cost the driver and the accountant.

    python -m benchmarks.crowd [--counts 10,100,1000] [--rounds 3] [--output crowd.json]

SIMULATED: the replicas. 1,000 processes do not fit on one machine, so a replica is an object in one of a few async Ray
actors, which waits for as long as its work would take: 4 s of completions per call (2 chunks of 2 prompts, 24 tokens
each), 1 s of loading, 1 s of log-probabilities. Every call to it is a Ray message of its own, with real prompts and
completions in it. The only injection is what the fleet gets for `ray.remote(actor class)`.

Real: the fleet (its loop, RLlib's actor manager, the check of each replica after a sync), the accountant actor with its
SQLite ledger, Ray. All of it shares the cores of this machine with the actors that play the replicas, so the figures
are above those of a driver with a node of its own.

What grows with what: the driver sends, polls and takes in one message per chunk and two per replica and sync, so the
seconds beyond the simulated ones grow with the replicas. The accountant is asked once per draw by the driver (reserve,
which tells epsilon too) and once by the learners (redeem), and never by a replica: its seconds per draw should not
depend on their number. They are measured while the fleet generates. Who else reads it (a dashboard, an operator) is
the second table: 1,000 callers at once, and durable charges by one caller and by 1,000.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ledger import STAGE, STEP
from benchmarks.run import machine
from dprlhf_ray import config_file
from dprlhf_ray.actors.cluster import ray, session  # first: sets Ray's environment before ray is imported
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.actors.roles import ask, start_accountant
from dprlhf_ray.actors.rollout import RolloutActor
from dprlhf_ray.config import GenerationConfig, RolloutConfig
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.records import Completion
from dprlhf_ray.transport.objects import ObjectPublisher

SECONDS_PER_PROMPT, LOAD_SECONDS, CHECK_SECONDS = 1.0, 1.0, 1.0
PROMPTS_PER_REPLICA, PROMPT_TOKENS, NEW_TOKENS = 4, 5, 24
GENERATE_SECONDS, SYNC_SECONDS = PROMPTS_PER_REPLICA * SECONDS_PER_PROMPT, LOAD_SECONDS + CHECK_SECONDS
SEQUENCES = [tuple(range(32))] * 6
LOG_PROBS = [[-1.0] * 31] * 6
HOSTS, CALLERS = 4, 1_000
DRAWS = 10  # per generate call
INCARNATION = "benchmark"


# ------------------------------------------------------------------------------------------------ simulated replicas


class SimulatedReplica(RolloutActor):
    """A replica without an engine: its methods wait and answer what the fleet expects."""

    def __init__(self) -> None:
        self._version: int | None = None
        self.turn = asyncio.Lock()  # a real one is a process that does one thing at a time

    async def load(self, handle: Any) -> int:  # type: ignore[override]
        await asyncio.sleep(LOAD_SECONDS)
        self._version = handle.version
        return int(handle.version)

    async def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:  # type: ignore[override]
        await asyncio.sleep(CHECK_SECONDS)
        return LOG_PROBS

    async def generate(  # type: ignore[override]
        self, prompts: Sequence[Sequence[int]], completions_per_prompt: int
    ) -> list[list[Completion]]:
        await asyncio.sleep(SECONDS_PER_PROMPT * len(prompts))
        one = Completion(tuple(range(1_000, 1_000 + NEW_TOKENS)), "a word " * 12, False, self._version)
        return [[one] * completions_per_prompt for _ in prompts]


class Host:
    """An async actor that plays many replicas, or many callers of the accountant."""

    def __init__(self) -> None:
        self._replicas: defaultdict[int, SimulatedReplica] = defaultdict(SimulatedReplica)

    async def apply(self, number: int, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the replica's own `apply` would do."""
        replica = self._replicas[number]
        async with replica.turn:
            answer = func(replica, *args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer

    async def call(self, accountant: Any, method: str, args: Sequence[Any], callers: int, until: float) -> list[float]:
        """Seconds of each call of so many callers at once, each asking again as soon as it has its answer."""
        found: list[float] = []

        async def ask_again() -> None:
            while time.time() < until:
                started = time.perf_counter()
                await getattr(accountant, method).remote(*args)
                found.append(time.perf_counter() - started)

        await asyncio.gather(*(ask_again() for _ in range(callers)))
        return found


class _Apply:
    def __init__(self, host: Any, number: int) -> None:
        self._host, self._number = host, number

    def remote(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._host.apply.remote(self._number, func, args, kwargs)


class Handle:
    """What the fleet holds in place of an actor's handle."""

    def __init__(self, host: Any, number: int) -> None:
        self.apply = _Apply(host, number)


class Crowd:
    """Stands for the module `ray` where replicas are made: `remote(...)` makes simulated ones, all else is Ray's."""

    def __init__(self, hosts: Sequence[Any]) -> None:
        self._hosts, self._made = hosts, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    def remote(self, actor_class: type) -> Crowd:
        return self

    def options(self, **options: Any) -> Any:
        return mock.Mock(remote=self._make)

    def kill(self, actor: Handle) -> None:
        """Nothing has to end."""

    def _make(self, *build: Any) -> Handle:
        self._made += 1
        return Handle(self._hosts[self._made % len(self._hosts)], self._made)


# ---------------------------------------------------------------------------------------------------- the measurement


def timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """(seconds, answer)."""
    started = time.perf_counter()
    answer = call(*args, **kwargs)
    return time.perf_counter() - started, answer


def sync(fleet: Fleet, version: int) -> None:
    """A new version for all; its weights are never fetched."""
    fleet.sync(ObjectPublisher().publish(version, {"w": torch.zeros(1)}), LOG_PROBS)


def one_draw(accountant: Any) -> dict[str, float]:
    """Seconds of what one draw asks of the accountant, and of its epsilon alone, which reserve has told already."""
    reserve, reserved = timed(lambda: ray.get(accountant.reserve.remote(STAGE, INCARNATION)))
    redeem, _ = timed(lambda: ray.get(accountant.redeem.remote(reserved.token, INCARNATION, reserved.token)))
    epsilon, _ = timed(lambda: ray.get(accountant.epsilon_spent.remote(STAGE)))
    return {"reserve": reserve, "redeem": redeem, "epsilon": epsilon}


def crowd(count: int, rounds: int, hosts: Sequence[Any], accountant: Any) -> dict[str, Any]:
    """One line: a fleet of `count` replicas, driven for some rounds after one that warms up."""
    rollout, generation = RolloutConfig(engine="transformers"), GenerationConfig(max_new_tokens=NEW_TOKENS)
    prompts = [tuple(range(i % 100, i % 100 + PROMPT_TOKENS)) for i in range(PROMPTS_PER_REPLICA * count)]
    with mock.patch("dprlhf_ray.actors.replicas.ray", Crowd(hosts)):
        fleet = Fleet("", rollout, generation, "float32", SEQUENCES, actor_class=SimulatedReplica)
        started = time.perf_counter()
        fleet.start(count)
        sync(fleet, 0)
        while fleet.status()["healthy"] != count:
            fleet._replicas.admit()
            time.sleep(0.05)
        admission = time.perf_counter() - started - SYNC_SECONDS
        each: list[dict[str, float]] = []
        draws: list[dict[str, float]] = []

        def charge() -> None:
            for _ in range(DRAWS):
                draws.append(one_draw(accountant))
                time.sleep(GENERATE_SECONDS / DRAWS / 2)

        for version in range(1, rounds + 2):
            beside = threading.Thread(target=charge)
            beside.start()
            cpu = time.process_time()
            generate, answers = timed(fleet.generate, prompts, 1)
            cpu = time.process_time() - cpu
            beside.join()
            assert len(answers) == len(prompts)
            each.append({"generate": generate, "driver_cpu": cpu, "sync": timed(sync, fleet, version)[0]})
        if fleet.status()["restarts"]:
            raise RuntimeError(f"{fleet.status()['restarts']} simulated replicas counted as dead")
        fleet.stop()
    return {"replicas": count, "admission": admission, "rounds": each[1:], "draws": draws[DRAWS:]}


def calls(
    accountant: Any, hosts: Sequence[Any], method: str, args: Sequence[Any], callers: int, seconds: float
) -> dict[str, float]:
    """Calls per second of so many callers at once, and how long a call takes them."""
    used = hosts[: max(1, min(len(hosts), callers))]
    started, until = time.perf_counter(), time.time() + seconds
    each = ray.get([h.call.remote(accountant, method, args, callers // len(used), until) for h in used])
    found: list[float] = [s for own in each for s in own]
    return {
        "callers": callers,
        "per_second": len(found) / (time.perf_counter() - started),
        "median": statistics.median(found),
        "slowest": max(found),
    }


def measure(counts: Sequence[int], rounds: int, seconds: float) -> dict[str, Any]:
    """Everything, on one ledger."""
    config = config_file.parse({"name": "crowd", "stages": [{"privacy": {"epsilon": 8.0}}]})
    with tempfile.TemporaryDirectory() as folder, session(config) as namespace:
        accountant = start_accountant(str(Path(folder, "ledger.db")), None, None, None, namespace)
        ask(accountant, "declare", [Declaration("reviews", STAGE, STEP, 100.0, 1e-7)])
        hosts = [
            ray.remote(Host).options(num_cpus=0, max_concurrency=2 * CALLERS).remote() for _ in range(HOSTS)
        ]  # fmt: skip
        found: dict[str, Any] = {"crowd": [crowd(n, rounds, hosts, accountant) for n in counts]}
        for name, method, args, callers in (
            ("epsilon_spent", "epsilon_spent", (STAGE,), CALLERS),
            ("status", "status", (), CALLERS),
            ("durable charge", "reserve", (STAGE, INCARNATION), 1),
            ("durable charge, many", "reserve", (STAGE, INCARNATION), CALLERS),
        ):
            found.setdefault("calls", {})[name] = calls(accountant, hosts, method, args, callers, seconds)
        ask(accountant, "verify")
        ask(accountant, "close")
    return found


# ------------------------------------------------------------------------------------------------------------ figures


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Medians of one number of replicas: seconds beyond the simulated ones, and of the accountant per draw."""
    generate = statistics.median(r["generate"] for r in line["rounds"])
    own = {name: statistics.median(d[name] for d in line["draws"]) for name in ("reserve", "redeem", "epsilon")}
    return {
        "admission": line["admission"],
        "generate_beyond": generate - GENERATE_SECONDS,
        "share_of_simulated": generate / GENERATE_SECONDS - 1,
        "driver_cpu": statistics.median(r["driver_cpu"] for r in line["rounds"]),
        "sync_beyond": statistics.median(r["sync"] for r in line["rounds"]) - SYNC_SECONDS,
        **own,
        "draw": statistics.median(d["reserve"] + d["redeem"] for d in line["draws"]),
        "slowest_draw": max(d["reserve"] + d["redeem"] for d in line["draws"]),
    }


def fleet_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """One row per number of replicas."""
    view = Table(
        title="SIMULATED replicas; fleet, accountant and ledger are real",
        caption=f"medians; beyond: {GENERATE_SECONDS:.0f} s of completions per generate call, {SYNC_SECONDS:.0f} s of "
        "loading and checking per sync; admission: from start to the last replica; per draw: reserve (with epsilon) "
        "and redeem",
    )
    for name in ("replicas", "admission, s beyond", "generate, s beyond", "driver CPU s", "sync, s beyond",
                 "reserve ms", "redeem ms", "epsilon alone ms", "per draw ms", "slowest draw ms"):  # fmt: skip
        view.add_column(name, justify="right")
    for line in lines:
        f = figures(line)
        seconds = [f"{f[n]:.3f}" for n in ("admission", "generate_beyond", "driver_cpu", "sync_beyond")]
        own = [f"{f[n] * 1e3:.1f}" for n in ("reserve", "redeem", "epsilon", "draw", "slowest_draw")]
        view.add_row(f"{line['replicas']:,}", *seconds, *own)
    return view


def calls_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """One row per kind of call."""
    view = Table(title="one accountant, many callers at once")
    view.add_column("call")
    for name in ("callers", "per second", "median ms", "slowest ms"):
        view.add_column(name, justify="right")
    for name, c in found.items():
        own = (f"{c['median'] * 1e3:.1f}", f"{c['slowest'] * 1e3:.1f}")
        view.add_row(name, f"{c['callers']:,.0f}", f"{c['per_second']:,.0f}", *own)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", default="10,100,1000", help="replicas")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per count (default 3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="per kind of call (default 5)")
    parser.add_argument("--output", type=Path, default=Path("crowd.json"))
    args = parser.parse_args()
    before = machine()
    found = measure([int(n) for n in args.counts.split(",")], args.rounds, args.seconds)
    summary = {line["replicas"]: figures(line) for line in found["crowd"]}
    result = {"machine": before, "figures": summary, "measurements": found}
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(fleet_table(found["crowd"]))
    console.print(calls_table(found["calls"]))
    console.print(f"written: {args.output}", highlight=False)


if __name__ == "__main__":
    from benchmarks.crowd import main as imported  # classes of `__main__` would travel whole in every message

    imported()
