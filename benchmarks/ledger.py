"""The ledger on this disk: durable charges per second, and whether a charge or an opening grows with what is in it.

    python -m benchmarks.ledger [--entries 1000,100000,1000000] [--folder .] [--output ledger-benchmark.json]

Charges are real ones, each acknowledged after its fsync. The entries before them are sealed and linked as usual but
written in bulk. Opening (verify the whole chain) is timed in a fresh process, with its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from sqlalchemy import insert, update

from benchmarks.run import ROOT, Ratio, machine, table
from dprlhf_ray.privacy import budget, chain, store
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep

STEP = DPStep("record", "zero_out", 1_000_000, 1e-4, 4.0, 1.0, 1, 2_000_000, None)
STAGE, CHARGES, BULK = "rl", 200, 10_000
SLOWEST_CHARGE = 1 / 200  # seconds


def charge_seconds(ledger: Ledger, charges: int) -> list[float]:
    """Seconds of each of some charges."""
    found = []
    for _ in range(charges):
        started = time.perf_counter()
        ledger.charge(STAGE)
        found.append(time.perf_counter() - started)
    return found


def meter_seconds(ledger: Ledger, attempts: int) -> float:
    """Mean seconds per attempt of the epsilon that the accountant shows, over the attempts that come next."""
    schedule = ledger.schedule(STAGE)
    started = time.perf_counter()
    for _ in range(attempts):
        schedule.spent += 1
        budget.meter(schedule)
    return (time.perf_counter() - started) / attempts


def grow(ledger: Ledger, entries: int) -> None:
    """Append charges in bulk until there are this many entries."""
    state, key = ledger._state, ledger._key
    while state.seq < entries:
        rows = []
        for _ in range(min(BULK, entries - state.seq)):
            body = chain.canonical({"attempt": state.schedules[STAGE].spent + 1})
            entry = chain.seal(key, state, state.epoch, "charge", "reviews", STAGE, body)
            chain.apply(state, entry)
            rows.append(asdict(entry))
        where = {"seq": state.seq, "head": state.head, "mac": chain.state_mac(key, state.seq, state.epoch, state.head)}
        with store.writing(ledger._engine) as connection:
            connection.execute(insert(store.entries), rows)
            connection.execute(update(store.state).values(where))


def fsync_seconds(folder: Path, times: int = 100) -> float:
    """Median of writing and syncing a hundred bytes: what the disk alone costs."""
    descriptor = os.open(folder / "fsync", os.O_RDWR | os.O_CREAT)
    found = []
    for _ in range(times):
        started = time.perf_counter()
        os.pwrite(descriptor, bytes(100), 0)
        os.fdatasync(descriptor)
        found.append(time.perf_counter() - started)
    os.close(descriptor)
    return statistics.median(found)


def opened(path: Path) -> dict[str, float]:
    """Seconds and peak memory (MiB) of opening a ledger in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.ledger", "--open", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def open_one(path: str) -> dict[str, float]:
    """What `opened` runs."""
    started = time.perf_counter()
    Ledger.open(path).close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.perf_counter() - started, "peak_mib": peak}


def measure(sizes: list[int], folder: Path) -> dict[str, Any]:
    """Everything, with an otherwise equal ledger for each line."""
    result: dict[str, Any] = {"fsync_seconds": fsync_seconds(folder), "anchored": None, "sizes": []}
    (folder / "anchored").mkdir()
    ledger = Ledger.open(folder / "anchored" / "ledger.db", anchor_file=folder / "anchor")
    ledger.declare([Declaration("reviews", STAGE, STEP, 100.0, 1e-7)])
    result["anchored"] = {"charge_seconds": statistics.median(charge_seconds(ledger, CHARGES))}
    ledger.close()
    path = folder / "ledger.db"
    Ledger.open(path).close()
    for size in sizes:
        ledger = Ledger.open(path)
        ledger.declare([Declaration("reviews", STAGE, STEP, 100.0, 1e-7)])
        grow(ledger, size)
        charge_seconds(ledger, CHARGES // 4)  # the log that the bulk left is written back first
        each = charge_seconds(ledger, CHARGES)
        line = {"entries": size, "charge_seconds": statistics.median(each), "charges_per_second": len(each) / sum(each)}
        line["meter_seconds"] = meter_seconds(ledger, CHARGES)
        ledger.close()
        result["sizes"].append(line | {"open": opened(path), "file_mib": path.stat().st_size / 2**20})
    return result


def ratios(found: dict[str, Any]) -> list[Ratio]:
    """Judged lines from the raw measurements."""
    first, last = found["sizes"][0], found["sizes"][-1]
    disk = f"the disk alone: {found['fsync_seconds'] * 1e3:.2f} ms"

    def rate(name: str, line: dict[str, Any]) -> Ratio:
        seconds = line["charge_seconds"]
        return Ratio(f"{name} / 5 ms", seconds / SLOWEST_CHARGE, 1.0, f"{1 / seconds:.0f} charges/s; {disk}")

    anchored = found["anchored"]["charge_seconds"]
    grown = last["charge_seconds"] / first["charge_seconds"]
    memory = last["open"]["peak_mib"] / first["open"]["peak_mib"]
    sizes = f"{last['entries']} / {first['entries']} entries"
    return [
        rate("durable charge", first),
        Ratio("charge with an anchor / without: a second sync", anchored / first["charge_seconds"], 2.5,
              f"{1 / anchored:.0f} charges/s"),
        Ratio(f"charge at {sizes}, time", grown, 1.5, f"{last['charges_per_second']:.0f} charges/s at the end"),
        Ratio(f"open at {sizes}, peak memory", memory, 1.1, f"{last['open']['peak_mib']:.0f} MiB"),
        Ratio("open and verify / 60 us per entry", last["open"]["seconds"] / last["entries"] / 60e-6, 1.0,
              f"{last['open']['seconds']:.1f} s for {last['entries']} entries, {last['file_mib']:.0f} MiB"),
    ]  # fmt: skip


def main() -> int:
    """Run everything; 0 when every target is met, 1 otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entries", default="1000,100000,1000000", help="sizes of the ledger, rising")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: here)")
    parser.add_argument("--output", type=Path, default=Path("ledger-benchmark.json"))
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_one(args.open)))
        return 0
    before = machine()
    with tempfile.TemporaryDirectory(prefix=".ledger-benchmark-", dir=args.folder) as folder:
        found = measure([int(n) for n in args.entries.split(",")], Path(folder).resolve())
    rows = ratios(found)
    result = {"machine": before, "ratios": [asdict(r) | {"met": r.met} for r in rows], "measurements": found}
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(rows))
    console.print(f"written: {args.output}", highlight=False)
    return 0 if all(r.met for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
