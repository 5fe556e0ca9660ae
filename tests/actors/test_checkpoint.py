"""What lies in a checkpoint of the real learner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.actors.setting import setting, units
from tests.actors.test_learner import learn

GENERATOR_BYTES = torch.get_rng_state().numel()  # of torch's CPU generator; that of CUDA has 16


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{name}.{i}")
    else:
        yield name, tree


def test_a_checkpoint_holds_released_values_only(tiny_model: Path, tmp_path: Path) -> None:
    """False: the state of a random-number generator is stored, and what was drawn from it can be drawn again; or raw
    gradients lie beside the optimizer's state."""
    learn(tmp_path, setting(tiny_model, 1, 0, optimizer="adamw"), [units(3, 1)], save=True)
    files = [p for p in (tmp_path / "checkpoints").rglob("*.pt")]
    assert files, "no checkpoint was written: nothing was looked at"
    found = [leaf for p in files for leaf in _leaves(torch.load(p, weights_only=False, map_location="cpu"), p.name)]
    tensors = {name: v for name, v in found if isinstance(v, torch.Tensor)}
    assert any(name.endswith("exp_avg_sq") for name in tensors), "the optimizer's state is elsewhere"
    assert [name for name, v in tensors.items() if v.dtype == torch.uint8 or v.numel() == GENERATOR_BYTES] == []
    assert [name for name, v in found if v is not None and ("rng" in name or "random" in name)] == []
    assert [name for name in tensors if "grad" in name] == []
