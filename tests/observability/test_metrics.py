"""Only released values reach the metrics file, and a crash costs at most the line that it cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dprlhf_ray.config import TrackingConfig
from dprlhf_ray.observability.metrics import MetricsLog, last_value, read_metrics
from dprlhf_ray.privacy.release import Released


def _log(folder: Path) -> MetricsLog:
    return MetricsLog(folder, TrackingConfig(), "test")


@pytest.mark.parametrize("private", [0.25, torch.tensor(0.25), ("reward", 0.25), {"name": "reward", "value": 0.25}])
def test_a_value_that_was_not_released_is_refused_and_nothing_of_its_step_is_written(
    tmp_path: Path, private: Any
) -> None:
    with pytest.raises(TypeError, match="only released values"):
        _log(tmp_path).write("rl", 1, [Released("private/reward", 0.1, "noised", 0.02), private])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_is_read_is_what_was_written_with_its_origin_and_noise(tmp_path: Path) -> None:
    values = [Released("private/reward", 0.1, "noised", 0.02), Released("epsilon_spent", 4.5, "accounting")]
    _log(tmp_path).write("rl", 1, values)
    (row,) = read_metrics(tmp_path)
    assert (row["stage"], row["attempt"]) == ("rl", 1)
    assert [Released(**m) for m in row["metrics"]] == values


def test_a_line_cut_by_a_crash_is_left_out_and_earlier_lines_are_kept(tmp_path: Path) -> None:
    log = _log(tmp_path)
    for attempt in (1, 2):
        log.write("rl", attempt, [Released("private/reward", attempt / 10, "noised", 0.02)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    rows = read_metrics(tmp_path)
    assert [r["attempt"] for r in rows] == [1]
    assert last_value(rows, "rl", "private/reward") == 0.1


def test_the_step_after_a_cut_line_is_not_lost_with_it(tmp_path: Path) -> None:
    """A resumed run appends to a file whose last line has no end: its first line must not be glued to the torn one."""
    log = _log(tmp_path)
    log.write("rl", 1, [Released("private/reward", 0.1, "noised", 0.02)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "rl", "attempt": 2, "metr')
    _log(tmp_path).write("rl", 3, [Released("private/reward", 0.3, "noised", 0.02)])
    assert [r["attempt"] for r in read_metrics(tmp_path)] == [1, 3]


def test_a_missing_file_is_an_empty_history(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert last_value([], "rl", "private/reward") is None


def test_the_newest_value_is_that_of_its_own_stage(tmp_path: Path) -> None:
    log = _log(tmp_path)
    log.write("first", 1, [Released("private/reward", 0.1, "noised")])
    log.write("second", 1, [Released("private/reward", 0.9, "noised")])
    log.write("first", 2, [Released("epsilon_spent", 1.0, "accounting")])
    assert last_value(read_metrics(tmp_path), "first", "private/reward") == 0.1


def test_every_line_is_json_of_released_fields_only(tmp_path: Path) -> None:
    """A new field of a released value is a new release: it has to be decided here too."""
    _log(tmp_path).write("rl", 1, [Released("private/reward", 0.1, "noised", 0.02)])
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert set(row) == {"stage", "attempt", "metrics"}
    assert set(row["metrics"][0]) == {"name", "value", "origin", "std"}
