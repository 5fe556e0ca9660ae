"""Answers of the small roles, bounded in time: one that hangs is killed, and Ray starts it again."""

from __future__ import annotations

import logging
from typing import Any

from dprlhf_ray.actors.cluster import ray  # first: sets Ray's environment before ray is imported
from dprlhf_ray.errors import DprlhfError

# Seconds without an answer, after which a role counts as hung.
PATIENCE = {"accountant": 600.0, "learners' mailbox": 600.0, "scorer": 3600.0}
HANGS = 3  # times in a row, after which that is no accident
_log = logging.getLogger(__name__)


class RoleHangs(DprlhfError):
    """A role gives no answer, although it was started again."""


def answer(actor: Any, role: str, call: Any) -> Any:
    """What a role answers to a call that was made.

    Args:
        role: a key of `PATIENCE`.
        call: of one of its methods. After a hang it is repeated where Ray repeats the actor's calls
            (`max_task_retries`); else it fails as under any other death.

    Raises:
        RayError: the actor died under the call.
        RoleHangs: nothing came in its time, `HANGS` times in a row.
    """
    patience = PATIENCE[role]
    for _ in range(HANGS):
        try:
            return ray.get(call, timeout=patience)
        except ray.exceptions.GetTimeoutError:
            _log.warning("the %s gave no answer within %.0f s: it is killed", role, patience)
            ray.kill(actor, no_restart=False)
    raise RoleHangs(
        f"the {role} gave no answer within {patience:.0f} s, {HANGS} times in a row: what it waits for (a disk, a "
        "database, a device, your own function) does not answer; mend that, and run again with --resume"
    )
