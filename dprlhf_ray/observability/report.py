"""The report of a run: one HTML page that opens anywhere, made from released files only.

It reads config.yaml, metrics.jsonl, certificate.json and evaluation-<stage>.json, which are all released, and nothing
else: no ledger, no checkpoint, no private data. Texts come from public prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from dprlhf_ray import config_file
from dprlhf_ray.config import AnyStage, RLStage, RunConfig
from dprlhf_ray.evaluation.public import compare
from dprlhf_ray.observability import plots
from dprlhf_ray.observability.metrics import last_value, read_metrics
from dprlhf_ray.observability.page import render
from dprlhf_ray.run_dir import RunDir, read_json, write_atomically

ORIGINS = {
    "noised": "private data, noised",
    "public_prompts": "public records",
    "accounting": "accounting",
    "config": "public constant",
}
KINDS = {"sft": "supervised fine-tuning", "reward_model": "reward model", "rl": "reinforcement learning"}
MEASURES = {
    "reward": "mean reward",
    "log_likelihood": "log-likelihood per token (nats)",
    "accuracy": "share of pairs in the right order",
}
SHOWN = {"rl": "prompts", "sft": "demonstrations", "reward_model": "pairs"}  # what a stage is evaluated on
SERIES = (  # private metric, title, unit
    ("reward", "Mean reward of the draws", "mean reward"),
    ("nll", "Negative log-likelihood of the demonstrations drawn", "nats per token"),
    ("accuracy", "Share of the pairs drawn that are in the right order", "share of the expected draw"),
    ("margin", "Score of the chosen response above the rejected one's", "difference of scores"),
    ("length", "Completion length", "tokens"),
    ("clip_fraction", "Share of units whose gradient was clipped", "share of the expected draw"),
    ("kl", "KL divergence from the reference on the draws", "nats per token"),
)
FEW_CLIPPED = 0.2  # a smaller share of clipped gradients is worth a hint
TWINS = {"reward": ("reward", 1.0), "accuracy": ("accuracy", 1.0), "nll": ("log_likelihood", -1.0)}  # on public records


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
    page = render(
        "report.html.j2", what="report", name=config.name, certificate=certificate, stages=stages,
        config_yaml=config_file.dump(config),
    )  # fmt: skip
    target = here.root / "report.html"
    write_atomically(target, page)
    return target


def _stage(
    here: RunDir,
    config: RunConfig,
    stage: AnyStage,
    rows: Sequence[dict[str, Any]],
    certificate: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything that the template shows about one stage."""
    mine = [r for r in rows if r["stage"] == stage.name]
    path = here.evaluation(stage.name)
    evaluation = read_json(path) if path.exists() else {}
    certified = next((s for s in (certificate or {}).get("stages", []) if s["stage"] == stage.name), None)
    target = stage.privacy.epsilon
    origins = ORIGINS | ({"noised": "public data, noised"} if stage.privacy.mode == "public" else {})
    newest = mine[-1]["metrics"] if mine else []
    return {
        "name": stage.name,
        "kind": KINDS[stage.kind],
        "mode": stage.privacy.mode,
        "data": stage.data + (f"/{stage.partition}" if stage.partition else ""),
        "unit": _unit(stage),
        "start": config.start_of(stage),
        "model": config.model.name,
        "scored_by": _scored_by(stage),
        "recipe": stage.algorithm.kind
        if stage.kind == "rl"
        else {"sft": "likelihood"}.get(stage.kind, "Bradley-Terry"),
        "adapter": config.adapter_of(stage).kind,
        "steps": stage.privacy.steps,
        "attempt": mine[-1]["attempt"] if mine else 0,
        "target": target,
        "certified": (certified or {}).get("epsilon"),
        "epsilon_spent": None if target is None else last_value(mine, stage.name, "epsilon_spent"),
        "measure": MEASURES.get(evaluation.get("measure", "reward")),
        "shown": SHOWN[stage.kind],
        "comparison": _comparison(evaluation),
        "before_mean": _mean(evaluation.get("before")),
        "samples": _samples(evaluation, config.evaluation.samples),
        "metrics": [m | {"shown_origin": origins[m["origin"]]} for m in newest if _meaningful(m, target)],
        "plots": _plots(stage, mine, evaluation, origins),
        "hint": _hint(stage, mine),
    }


