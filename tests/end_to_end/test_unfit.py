"""A record that the engine cannot take, in the middle of a draw, changes nothing for the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dprlhf_ray import pipeline
from dprlhf_ray.config import RLStage
from dprlhf_ray.records import Completion, Prompt


def test_a_prompt_without_completions_is_null_and_shifts_nobody_s_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: the next records get its rewards, or the step dies whenever it is drawn, which tells that it is there."""
    stage = RLStage.model_validate({
        "privacy": {"epsilon": 1.0}, "algorithm": {"kind": "rloo", "completions_per_prompt": 2},
    })  # fmt: skip
    drawn = [Prompt(i, (i + 1,), str(i)) for i in range(4)]

    def generate(prompts: Any, group: int) -> list[list[Completion]]:
        return [[] if p == (2,) else [Completion((g,), f"{p[0]}.{g}", False, 0) for g in range(group)] for p in prompts]

    score = SimpleNamespace(remote=lambda pairs: [float(text) for _, text in pairs])
    monkeypatch.setattr(pipeline, "ray", SimpleNamespace(get=lambda x: x))
    roles: Any = SimpleNamespace(fleet=SimpleNamespace(generate=generate), scorer=SimpleNamespace(score=score))
    done = pipeline.rollout(drawn, stage, roles)
    assert [e.is_null for e in done] == [False, True, False, False]
    assert [[r.reveal() for r in e.rewards if r] for e in done] == [[1.0, 1.1], [], [3.0, 3.1], [4.0, 4.1]]
