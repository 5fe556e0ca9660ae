"""What a sweep found, from the released files of its runs: figures by run, by cell over seeds, and all together.

Nothing operational is written: no times, no errors' texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from dprlhf_ray.config import RunConfig
from dprlhf_ray.observability import plots
from dprlhf_ray.observability.page import render
from dprlhf_ray.observability.report import MEASURES
from dprlhf_ray.privacy import budget
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.run_dir import RunDir, read_json, write_atomically
from dprlhf_ray.sweep.cells import Cell

REFERENCES = ("non_private", "clip_only")
HEADINGS = (
    "cell", "certified ε", "before → after", "difference", "95 % over seeds", "of non_private", "of clip_only", "runs",
)  # fmt: skip
NOTES = (
    "difference: of the last stage, after less before, on the same public records; the mean over seeds.",
    "95 % over seeds: t-interval of that mean. of non_private, of clip_only: share of that control's difference that "
    "is kept (– where the control's own 95 % interval over records, averaged over seeds, is not above 0).",
    "Seeds set public randomness only (initial adapters, evaluation); noise and draws are fresh in every run.",
)


def finished(root: Path) -> bool:
    """Whether a run is over: the certificate and then the report are the last things that it writes."""
    return (root / "certificate.json").exists() and (root / "report.html").exists()


def run_row(cell: Cell, root: Path, exit_code: int | None = None) -> dict[str, Any]:
    """One run's figures: certified epsilon by data set, and what its last stage gained on public records.

    exit_code: of a run that failed. Its `status` is done, failed or missing.
    """
    stage = cell.config.stages[-1]
    row: dict[str, Any] = {"cell": cell.name, "seed": cell.seed, "stage": stage.name, "exit_code": exit_code}
    if not finished(root):
        return row | {"status": "missing" if exit_code is None else "failed"}
    certificate = read_json(root / "certificate.json")
    bounds = {name: {k: d["run"][k] for k in ("epsilon", "delta")} for name, d in certificate["data_sets"].items()}
    row |= {"status": "done", "exit_code": 0, "certified": certificate["certified"], "data_sets": bounds}
    path = RunDir(root).evaluation(stage.name)
    if path.exists():
        evaluation = read_json(path)
        row |= {"measure": evaluation["measure"], **evaluation["comparison"]}
    return row


def cell_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs of each cell together, in the order of their first runs."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for r in runs:
        cells.setdefault(r["cell"], []).append(r)
    rows = [_cell_row(name, members) for name, members in cells.items()]
    for row in rows:
        for name in REFERENCES:
            row[f"kept_of_{name}"] = _kept(row, next((r for r in rows if r["cell"] == name), None))
    return rows


def _cell_row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [r for r in runs if r["status"] == "done"]
    row: dict[str, Any] = {
        "cell": name, "runs": len(runs), "done": len(done), "failed": sum(r["status"] == "failed" for r in runs),
        "certified": all(r["certified"] for r in done) if done else None, "data_sets": _largest(done),
    }  # fmt: skip
    measured = [r for r in done if "difference" in r]
    if not measured:
        return row
    gains = [float(r["difference"]) for r in measured]
    half = _half_width(gains)
    mean = fmean(gains)
    return row | {
        "stage": measured[0]["stage"], "measure": measured[0]["measure"],
        "before": fmean(r["before"] for r in measured), "after": fmean(r["after"] for r in measured),
        "difference": mean, "lowest": min(gains), "highest": max(gains),
        "low": None if half is None else mean - half, "high": None if half is None else mean + half,
        "low_over_records": fmean(r["low"] for r in measured), "high_over_records": fmean(r["high"] for r in measured),
    }  # fmt: skip


def _half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % t-interval of a mean; None for one value."""
    n = len(values)
    return None if n < 2 else float(student.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)


