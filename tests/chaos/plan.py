"""A case: the faults that are planned in it, and what its journal says of them and of draws and noise."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What strikes, and where.

    id: readable, as a test's id. action: see `points.strike`. where: facts of a passage that must hold. times: how
    often it strikes. lost: attempts that end without a released row because of it (None: another test says).
    """

    id: str
    point: str
    phase: str
    action: str
    attempt: int | None = None
    times: int = 1
    where: dict[str, Any] = field(default_factory=dict)
    lost: bool | None = None
    noises: int | None = None

    def as_dict(self) -> dict[str, Any]:
        where = {"point": self.point, "phase": self.phase} | self.where
        if self.attempt is not None:
            where["attempt"] = self.attempt
        return {"id": self.id, "action": self.action, "times": self.times, "where": where}


@dataclass
class Chaos:
    """The folder that all processes of the runs of a module look into; one case at a time."""

    folder: Path
    cases: int = 0

    def begin(self, faults: Sequence[Fault]) -> Case:
        """A new case: its own journal."""
        assert len({f.id for f in faults}) == len(faults)
        self.cases += 1
        case = Case(self, self.folder / f"journal-{self.cases}.jsonl")
        case.journal.touch()
        case.plan(faults)
        return case

    def end(self) -> None:
        """No case: passages are noted nowhere."""
        (self.folder / "plan.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class Case:
    """journal: every passage of a point and every fault that struck, in order."""

    chaos: Chaos
    journal: Path

    def plan(self, faults: Sequence[Fault]) -> None:
        """Other faults in the same case, e.g. for a run that is resumed."""
        partial = self.chaos.folder / ".plan.json"
        partial.write_text(json.dumps({"journal": str(self.journal), "faults": [f.as_dict() for f in faults]}))
        os.replace(partial, self.chaos.folder / "plan.json")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def passages(self, point: str, phase: str) -> list[dict[str, Any]]:
        return [e for e in self.lines() if (e["point"], e["phase"]) == (point, phase)]

    def struck(self, fault: Fault | str) -> int:
        """How often a fault struck."""
        return len(self.passages("fault", fault if isinstance(fault, str) else fault.id))

    def came_back(self, fault: Fault, role: str) -> bool:
        """Whether a process of the role came up after a fault had struck."""
        lines = self.lines()
        at = next(i for i, e in enumerate(lines) if (e["point"], e["phase"]) == ("fault", fault.id))
        return any((e["point"], e["phase"]) == (f"{role}.start", "after") for e in lines[at:])
