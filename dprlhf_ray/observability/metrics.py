"""The metrics file: one JSON line per step, released values only. Other sinks get the same values."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dprlhf_ray.config import TrackingConfig
from dprlhf_ray.privacy.release import Released, only


class MetricsLog:
    """Appends to `metrics.jsonl`, and to TensorBoard and W&B when asked.

    Only `Released` values are accepted: a private number has no way in.
    """

    def __init__(self, run_dir: Path, tracking: TrackingConfig, name: str) -> None:
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):  # torn by a crash: end it, lose only it
            with self.path.open("a", encoding="utf-8") as f:
                f.write("\n")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))
        if tracking.wandb_project:
            import wandb

            settings = wandb.Settings(console="off", x_disable_stats=True)  # released values only
            self._wandb = wandb.init(project=tracking.wandb_project, name=name, dir=str(run_dir), settings=settings)

    def write(self, stage: str, attempt: int, values: Sequence[Released]) -> None:
        """Append one step's values, durably."""
        only(Released, values)
        line = json.dumps({"stage": stage, "attempt": attempt, "metrics": [v.as_dict() for v in values]})
        with self.path.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
        flat = {f"{stage}/{v.name}": v.value for v in values}
        if self._tensorboard:
            for key, value in flat.items():
                self._tensorboard.add_scalar(key, value, attempt, walltime=attempt)
            self._tensorboard.flush()
        if self._wandb:
            self._wandb.log(flat)

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`; a line cut short by a crash is left out."""
    path = run_dir / "metrics.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def last_value(rows: Sequence[dict[str, Any]], stage: str, name: str) -> float | None:
    """The newest released value of a metric."""
    for row in reversed(rows):
        if row["stage"] == stage:
            for m in row["metrics"]:
                if m["name"] == name:
                    return float(m["value"])
    return None
