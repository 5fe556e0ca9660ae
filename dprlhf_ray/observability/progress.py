"""Progress for the operator: a live line in a terminal, plain lines in a log. Released and operational values only."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from dprlhf_ray.privacy.release import Operational, Released, only

UNSHOWN = ("epsilon_spent", "private/clip_fraction")  # of what is released; the first has its own place


class Laps:
    """Seconds spent in the parts of a step: operational, for the operator only."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str | None) -> None:
        """Since the lap before; None: it is counted elsewhere."""
        now = time.monotonic()
        if name is not None:
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def figures(self) -> list[Operational]:
        return [Operational(name, seconds) for name, seconds in self._seconds.items()]


class RunProgress:
    """`say` prints a line; `begin`/`step` follow a stage, whatever it releases (reward, nll, accuracy)."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._stage_started = 0.0
        self._first = 0
        self._public = False

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    def say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(f"[{time.monotonic() - self._started:6.0f} s] {text}", markup=False)
            sys.stdout.flush()

    def begin(self, stage: str, done: int, total: int, public: bool = False) -> None:
        """Follow a stage from attempt `done`; `public`: its data are declared public."""
        self._stage_started, self._first, self._public = time.monotonic(), done, public
        if self._console.is_terminal and not self._quiet:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._live.start()
            self._task = self._live.add_task(stage, total=total, completed=done, figures="")

    def step(
        self, stage: str, attempt: int, total: int, target: float | None, released: Sequence[Released],
        fleet: Sequence[Operational], laps: Sequence[Operational],
    ) -> None:  # fmt: skip
        only(Released, released)
        only(Operational, [*fleet, *laps])
        epsilon = next((r.value for r in released if r.name == "epsilon_spent"), None)
        if self._public:
            spent = "public data, free"
        else:
            spent = "no guarantee (clip only)" if epsilon is None else f"eps {epsilon:.2f} of {target:g}"
        shown = [f"{r.name} {r.value:.3f}" for r in released if r.name not in UNSHOWN]
        speed = [f"{f.value:.0f} tok/s" for f in fleet if f.name == "tokens_per_second"]
        parts = " ".join(f"{lap.name} {lap.value:.1f}" for lap in laps)
        figures = "  ".join([spent, *shown, *speed, f"[{parts} s]"])
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=attempt, figures=figures)
            return
        pace = (time.monotonic() - self._stage_started) / max(1, attempt - self._first)
        self.say(f"{stage} {attempt}/{total}  {figures}  {pace:.1f} s/step  ETA {pace * (total - attempt):.0f} s")

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = self._task = None
