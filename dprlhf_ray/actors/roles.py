"""The small roles, as named actors: accountant and scorer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dprlhf_ray.actors.accountant import AccountantActor, Reservation
from dprlhf_ray.actors.answers import answer
from dprlhf_ray.actors.scorer import ScorerActor
from dprlhf_ray.config import RLStage


def start_accountant(ledger: str, key: str | None, anchor: str | None, anchor_file: str | None, namespace: str) -> Any:
    """The one accountant of a run, on the driver's node, where the ledger's file is. If it dies, Ray starts it again:
    it reopens the ledger under a new epoch, and what was charged stays spent.

    Args:
        anchor: a ledger head recorded elsewhere (in the newest checkpoint), which must be part of the chain.
        anchor_file: the configured anchor, see `privacy/anchor.py`.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(AccountantActor)
        .options(name="accountant", namespace=namespace, num_cpus=0, max_restarts=-1, scheduling_strategy=here)
        .remote(ledger, key, anchor, anchor_file)
    )


def ask(accountant: Any, method: str, *arguments: Any, patience: float = 120.0) -> Any:
    """The accountant's answer to a call that may be repeated (not `reserve`: every one of its calls is a charge).

    Waits up to `patience` seconds for an accountant that is starting again.
    """
    gone: float | None = None
    while True:
        try:
            return answer(accountant, "accountant", getattr(accountant, method).remote(*arguments))
        except ray.exceptions.ActorUnavailableError:
            gone = gone or time.monotonic()
            if time.monotonic() - gone > patience:
                raise
            time.sleep(0.2)


def reserve(accountant: Any, stage: str, incarnation: str) -> Reservation:
    """Charge one attempt; see `AccountantActor.reserve`. Never repeated.

    Raises:
        ActorUnavailableError: the accountant died under the call; what it charged is in the ledger.
    """
    charged: Reservation = answer(accountant, "accountant", accountant.reserve.remote(stage, incarnation))
    return charged


def start_scorer(stage: RLStage, models: Mapping[str, Path], namespace: str, gpus: float = 0.0) -> Any:
    """A stateless scorer; its calls may be repeated, so Ray retries them after a restart.

    Args:
        models: folders of this run's reward models, by stage.
        gpus: reserved for it; waits until it has them.
    """
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": -1}
    scorer: Any = (
        ray.remote(ScorerActor)
        .options(name=f"scorer-{stage.name}", namespace=namespace, **options)
        .remote(stage.scorer, dict(models))
    )
    if gpus:
        answer(scorer, "scorer", scorer.ping.remote())
    return scorer