def _hint(stage: AnyStage, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Where noise was made for gradients that were not there. Of released metrics."""
    shares = [m["value"] for r in rows for m in r["metrics"] if m["name"] == "private/clip_fraction"]
    if not shares or stage.privacy.mode != "dp" or (mean := sum(shares) / len(shares)) > FEW_CLIPPED:
        return None
    return (
        f"About {max(0.0, mean):.0%} of the gradients reached the clip norm {stage.privacy.clip_norm:g}: the noise is "
        "made for longer ones than there are. A smaller clip_norm adds less of it at the same ε."
    )


def _unit(stage: AnyStage) -> str:
    p = stage.privacy
    if p.unit == "record":
        return "record"
    if p.records_per_user is not None:
        return f"user, of at most {p.records_per_user} records (records are drawn)"
    return f"user, with up to {p.records_per_draw} records per draw"


def _scored_by(stage: AnyStage) -> str | None:
    """What the rewards of an rl stage come from."""
    if not isinstance(stage, RLStage):
        return None
    leaves = [s for s in stage.scorer.flat() if not s.members]
    names = [f"reward model of stage {s.stage}" if s.stage else s.model or s.function or s.kind for s in leaves]
    return ", ".join(names) + (", standardised on public prompts" if stage.scorer.standardise else "")


def _meaningful(metric: Mapping[str, Any], target: float | None) -> bool:
    """Without a guarantee there is no epsilon to show, whatever a meter says."""
    return target is not None or metric["name"] != "epsilon_spent"


def _comparison(evaluation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Means, the interval of the difference, and the interval of each mean (public records)."""
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
    """Public prompts with both continuations; stages that generate nothing have none."""
    if "after" not in evaluation or not evaluation.get("prompts"):
        return []
    before, after = evaluation["before"], evaluation["after"]
    columns = (evaluation["prompts"], before["texts"], before["rewards"], after["texts"], after["rewards"])
    names = ("prompt", "before", "reward_before", "after", "reward_after")
    return [dict(zip(names, row, strict=True)) for row in list(zip(*columns, strict=True))[:count]]


def _plots(
    stage: AnyStage, rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], origins: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Plots with their title and origin; a plot without a single value is left out."""
    found: list[dict[str, Any]] = []

    def add(title: str, origin: str, svg: Markup) -> None:
        found.append({"title": title, "origin": origin, "svg": svg})

    whose = "public data" if stage.privacy.mode == "public" else "private records"
    for name, title, unit in SERIES:
        line = plots.series(rows, f"private/{name}")
        if not line.steps:
            continue
        twin, sign = TWINS.get(name, (None, 1.0))
        dots = plots.series(rows, f"public/{twin}").times(sign)
        origin = origins["noised"] + ("; dots: public records" if dots.steps else "")
        add(f"{title}, ± noise", origin, plots.banded(f"{stage.name}-{name}", line, unit, dots, whose))
    spent = plots.series(rows, "epsilon_spent")
    if spent.steps and stage.privacy.epsilon is not None:
        svg = plots.meter(f"{stage.name}-epsilon", spent, stage.privacy.epsilon, stage.privacy.steps)
        add("Epsilon spent", ORIGINS["accounting"], svg)
    measure = evaluation.get("measure", "reward")
    if "after" in evaluation and measure != "accuracy":  # of zeros and ones
        halves = evaluation["before"]["rewards"], evaluation["after"]["rewards"]
        svg = plots.histograms(f"{stage.name}-public", *halves, MEASURES[measure].removeprefix("mean "))
        add(f"Public {SHOWN[stage.kind]}, before and after", ORIGINS["public_prompts"], svg)
    return found
