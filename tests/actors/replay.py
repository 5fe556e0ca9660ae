"""Starts the processes of `replay_process.py` and reads what they found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.actors.setting import BATCH, launch


@dataclass(frozen=True)
class Found:
    """One setting: weights by "start" and "case/draw" (of rank 0), the other ranks' too, and released metrics."""

    weights: dict[str, torch.Tensor]
    others: list[dict[str, torch.Tensor]]
    released: dict[str, dict[str, float]]

    def sum(self, case: str, draw: int = 0) -> torch.Tensor:
        """What one update released, as a sum: the weight difference times L (float64)."""
        return (self.weights["start"].double() - self.weights[f"{case}/{draw}"].double()) * BATCH

    def metrics(self, case: str, draw: int = 0) -> torch.Tensor:
        """The released metrics of one update, in order of name."""
        return torch.tensor([v for _, v in sorted(self.released[f"{case}/{draw}"].items())], dtype=torch.float64)


def replay(out: Path, world: int, settings: dict[str, dict[str, Any]], cases: list[dict[str, Any]]) -> dict[str, Found]:
    """Run the cases under each setting in `world` processes; results by name of the setting."""
    launch("replay_process.py", out, world, {"settings": settings, "cases": cases})
    return {
        name: Found(
            load_file(out / f"{name}.rank0.safetensors"),
            [load_file(out / f"{name}.rank{r}.safetensors") for r in range(1, world)],
            json.loads((out / f"{name}.json").read_text()),
        )
        for name in settings
    }
