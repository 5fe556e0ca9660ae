"""The fleet's work of a stage, in one order: draws, charged and collected ahead of the learners, and new weights.

With `rollout.staleness` s, the first 1 + s draws are generated with the weights that the learners start from, and
every later one right after the sync s + 1 updates before it. So a draw's weights are exactly s versions older than
those that it updates (fewer only at the start), whatever takes how long. A bound on staleness that followed the clock
would let the length of one record's completion decide which weights answer another record.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import ray

from dprlhf_ray.errors import LearnersRestarted
from dprlhf_ray.privacy.private import Private
from dprlhf_ray.privacy.release import Operational
from dprlhf_ray.records import Unit

_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class Drawn(Private):
    """A charged draw, ready for the learners. seconds: operational."""

    attempt: int
    token: str
    epsilon_spent: float | None
    units: list[Unit]
    seconds: list[Operational]


class Lane:
    """Runs its jobs one after the other: at once where nothing is made ahead, else in a thread beside the learners.

    After a job that failed every later one fails with the same error, until `clear`: no draw is made with weights that
    could not be verified.

    Args:
        prepare: charge, draw and collect; in this order.
        ahead: how many draws are made ahead (s).
    """

    def __init__(self, prepare: Callable[[], Drawn], ahead: int) -> None:
        self._prepare, self.ahead = prepare, ahead
        self._pool = ThreadPoolExecutor(1, "rollouts") if ahead else None
        self._draws: deque[Future[Drawn]] = deque()
        self.asked = 0  # draws, since the start or the last `clear`
        self._failure: BaseException | None = None

    def fill(self, left: int) -> None:
        """Ask for the draws that are still missing, at most `left` in all."""
        while len(self._draws) < min(left, 1 + self.ahead):
            self.asked += 1
            self._draws.append(self.run(self._prepare))

    def take(self) -> Drawn:
        """The next draw. Raises what its preparation raised."""
        return self._draws.popleft().result()

    def run(self, job: Callable[[], _T]) -> Future[_T]:
        """Do this after all that was asked for before."""

        def guarded() -> _T:
            if self._failure is not None:
                raise self._failure
            try:
                return job()
            except BaseException as e:
                self._failure = e
                raise

        if self._pool is not None:
            return self._pool.submit(guarded)
        done: Future[_T] = Future()
        done.set_result(guarded())
        return done

    def clear(self) -> None:
        """Throw away what is under way: its charges stay spent. Waits for what runs or cannot be taken back.

        Raises:
            DprlhfError: what ended the lane, where that was no death of an actor.
        """
        for draw in self._draws:
            draw.cancel()
        if self._pool is not None:
            self._pool.submit(lambda: None).result()  # after all syncs: none of them comes later
        self._draws.clear()
        failure, self._failure, self.asked = self._failure, None, 0
        if failure is not None and not isinstance(failure, ray.exceptions.RayError | LearnersRestarted):
            raise failure

    def close(self) -> None:
        """Nothing more is begun; waits for the job that runs, which must not outlive the cluster it talks to."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
