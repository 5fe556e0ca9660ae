"""Answers of the small roles, bounded in time: one that hangs is killed, and Ray starts it again."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from dprlhf_ray.actors.cluster import ray  # first: sets Ray's environment before ray is imported
from dprlhf_ray.errors import DprlhfError

# Seconds without an answer, after which a role counts as hung: for what is asked in every step, and for all else
# (a part of a draw is scored, the schedules of a large ledger are composed).
QUICK, LONG = 600.0, 3600.0
ASKED_IN_EVERY_STEP = ("reserve", "redeem", "spent", "head")
HANGS = 3  # in a row, after which that is no accident
_in_a_row: Counter[tuple[str, str]] = Counter()  # by role and method, since it answered last
_log = logging.getLogger(__name__)


class RoleHangs(DprlhfError):
    """A role gives no answer, although it was started again."""


def answered(call: Any, patience: float) -> bool:
    """Whether a call is answered within `patience` seconds. The second look is for a driver that was itself stopped."""
    return bool(ray.wait([call], timeout=patience)[0] or ray.wait([call], timeout=5)[0])


def answer(actor: Any, role: str, method: str, call: Any) -> Any:
    """What a role answers.

    Args:
        call: of the method, already made. After a hang it is repeated where Ray repeats the actor's calls
            (`max_task_retries`); else it fails as under any other death.

    Raises:
        RayError: the actor died under the call.
        RoleHangs: nothing came in its time, `HANGS` times in a row.
    """
    patience = QUICK if method in ASKED_IN_EVERY_STEP else LONG
    while _in_a_row[role, method] < HANGS:
        if answered(call, patience):
            found = ray.get(call)
            del _in_a_row[role, method]
            return found
        _in_a_row[role, method] += 1
        _log.warning("the %s gave no answer within %.0f s: it is killed", role, patience)
        ray.kill(actor, no_restart=False)
    del _in_a_row[role, method]
    raise RoleHangs(
        f"the {role} gave no answer within {patience:.0f} s, {HANGS} times in a row: what it waits for (a disk, a "
        "database, a device, your own function) does not answer; mend that, and run again with --resume"
    )
