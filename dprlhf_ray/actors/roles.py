"""Starting the small roles: accountant and scorer, as named actors."""

from __future__ import annotations

from typing import Any

import ray

from dprlhf_ray.actors.accountant import AccountantActor
from dprlhf_ray.actors.scorer import ScorerActor
from dprlhf_ray.config import RLStage


def start_accountant(ledger: str, namespace: str) -> Any:
    """The one accountant of a run. If it dies, Ray starts it again: it reopens the ledger under a new epoch, and what was
    charged stays spent."""
    return (
        ray.remote(AccountantActor)
        .options(name="accountant", namespace=namespace, num_cpus=0, max_restarts=-1)
        .remote(ledger)
    )


def start_scorer(stage: RLStage, namespace: str) -> Any:
    """A stateless scorer; its calls may be repeated, so Ray retries them after a restart."""
    return (
        ray.remote(ScorerActor)
        .options(name=f"scorer-{stage.name}", namespace=namespace, num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote(stage.scorer)
    )
