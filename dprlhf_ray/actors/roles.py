"""The small roles, as named actors: accountant and scorer."""

from __future__ import annotations

import logging
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
from dprlhf_ray.errors import DprlhfError

_log = logging.getLogger(__name__)


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


class AccountantGone(DprlhfError):
    """The accountant died, and does not come back."""

    def __init__(self) -> None:
        super().__init__(
            "the accountant died and cannot be started again: its ledger cannot be opened, or not in time. What was "
            "charged stays charged; run again with --resume, which says what is wrong with the ledger"
        )


def ask(accountant: Any, method: str, *arguments: Any, patience: float = 120.0) -> Any:
    """The accountant's answer to a call that may be repeated (not `reserve`: every one of its calls is a charge).

    Waits up to `patience` seconds for an accountant that is starting again.

    Raises:
        AccountantGone: it does not come back.
        RoleHangs: it hangs again and again.
    """
    gone: float | None = None
    while True:
        asked = time.monotonic()
        try:
            return answer(accountant, "accountant", method, getattr(accountant, method).remote(*arguments))
        except ray.exceptions.ActorUnavailableError:
            now = time.monotonic()
            if gone is None or now - asked > patience:  # it hung, and was killed just now
                gone = now
            if now - gone > patience:
                raise AccountantGone from None
            time.sleep(0.2)
        except ray.exceptions.ActorDiedError:
            raise AccountantGone from None


def reserve(accountant: Any, stage: str, incarnation: str) -> Reservation:
    """Charge one attempt; see `AccountantActor.reserve`. Never repeated.

    Raises:
        ActorUnavailableError: the accountant died under the call; what it charged is in the ledger.
        AccountantGone: it died before, and does not come back.
        RoleHangs: it hangs at every charge.
    """
    call = accountant.reserve.remote(stage, incarnation)
    try:
        charged: Reservation = answer(accountant, "accountant", "reserve", call)
    except ray.exceptions.ActorDiedError:
        raise AccountantGone from None
    return charged


def start_scorer(stage: RLStage, models: Mapping[str, Path], namespace: str, gpus: int = 0) -> Any:
    """A stateless scorer; its calls may be repeated, so Ray retries them after a restart.

    Formal guarantee: no other role is on its GPUs. Beside one, too little memory for a record could be the doing of
    other records.

    Args:
        models: folders of this run's reward models, by stage.
        gpus: reserved for it, and waited for. Without, it sees none.
    """
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": -1}
    if not gpus:
        options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    scorer: Any = (
        ray.remote(ScorerActor)
        .options(name=f"scorer-{stage.name}", namespace=namespace, **options)
        .remote(stage.scorer, dict(models))
    )
    if gpus:
        ready = scorer.ping.remote()
        while not ray.wait([ready], timeout=60)[0]:  # an autoscaler may need many minutes for a node
            _log.warning("the scorer is not there yet: it waits for its GPUs (%d), or loads its models", gpus)
        ray.get(ready)
    return scorer
