"""Plots of released values as inline SVG: no script, no network, no pyplot state."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, ACCENT, SECOND, LIMIT = "#3b4252", "#2563eb", "#b45309", "#b91c1c"


@dataclass(frozen=True)
class Series:
    """One released metric over steps: attempts, values, and the standard deviation of the noise in each value."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    stds: tuple[float, ...]


def series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Values of a metric from lines of metrics.jsonl, in order."""
    found = [(r["attempt"], m["value"], m.get("std", 0.0)) for r in rows for m in r["metrics"] if m["name"] == name]
    steps, values, stds = zip(*found, strict=True) if found else ((), (), ())
    return Series(steps, values, stds)


def banded(salt: str, line: Series, label: str, dots: Series | None = None) -> Markup:
    """A line with a band of ± one standard deviation of its noise, and dots for values on public prompts."""
    figure, axes = _axes("step", label)
    values, stds = np.asarray(line.values, dtype=float), np.asarray(line.stds, dtype=float)
    axes.fill_between(line.steps, values - stds, values + stds, color=ACCENT, alpha=0.15, linewidth=0)
    axes.plot(line.steps, values, color=ACCENT, linewidth=1.8, marker="o", markersize=3, label="private prompts")
    if dots is not None and dots.steps:
        axes.plot(dots.steps, dots.values, "o", color=SECOND, markersize=5, label="public prompts")
        axes.legend(frameon=False, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, salt)


def meter(salt: str, spent: Series, target: float, steps: int) -> Markup:
    """Epsilon over attempts, with its target."""
    figure, axes = _axes("step", "epsilon")
    axes.plot((0, *spent.steps), (0.0, *spent.values), color=ACCENT, linewidth=1.8, marker="o", markersize=3)
    axes.axhline(target, color=LIMIT, linewidth=1.2, linestyle="--")
    axes.annotate(f"target {target:g}", (0, target), (4, -12), textcoords="offset points", color=LIMIT, fontsize=9)
    axes.set_xlim(0, max(steps, *spent.steps))
    axes.set_ylim(0, max(target, *spent.values) * 1.08)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure, salt)


def histograms(salt: str, before: Sequence[float], after: Sequence[float]) -> Markup:
    """Distribution of two sets of rewards over the same bins."""
    figure, axes = _axes("reward", "prompts")
    edges = np.histogram_bin_edges(np.asarray([*before, *after], dtype=float), bins=20)
    for values, colour, name in ((before, INK, "before"), (after, ACCENT, "after")):
        axes.hist(values, bins=list(edges), color=colour, alpha=0.45, label=name)
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure, salt)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    return figure, axes


def _svg(figure: Figure, salt: str) -> Markup:
    """The figure as an `<svg>` element; `salt` keeps the ids of several plots on one page apart."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return Markup(text)  # matplotlib escapes the texts that it draws
