"""The report of a run: one HTML page that opens anywhere, made from released files only.

It reads config.yaml, metrics.jsonl, certificate.json and evaluation-<stage>.json, which are all released, and nothing
else: no ledger, no checkpoint, no private data. Texts come from public prompts. All values are escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from dprlhf_ray import config_file
from dprlhf_ray.config import RLStage, RunConfig
from dprlhf_ray.evaluation.public import compare
from dprlhf_ray.observability import plots
from dprlhf_ray.observability.metrics import last_value, read_metrics
from dprlhf_ray.run_dir import RunDir, read_json, write_atomically

ORIGINS = {
    "noised": "private data, noised",
    "public_prompts": "public prompts",
    "accounting": "accounting",
    "config": "public constant",
}


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    A run in progress has no certificate.json yet, or an evaluation without its second half: the page says so.

    Raises:
        ConfigError: config.yaml is not a config of this version.
        FileNotFoundError: there is no config.yaml.
    """
    here = RunDir(Path(run_dir))
    config = config_file.parse(yaml.safe_load(here.config.read_text(encoding="utf-8")), str(here.config))
    path = here.root / "certificate.json"
    certificate = read_json(path) if path.exists() else None
    rows = read_metrics(here.root)
    stages = [_stage(here, config, stage, rows, certificate) for stage in config.stages]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # by name it would be off: the template's suffix is not .html
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=config.name, config=config, certificate=certificate, stages=stages, config_yaml=config_file.dump(config)
    )
    target = here.root / "report.html"
    write_atomically(target, page)
    return target


def _stage(
    here: RunDir,
    config: RunConfig,
    stage: RLStage,
    rows: Sequence[dict[str, Any]],
    certificate: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that the template shows about one stage."""
    mine = [r for r in rows if r["stage"] == stage.name]
    path = here.evaluation(stage.name)
    evaluation = read_json(path) if path.exists() else {}
    certified = [s for s in (certificate or {}).get("stages", []) if s["stage"] == stage.name]
    target = stage.privacy.epsilon
    newest = mine[-1]["metrics"] if mine else []
    return {
        "name": stage.name,
        "data": stage.data,
        "steps": stage.privacy.steps,
        "attempt": mine[-1]["attempt"] if mine else 0,
        "clip_only": stage.privacy.mode == "clip_only",
        "target": target,
        "delta": stage.privacy.delta,
        "algorithm": stage.algorithm.kind,
        "adapter": config.model.adapter.kind,
        "certified": certified[0] if certified else None,
        "epsilon_spent": None if target is None else last_value(mine, stage.name, "epsilon_spent"),
        "comparison": _comparison(evaluation),
        "before_mean": _mean(evaluation.get("before")),
        "samples": _samples(evaluation, config.evaluation.samples),
        "metrics": [m | {"shown_origin": ORIGINS[m["origin"]]} for m in newest if _meaningful(m, target)],
        "plots": _plots(stage, mine, evaluation),
    }


def _meaningful(metric: Mapping[str, Any], target: float | None) -> bool:
    """Without a guarantee there is no epsilon to show, whatever a meter says."""
    return target is not None or metric["name"] != "epsilon_spent"


def _comparison(evaluation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Means, the interval of the difference, and the interval of each mean (public prompts)."""
    if "after" not in evaluation:
        return None
    before, after = evaluation["before"]["rewards"], evaluation["after"]["rewards"]
    found = evaluation.get("comparison") or compare(before, after).as_dict()
    zero = [0.0] * len(before)
    halves = {"before_interval": compare(zero, before).as_dict(), "after_interval": compare(zero, after).as_dict()}
    return found | halves


def _mean(half: Mapping[str, Any] | None) -> float | None:
    return sum(half["rewards"]) / len(half["rewards"]) if half and half["rewards"] else None


def _samples(evaluation: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    if "after" not in evaluation or "prompts" not in evaluation:
        return []
    before, after = evaluation["before"], evaluation["after"]
    columns = (evaluation["prompts"], before["texts"], before["rewards"], after["texts"], after["rewards"])
    names = ("prompt", "before", "reward_before", "after", "reward_after")
    return [dict(zip(names, row, strict=True)) for row in list(zip(*columns, strict=True))[:count]]


def _plots(stage: RLStage, rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plots with their title and origin; a plot without a single value is left out."""
    reward, public = plots.series(rows, "private/reward"), plots.series(rows, "public/reward")
    length, clipped = plots.series(rows, "private/length"), plots.series(rows, "private/clip_fraction")
    kl = plots.series(rows, "private/kl")
    spent = plots.series(rows, "epsilon_spent")
    noised = ORIGINS["noised"]
    found: list[dict[str, Any]] = []

    def add(title: str, origin: str, svg: Markup) -> None:
        found.append({"title": title, "origin": origin, "svg": svg})

    if reward.steps:
        origin = noised + ("; dots: public prompts" if public.steps else "")
        svg = plots.banded(f"{stage.name}-reward", reward, "mean reward", public)
        add("Mean reward of the draws, ± one standard deviation of its noise", origin, svg)
    if spent.steps and stage.privacy.epsilon is not None:
        svg = plots.meter(f"{stage.name}-epsilon", spent, stage.privacy.epsilon, stage.privacy.steps)
        add("Epsilon spent", ORIGINS["accounting"], svg)
    if length.steps:
        add("Completion length, ± noise", noised, plots.banded(f"{stage.name}-length", length, "tokens"))
    if clipped.steps:
        svg = plots.banded(f"{stage.name}-clip", clipped, "share of the expected draw")
        add("Share of records whose gradient was clipped, ± noise", noised, svg)
    if kl.steps:
        svg = plots.banded(f"{stage.name}-kl", kl, "nats per token")
        add("KL divergence from the reference on the draws, ± noise", noised, svg)
    if "after" in evaluation:
        halves = evaluation["before"]["rewards"], evaluation["after"]["rewards"]
        svg = plots.histograms(f"{stage.name}-public", *halves)
        add("Rewards on public prompts, before and after", ORIGINS["public_prompts"], svg)
    return found
