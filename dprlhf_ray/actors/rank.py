"""One rank of the learners: it serves the commands that the driver leaves in the mailbox."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import ray

from dprlhf_ray.actors.answers import answer
from dprlhf_ray.errors import DprlhfError, place_of

if TYPE_CHECKING:  # torch and DeepSpeed are imported where a rank runs, and not where its function is passed on
    from dprlhf_ray.transport import Handle, Publisher


class LearnerError(DprlhfError):
    """An error inside an update: its type and place, without its message."""


def serve(config: dict[str, Any]) -> None:
    """Ray Train's per-worker function: build the rank, restore, serve commands until told to stop."""
    import torch.distributed as dist

    from dprlhf_ray.actors.learner import Learner
    from dprlhf_ray.transport import build_publisher

    mailbox: Any = ray.get_actor(config["mailbox"], namespace=config["namespace"])
    accountant: Any = ray.get_actor(config["accountant"], namespace=config["namespace"])
    learner = Learner(config["spec"])
    learner.restore()
    rank = dist.get_rank()
    token = [secrets.token_hex(16) if rank == 0 else None]
    dist.broadcast_object_list(token, 0)
    incarnation = str(token[0])
    dist.barrier()
    publisher = None
    if rank == 0:
        if learner.stage.kind == "rl":
            publisher = build_publisher(learner.spec.config.rollout)
        ray.get(mailbox.register.remote(incarnation, learner.info()))
    seq = 0
    while True:
        command = ray.get(mailbox.next.remote(incarnation, rank, seq))
        if command is None:
            continue
        seq, method, arguments = command
        value = None if method == "stop" else _execute(learner, method, arguments, accountant, incarnation, publisher)
        dist.barrier()  # every rank has seen the command before it is answered
        if rank == 0:
            ray.get(mailbox.reply.remote(incarnation, seq, value))
        if method == "stop":
            if publisher is not None:
                publisher.close()
            return


def _execute(
    learner: Any,
    method: str,
    arguments: tuple[Any, ...],
    accountant: Any,
    incarnation: str,
    publisher: Publisher | None,
) -> Any:
    if method == "update":
        (share,), attempt, baseline, token = arguments  # a reference inside a list: fetched by its rank only
        units = ray.get(share)

        def redeem() -> Any:
            call = accountant.redeem.remote(token, incarnation, secrets.token_hex(8))
            return answer(accountant, "accountant", "redeem", call)

        try:
            released = learner.update(units, attempt, baseline, redeem)
        except DprlhfError:  # one of our own: it quotes nothing
            raise
        except Exception as e:  # Ray Train logs whatever ends a worker, and this one's message may quote a record
            raise LearnerError(f"the update failed: {place_of(e)}") from None
        return released, *_published(learner, publisher)
    if method == "publish":
        return [], *_published(learner, publisher)
    if method in ("save", "export", "evaluate"):
        return getattr(learner, method)(*arguments)
    raise ValueError(f"unknown command {method}")


def _published(learner: Any, publisher: Publisher | None) -> tuple[int, Handle | None, list[list[float]]]:
    """(version, handle of the changed weights, log-probabilities of the public sequences): what engines need."""
    if learner.stage.kind != "rl":
        return learner.version, None, []
    version, weights = learner.weights()
    return version, None if publisher is None else publisher.publish(version, weights), learner.public_log_probs()