def _kept(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> float | None:
    """Share of a reference's gain; None where that is not above 0 for sure, or is of something else."""
    if reference is None or "difference" not in row or reference.get("low_over_records", 0.0) <= 0:
        return None
    if (row["stage"], row["measure"]) != (reference["stage"], reference["measure"]):
        return None
    return float(row["difference"] / reference["difference"])


def _largest(done: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By data set, the weakest guarantee that one of the runs has."""
    found: dict[str, dict[str, float | None]] = {}
    for r in done:
        for name, bound in r["data_sets"].items():
            known = found.setdefault(name, bound)
            if bound["epsilon"] is None or (known["epsilon"] is not None and bound["epsilon"] > known["epsilon"]):
                found[name] = bound
    return found


def together(config: RunConfig, roots: Sequence[Path]) -> list[dict[str, Any]]:
    """What all runs with a guarantee cost together, by data set: composed over their ledgers, at the smallest delta.

    roots: of the cells with an epsilon; runs that failed or were interrupted have charged too. epsilon is None where
    another stage on the data set guarantees nothing.
    """
    ledgers = [Ledger.read(RunDir(root).ledger) for root in roots if RunDir(root).ledger.exists()]
    found = []
    for name in dict.fromkeys(config.dataset_of(s.data) for s in config.stages if s.privacy.mode == "dp"):
        schedules = [s for ledger in ledgers for s in ledger.schedules.values() if s.dataset == name]
        if schedules:
            delta = min(s.delta for s in schedules)
            epsilon = budget.cost(schedules, delta)
            cost = {"data_set": name, "runs": len(ledgers), "delta": delta}
            found.append(cost | {"epsilon": epsilon if math.isfinite(epsilon) else None})
    return found


def statements(composed: Sequence[Mapping[str, Any]], controls: Sequence[str]) -> list[str]:
    """What the sweep as a whole costs, in words. controls: those without noise among its runs."""
    found = [
        "Every run is certified by itself. A sweep is not: whoever sees several runs, or the one picked by looking at "
        "several, is told by all of them, and what they cost adds up."
    ]
    for c in composed:
        bound = "no guarantee" if c["epsilon"] is None else f"ε = {c['epsilon']:.4f} at δ = {c['delta']:g}"
        found.append(f"The {c['runs']} runs at a target ε together: {bound} on {c['data_set']}.")
    if controls:
        found.append(f"{', '.join(controls)}: no noise was added, so that together with them nothing is guaranteed.")
    return found


def formatted(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells' rows as text, under `HEADINGS`."""
    return [
        (
            r["cell"], _bound(r), _pair(r), _number(r.get("difference"), "+.3f"),
            _span(r.get("low"), r.get("high")),
            *(_number(r.get(f"kept_of_{name}"), ".0%") for name in REFERENCES),
            f"{r['done']} of {r['runs']}" + (f", {r['failed']} failed" if r["failed"] else ""),
        )
        for r in rows
    ]  # fmt: skip


def _bound(row: Mapping[str, Any]) -> str:
    if row["certified"] is None:
        return "–"
    if not row["certified"]:
        return "no guarantee"
    if not row["data_sets"]:
        return "public data: free"
    several = len(row["data_sets"]) > 1
    return ", ".join(f"{name + ' ' if several else ''}{b['epsilon']:.4f}" for name, b in row["data_sets"].items())


def _pair(row: Mapping[str, Any]) -> str:
    return f"{row['before']:.3f} → {row['after']:.3f}" if "before" in row else "–"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _span(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"


def write(folder: Path, config: RunConfig, cells: Sequence[Cell], failed: Mapping[str, int]) -> dict[str, Any]:
    """Write sweep.json, sweep.md and sweep.html from what is there; returns the object of sweep.json.

    failed: exit codes of the runs that failed now, by folder.
    """
    roots = {c.folder: folder / "cells" / c.folder for c in cells}
    runs = [run_row(c, roots[c.folder], failed.get(c.folder)) for c in cells]
    rows = cell_rows(runs)
    there = sorted(p for p in (folder / "cells").glob("*-seed*") if p.is_dir())  # those of earlier calls too
    composed = together(config, [p for p in there if p.name.startswith("epsilon-")])
    ran = {p.name.rsplit("-seed", 1)[0] for p in there}
    words = statements(composed, [name for name in ("clip_only", "non_private") if name in ran])
    found = {"name": config.name, "cells": rows, "runs": runs, "together": composed, "statements": words}
    measured = dict.fromkeys((r["stage"], r["measure"]) for r in rows if "measure" in r)
    what = "; ".join(f"{MEASURES[m]} of stage {stage}" for stage, m in measured) or "nothing yet"
    values = {
        "name": config.name, "what": "sweep", "measured": what, "headings": HEADINGS, "rows": formatted(rows),
        "runs": runs, "statements": words, "notes": NOTES, "plot": _plot(cells, rows),
    }  # fmt: skip
    write_atomically(folder / "sweep.json", json.dumps(found, indent=2) + "\n")
    write_atomically(folder / "sweep.md", _markdown(values))
    write_atomically(folder / "sweep.html", render("sweep.html.j2", **values))
    return found


def _markdown(values: Mapping[str, Any]) -> str:
    lines = [f"# Sweep {values['name']}", "", f"On public records: {values['measured']}.", ""]
    table = [HEADINGS, ("---",) * len(HEADINGS), *values["rows"]]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    lines += ["", *(f"- {s}" for s in values["statements"]), "", *(f"- {n}" for n in NOTES), ""]
    return "\n".join(lines)


def _plot(cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> Any:
    """Difference over certified epsilon (of the data set that pays most), controls as lines; None: nothing to show."""
    targets = {c.name for c in cells if c.epsilon is not None}
    shown = [r for r in rows if "difference" in r]
    if not shown or len({(r["stage"], r["measure"]) for r in shown}) > 1:
        return None
    points = []
    for r in shown:
        known = [b["epsilon"] for b in r["data_sets"].values() if b["epsilon"] is not None]
        if r["cell"] in targets and r["certified"] and known:
            several = r["done"] > 1
            low, high = ("lowest", "highest") if several else ("low_over_records", "high_over_records")
            points.append((max(known), r["difference"], r[low], r[high]))
    lines = {r["cell"]: r["difference"] for r in shown if r["cell"] not in targets}
    return plots.tradeoff(
        "sweep", points, lines, f"difference of {MEASURES[shown[0]['measure']].removeprefix('mean ')}"
    )
