"""The live line names what a stage releases, and says what it costs."""

from __future__ import annotations

import pytest

from dprlhf_ray.observability.progress import RunProgress
from dprlhf_ray.privacy.release import Operational, Released


@pytest.mark.parametrize(
    ("public", "target", "released", "expected", "absent"),
    [
        (False, 4.0, [("epsilon_spent", 1.5), ("private/nll", 3.25)], ["eps 1.50 of 4", "private/nll 3.250"], "free"),
        (False, None, [("private/accuracy", 0.5)], ["no guarantee (clip only)", "private/accuracy 0.500"], "eps"),
        (True, None, [("private/accuracy", 0.5)], ["public data, free", "private/accuracy 0.500"], "guarantee"),
        (
            False,
            4.0,
            [("epsilon_spent", 1.5), ("public/log_likelihood", -2.0)],
            ["public/log_likelihood -2.000"],
            "tok/s",
        ),
    ],
)
def test_the_line_names_what_a_stage_releases_and_what_it_costs(
    public: bool, target: float | None, released: list[tuple[str, float]], expected: list[str], absent: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """False: a stage on public data seems to lack a guarantee, or a stage without rewards shows nothing of itself."""
    progress = RunProgress()
    progress.begin("first", 0, 2, public)
    progress.step("first", 1, 2, target, [Released(n, v, "accounting") for n, v in released], [], [])
    line = capsys.readouterr().out
    assert all(e in line for e in expected) and absent not in line


def test_speed_is_shown_where_something_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RunProgress()
    progress.begin("rl", 0, 2)
    progress.step("rl", 1, 2, None, [], [Operational("tokens_per_second", 12.0)], [Operational("learn", 1.0)])
    line = capsys.readouterr().out
    assert "12 tok/s" in line and "[learn 1.0 s]" in line
