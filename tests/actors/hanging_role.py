"""A role that can hang. Imports nothing heavy: its process has to start soon."""

from __future__ import annotations

import os
import signal
import time


class Role:
    """Stops at one call, as a process does whose disk or database is gone."""

    def __init__(self, always: bool = False) -> None:
        self._always = always

    def pid(self) -> int:
        return os.getpid()

    def twice(self, rows: list[int], slow: float = 0.0) -> list[int]:
        time.sleep(slow)
        if self._always:
            os.kill(os.getpid(), signal.SIGSTOP)
        return [2 * x for x in rows]
