"""How many replicas a running fleet should have: asked for from outside, by a file in the run directory.

A file and no actor: it needs no address or token of a cluster, only the run directory, and outlives the driver.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.run_dir import read_json, write_atomically

REQUEST, ANSWER = "scale.json", ".fleet.json"  # the operator's, the driver's: operational, nothing private
PERIOD = 0.5  # seconds
MOST = 4096  # replicas


def ask_for(run_dir: Path, rollouts: int, wait: float) -> dict[str, Any] | None:
    """Ask for a number of replicas; the driver's answer, or None after `wait` seconds without one."""
    asked = time.time_ns()
    write_atomically(run_dir / REQUEST, json.dumps({"rollouts": rollouts, "asked": asked}))
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        if (run_dir / ANSWER).exists():
            answer: dict[str, Any] = read_json(run_dir / ANSWER)
            if answer["asked"] == asked:
                return answer
        time.sleep(0.05)
    return None


class Control:
    """Watches the request for as long as a stage's fleet lives; what was asked for last also counts after a restart."""

    def __init__(self, run_dir: Path, fleet: Fleet) -> None:
        self._run_dir, self._fleet = run_dir, fleet
        self._done: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="scale")

    def start(self, replicas: int) -> None:
        """Start the fleet with the number asked for, else with `replicas`."""
        if (request := self._request()) is None:
            self._fleet.start(replicas)
        else:
            self._follow(request)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            if (request := self._request()) is not None and request["asked"] != self._done:
                with contextlib.suppress(OSError):  # a full disk: the answer waits
                    self._follow(request)

    def _follow(self, request: dict[str, int]) -> None:
        self._fleet.resize(request["rollouts"])
        self._done = request["asked"]
        status = self._fleet.status()
        answer = {"asked": self._done} | {k: status[k] for k in ("replicas", "healthy", "starting")}
        write_atomically(self._run_dir / ANSWER, json.dumps(answer))

    def _request(self) -> dict[str, int] | None:
        """None: nobody asked, or what is there is no request."""
        try:
            found = read_json(self._run_dir / REQUEST)
            return {"rollouts": min(max(1, int(found["rollouts"])), MOST), "asked": int(found["asked"])}
        except (ConfigError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
