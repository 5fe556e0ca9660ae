"""The learner on real DeepSpeed: ZeRO 0-3, one and two ranks, the same private step; noise once; resume."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("learner_process.py")
CLIP, BATCH = 0.05, 8


def _units(count: int, seed: int) -> list[Any]:
    """(prompt, two completions, two rewards) per unit, lengths uneven."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 60) for _ in range(rng.randint(low, high))]

    return [(tokens(2, 6), [tokens(1, 8), tokens(1, 8)], [rng.uniform(-1, 1) for _ in range(2)]) for _ in range(count)]


def learn(
    out: Path, model: Path, world: int, zero: int, *, sigma: float = 0.0, kind: str = "lora", algorithm: str = "rloo",
    draws: list[Any], optimizer: str = "sgd", rank: int = 4, corrected: bool = False, **case: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Run `world` learner processes; returns the trained and the published weights of rank 0."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    adapter = {"kind": kind, "rank": rank, "alpha": 4.0, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    stage = {
        "privacy": {"mode": "clip_only", "clip_norm": CLIP, "expected_batch": BATCH, "steps": 9},
        "algorithm": {"kind": algorithm, "completions_per_prompt": 2, "kl_coef": 0.1},
        "optimizer": {"kind": optimizer, "lr": 1.0 if optimizer == "sgd" else 0.01, "noise_corrected": corrected},
    }
    tree = {
        "model": {"name": str(model), "dtype": "float32", "adapter": adapter},
        "learner": {"num_workers": world, "zero_stage": zero, "micro_batch_tokens": 64},
        "stages": [stage],
    }
    step = {
        "unit": "record", "adjacency": "zero_out", "population": 100, "sampling_rate": BATCH / 100,
        "noise_multiplier": sigma, "clip_norm": CLIP, "updates_per_draw": 1, "steps": 9, "metric_noise_multiplier": 5.0,
    }  # fmt: skip
    path = out / "case.json"
    path.write_text(
        json.dumps({"world": world, "port": port, "run_dir": str(out), "out": str(out), "draws": draws,
                    "config": tree, "step": step} | case)
    )  # fmt: skip
    env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    logs = [(out / f"log{r}").open("w") for r in range(world)]
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(path), str(r)], env=env, stdout=log, stderr=log)
        for r, log in enumerate(logs)
    ]
    codes = [p.wait(timeout=240) for p in ranks]
    assert codes == [0] * world, (out / "log0").read_text()[-3000:]
    return load_file(out / "rank0.safetensors")


def _trained(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.flatten() for k, v in sorted(weights.items()) if k.startswith("trained/")])


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """One rank, no ZeRO: the update that all others must make."""
    return _trained(learn(tmp_path_factory.mktemp("reference"), tiny_model, 1, 0, draws=[_units(7, 1)]))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_ranks_make_the_same_update_at_every_zero_stage(
    zero: int, tiny_model: Path, tmp_path: Path, reference: torch.Tensor
) -> None:
    """False: sharding or averaging over ranks changes the private sum (a mean over ranks would halve it)."""
    got = _trained(learn(tmp_path, tiny_model, 2, zero, draws=[_units(7, 1)]))
    assert torch.allclose(got, reference, atol=1e-7), f"largest deviation {(got - reference).abs().max():.2e}"


@pytest.mark.parametrize("zero", [0, *(pytest.param(z, marks=pytest.mark.slow) for z in (1, 2, 3))])
def test_noise_is_added_once_whatever_the_ranks_and_the_stage(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    """False: each rank adds its own noise (sqrt 2), noise is averaged (1/sqrt 2), or replicas differ.

    An empty draw under plain SGD: the published weight difference is noise only, of scale sigma C / L.
    """
    start = learn(tmp_path / "start", tiny_model, 1, 0, draws=[], rank=32)
    noisy = learn(tmp_path / "noisy", tiny_model, 2, zero, sigma=2.0, draws=[[]], rank=32)
    noise = _trained(noisy) - _trained(start)
    ratio = noise.std().item() / (2.0 * CLIP / BATCH)
    assert abs(ratio - 1) < 0.02, f"scale of the noise: {ratio:.4f} of what is charged ({noise.numel()} coordinates)"
    assert abs(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]) < 5 / noise.numel() ** 0.5
    other = load_file(tmp_path / "noisy" / "rank1.safetensors")
    assert all(torch.equal(noisy[k], other[k]) for k in noisy), "ranks hold different weights after the noise"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "algorithm"), [("lora_xs", "grpo"), ("ffa_lora", "reinforce"), ("full", "ppo")])
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_every_adapter_makes_the_same_update_on_two_ranks(
    kind: str, algorithm: str, zero: int, tiny_model: Path, tmp_path: Path
) -> None:
    """False: an adapter kind (or full weights, or the value head) is treated differently when sharded."""
    draws = [_units(5, 2)]
    one = _trained(learn(tmp_path / "one", tiny_model, 1, 0, kind=kind, algorithm=algorithm, draws=draws))
    two = _trained(learn(tmp_path / "two", tiny_model, 2, zero, kind=kind, algorithm=algorithm, draws=draws))
    assert (two - one).abs().max() < 1e-6


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_restored_learner_goes_on_where_it_was(zero: int, tiny_model: Path, tmp_path: Path) -> None:
    """False: weights, optimizer state, version or the adapter's frozen part are lost in a checkpoint."""
    first, second = _units(5, 3), _units(5, 4)
    kind = {"kind": "lora_xs", "optimizer": "adamw"}
    whole = learn(tmp_path / "whole", tiny_model, 1, zero, draws=[first, second], **kind)
    learn(tmp_path / "parts", tiny_model, 1, zero, draws=[first], save=True, **kind)
    resumed = learn(tmp_path / "parts", tiny_model, 1, zero, draws=[second], restore=True, **kind)
    assert json.loads((tmp_path / "parts" / "rank0.json").read_text())["version"] == 2
    assert torch.allclose(_trained(resumed), _trained(whole), atol=1e-7)
    files = [p.name for p in (tmp_path / "parts" / "checkpoints").rglob("*") if p.is_file()]
    assert not [f for f in files if "rng" in f or "random" in f], "random-number states do not belong in a checkpoint"
