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
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

INK, ACCENT, SECOND, LIMIT, AXIS, LINE = "#3b4252", "#2563eb", "#b45309", "#b91c1c", "#9ca3af", "#e5e7eb"
ROLES = {INK: "ink", ACCENT: "accent", SECOND: "second", LIMIT: "bad", AXIS: "axis", LINE: "line"}  # of the page


@dataclass(frozen=True)
class Series:
    """One released metric over steps: attempts, values, and the standard deviation of the noise in each value."""

    steps: tuple[int, ...]
    values: tuple[float, ...]
    stds: tuple[float, ...]

    def times(self, factor: float) -> Series:
        return Series(self.steps, tuple(factor * v for v in self.values), tuple(abs(factor) * s for s in self.stds))


def series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    """Values of a metric from lines of metrics.jsonl, in order."""
    found = [(r["attempt"], m["value"], m.get("std", 0.0)) for r in rows for m in r["metrics"] if m["name"] == name]
    steps, values, stds = zip(*found, strict=True) if found else ((), (), ())
    return Series(steps, values, stds)


def banded(salt: str, line: Series, label: str, dots: Series | None = None, name: str = "private records") -> Markup:
    """A line with a band of ± one standard deviation of its noise, and dots for values on public records."""
    figure, axes = _axes("step", label)
    values, stds = np.asarray(line.values, dtype=float), np.asarray(line.stds, dtype=float)
    axes.fill_between(line.steps, values - stds, values + stds, color=ACCENT, alpha=0.15, linewidth=0)
    axes.plot(line.steps, values, color=ACCENT, linewidth=1.8, marker="o", markersize=3, label=name)
    if dots is not None and dots.steps:
        axes.plot(dots.steps, dots.values, "o", color=SECOND, markersize=5, label="public records")
        _legend(axes)
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


def histograms(salt: str, before: Sequence[float], after: Sequence[float], label: str) -> Markup:
    """Distribution of two sets of values over the same bins."""
    figure, axes = _axes(label, "records")
    edges = np.histogram_bin_edges(np.asarray([*before, *after], dtype=float), bins=20)
    for values, colour, name in ((before, INK, "before"), (after, ACCENT, "after")):
        axes.hist(values, bins=list(edges), color=colour, alpha=0.45, label=name)
    _legend(axes)
    return _svg(figure, salt)


def tradeoff(
    salt: str, points: Sequence[tuple[float, float, float, float]], lines: Mapping[str, float], label: str
) -> Markup:
    """What is gained at each epsilon: (epsilon, mean, lowest, highest) as points with bars; controls as lines."""
    figure, axes = _axes("certified epsilon", label)
    axes.axhline(0, color=AXIS, linewidth=0.8)
    for (name, value), colour, style in zip(lines.items(), (LIMIT, SECOND, INK), ("--", "-.", ":"), strict=False):
        axes.axhline(value, color=colour, linewidth=1.4, linestyle=style, label=name)
    if points:
        x, mean, low, high = zip(*sorted(points), strict=True)
        bars = [np.subtract(mean, low), np.subtract(high, mean)]
        axes.errorbar(x, mean, yerr=bars, color=ACCENT, linewidth=1.8, marker="o", markersize=4, capsize=3, label="dp")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(list(x)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.xaxis.set_minor_locator(NullLocator())
    if points or lines:
        _legend(axes)
    return _svg(figure, salt)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
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
    for colour, role in ROLES.items():  # the page's colours, so that plots follow it into the dark
        text = text.replace(colour, f"var(--{role}, {colour})")
    return Markup(text)  # matplotlib escapes the texts that it draws
