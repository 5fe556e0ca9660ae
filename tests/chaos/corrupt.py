"""What faults make of an answer: each takes (arguments, result) of a point and gives the result."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


def not_finite(args: Any, noised: Any) -> Any:
    """A noised sum with one NaN."""
    noised.value[0] = float("nan")
    return noised


def fewer_rows(args: Any, rows: list[Any]) -> Any:
    """The last prompt has no answer at all."""
    return rows[:-1]


def one_more_completion(args: Any, rows: list[Any]) -> Any:
    """A prompt has one completion too many."""
    return [[*rows[0], rows[0][0]], *rows[1:]]


def one_completion_less(args: Any, rows: list[Any]) -> Any:
    """A prompt has one completion of those that were asked for less."""
    return [rows[0][:-1], *rows[1:]]


def other_version(args: Any, rows: list[Any]) -> Any:
    """One completion says that it is of an older version."""
    return [[replace(c, version=c.version - 1) for c in rows[0]], *rows[1:]]


def outside_vocabulary(args: Any, rows: list[Any]) -> Any:
    """Token ids that no model has."""
    return [[replace(c, token_ids=(10**6, *c.token_ids[1:])) for c in rows[0]], *rows[1:]]


def log_probs_not_finite(args: Any, rows: list[Any]) -> Any:
    """Every log-probability of the first prompt is NaN."""
    return [[replace(c, log_probs=(float("nan"),) * len(c.token_ids)) for c in rows[0]], *rows[1:]]


def other_weights(args: Any, version: int) -> Any:
    """What was loaded is moved."""
    import torch

    with torch.no_grad():
        for p in args[0]._engine._model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return version


def nan_log_probs(args: Any, rows: list[list[float]]) -> Any:
    """The check's answer has a NaN."""
    return [[float("nan")] * len(row) for row in rows]


def nan_rewards(args: Any, rewards: list[Any]) -> Any:
    """Every third value is no number."""
    return [float("nan") if i % 3 == 0 else x for i, x in enumerate(rewards)]


def fewer_rewards(args: Any, rewards: list[Any]) -> Any:
    return rewards[:-1]


def more_rewards(args: Any, rewards: list[Any]) -> Any:
    return [*rewards, 0.5]


def keep_old_weights(args: Any, _: Any) -> None:
    """What is loaded is thrown away, and the version says otherwise."""
    args[0]._engine._load = lambda weights: None


def _run_dir() -> Path:
    """Of the run under test, as the test says."""
    return Path((Path(os.environ["DPRLHF_CHAOS"]) / "run_dir").read_text())


def ask_for_three(args: Any, result: Any) -> Any:
    """In a replica: somebody asks for one more, and this one takes its time."""
    (_run_dir() / "scale.json").write_text(json.dumps({"rollouts": 3, "asked": 3}))
    time.sleep(2.5)
    return result


def scale_garbage(args: Any, result: Any) -> Any:
    """Somebody asks for what is no number of replicas."""
    (_run_dir() / "scale.json").write_bytes(b'\x00\xff{"rollouts": [[')
    time.sleep(1.5)
    return result


def weights_gone(args: Any, _: Any) -> None:
    """As the object store says it when a version's owner has died."""
    from dprlhf_ray.errors import WeightsLost

    raise WeightsLost("planted")


def damaged(args: Any, tensors: dict[str, Any]) -> Any:
    """One bit of one tensor is another, as memory or a network may make it."""
    name = min(tensors)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1).view(_torch().uint8)[0] ^= 1
    return tensors


def _torch() -> Any:
    import torch

    return torch
