"""The benchmark runner: what it reads from a benchmark and how it judges the ratios."""

from __future__ import annotations

import pytest

from benchmarks import run


def test_ratio_is_ours_over_trl_and_judged_against_the_target() -> None:
    """A runner that turned the ratio upside down would report a slow system as fast."""
    steps = [{"time_ratio": 1.02, "memory_ratio": 1.2}, {"time_ratio": 1.04, "memory_ratio": 1.3}]
    rows = run.ratios(steps, [{"seconds_per_iteration": 8.0}], [{"seconds_per_iteration": 20.0}])
    assert [round(row.value, 6) for row in rows] == [1.03, 1.25, 0.4]
    assert [row.met for row in rows] == [True, False, True]


def test_a_benchmark_that_prints_no_json_is_an_error_with_its_output() -> None:
    """A failed benchmark must not vanish from the table."""
    with pytest.raises(RuntimeError, match="no_such_benchmark"):
        run.run_benchmark("no_such_benchmark")
