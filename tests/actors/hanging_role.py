"""A role that is stopped from outside. Imports nothing heavy: its process has to start soon."""

from __future__ import annotations

import os
import time


class Role:
    def pid(self) -> int:
        return os.getpid()

    def twice(self, rows: list[int], slow: float = 0.0) -> list[int]:
        time.sleep(slow)
        return [2 * x for x in rows]
