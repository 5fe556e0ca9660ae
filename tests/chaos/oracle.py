"""The count from outside: draws and noises that hooks noted as they happened, against what was charged and released."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dprlhf_ray.config import RunConfig
from dprlhf_ray.observability.metrics import read_metrics
from dprlhf_ray.privacy.chain import Entry
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.planning import plan_stage


@dataclass(frozen=True)
class Seen:
    """charged: attempts of all stages in the ledger, in order. draws: noted. noises: per attempt, noted. released:
    attempts that have rows."""

    charged: list[int]
    draws: int
    noises: Counter[int]
    released: list[int]


def charges(url: str | Path, key: str | Path | None = None) -> list[int]:
    """Attempts charged in a whole ledger, walked entry by entry."""
    entries: list[Entry] = []
    view = Ledger.read(url, key, visit=entries.append)
    found = [json.loads(e.body)["attempt"] for e in entries if e.kind == "charge"]
    assert sum(s.spent for s in view.schedules.values()) == len(found), "the ledger's sums are not those of its entries"
    return found


def look(journal: Sequence[dict[str, Any]], root: Path, ledger: str | None = None, key: str | None = None) -> Seen:
    """Everything that the rules are about."""
    where = ledger or root / "ledger.db"
    known = ledger is not None or (root / "ledger.db").exists()
    return Seen(
        charges(where, key) if known else [],
        sum((e["point"], e["phase"]) == ("driver.draw", "before") for e in journal),
        Counter(e["attempt"] for e in journal if (e["point"], e["phase"]) == ("learner.noise", "after")),
        [row["attempt"] for row in read_metrics(root)],
    )


def problems(seen: Seen, updates: int = 1) -> list[str]:
    """What is wrong with a run of one stage, whether it ended or not.

    Args:
        updates: K, what one charge pays for.
    """
    n, wrong = len(seen.charged), []
    if seen.charged != list(range(1, n + 1)):
        wrong.append(f"attempts charged are not 1..n, each once: {seen.charged}")
    if n < seen.draws:
        wrong.append(f"{seen.draws} draws, {n} charges")
    if n < len(seen.released):
        wrong.append(f"{len(seen.released)} released rows, {n} charges")
    if sum(seen.noises.values()) > n * updates:
        wrong.append(f"{sum(seen.noises.values())} noises, {n} charges of {updates}")
    if len(set(seen.released)) != len(seen.released):
        wrong.append(f"an attempt was released twice: {seen.released}")
    if not set(seen.released) <= set(seen.charged):
        wrong.append(f"released without a charge: {sorted(set(seen.released) - set(seen.charged))}")
    if not set(seen.noises) <= set(seen.charged):
        wrong.append(f"noise without a charge: {sorted(set(seen.noises) - set(seen.charged))}")
    for attempt, count in seen.noises.items():
        if count > updates:
            wrong.append(f"attempt {attempt} was noised {count} times, {updates} were paid for")
    for attempt in seen.released:
        if seen.noises[attempt] < updates:
            wrong.append(f"attempt {attempt} was released after {seen.noises[attempt]} of {updates} noises")
    return wrong


def certificate_problems(root: Path, config: RunConfig, population: int, charged: int) -> list[str]:
    """What is wrong with what a run of one stage that ended says of itself."""
    (stage,) = json.loads((root / "certificate.json").read_text())["stages"]
    planned = plan_stage(config.stages[0], population).epsilon
    wrong = []
    if not stage["attempts_charged"] == charged == config.stages[0].privacy.steps:
        wrong.append(
            f"certified {stage['attempts_charged']}, charged {charged}, {config.stages[0].privacy.steps} planned"
        )
    if planned is None or stage["epsilon"]["pld"] != planned.pld or stage["epsilon"]["pld"] > stage["epsilon_target"]:
        wrong.append(f"epsilon {stage['epsilon']}, planned {planned}, target {stage['epsilon_target']}")
    if not (root / "models" / config.stages[0].name / "merged" / "model.safetensors").exists():
        wrong.append("no final model")
    cards = [p.read_text() for p in (root / "models" / config.stages[0].name).rglob("README.md")]
    if not cards or any("not certified yet" in card for card in cards):
        wrong.append("the model's cards do not have the certificate")
    return wrong
