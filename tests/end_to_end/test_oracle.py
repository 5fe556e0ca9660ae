"""An oracle outside the run: it counts the weight versions that leave, measures the noise in them and the sampling
rate, and holds all three against the ledger's rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from dprlhf_ray import config_file, pipeline
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.stage_run import Roles
from tests.end_to_end.rewards import CONSTANT
from tests.end_to_end.runs import World, attempts, make_world
from tests.end_to_end.test_faults import learner_processes

STEPS, RECORDS, BATCH, LR = 8, 1000, 100, 0.05


@dataclass
class Oracle:
    """What was seen. versions: numbers of the weight versions that reached the fleet, in order; weights: trainable
    ones of each checkpoint; charges, scored: rows of the ledger and private prompts scored so far, at each step."""

    versions: list[int] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    charges: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def crowd(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> World:
    return make_world(tmp_path_factory.mktemp("crowd"), tiny_model, RECORDS)


def _tree(crowd: World) -> dict[str, Any]:
    """A constant reward and that constant as baseline: every gradient is zero, and an update is noise only."""
    tree = crowd.tree(STEPS)
    tree["model"]["adapter"] = {"kind": "lora", "rank": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    tree["evaluation"] |= {"prompts": 2}
    tree["rollout"] |= {"max_num_seqs": 128}
    stage = tree["stages"][0]
    stage["algorithm"] = {"kind": "reinforce", "baseline": "constant", "baseline_value": CONSTANT}
    stage["scorer"] = {"kind": "python", "function": "tests.end_to_end.rewards:constant"}
    stage["optimizer"] = {"kind": "sgd", "lr": LR}
    stage["generation"] = {"max_new_tokens": 2}
    stage["privacy"] |= {"expected_batch": BATCH, "delta": 1e-4}
    return tree


def _watch(crowd: World, root: Path, patch: pytest.MonkeyPatch, folder: Path, kill_after: int | None = None) -> Oracle:
    seen, count, plain = Oracle(), folder / "count", Fleet.sync
    patch.setenv("DPRLHF_TEST_COUNT", str(count))

    def sync(fleet: Fleet, handle: Any, reference: Any) -> None:
        seen.versions.append(handle.version)
        plain(fleet, handle, reference)

    def look(attempt: int, roles: Roles) -> None:
        newest = sorted(root.glob("checkpoints/rl/version-*"))[-1]
        (file,) = newest.rglob("*model_states.pt")
        trained = torch.load(file, weights_only=False)["module"]
        seen.weights.append(torch.cat([v.flatten().double() for k, v in sorted(trained.items()) if "lora_" in k]))
        seen.charges.append(len(attempts(root)))
        seen.scored.append(count.stat().st_size)
        if attempt == kill_after:
            for process in learner_processes():
                process.kill()

    patch.setattr(Fleet, "sync", sync)
    pipeline.run(config_file.parse(_tree(crowd)), root, on_step=look)
    return seen


def _check_noise_and_rate(seen: Oracle, root: Path) -> tuple[float, float]:
    """(measured noise / charged noise, z-value of the measured sampling rate)."""
    (schedule,) = Ledger.read(root / "ledger.db").schedules.values()
    step = schedule.step
    assert (step.population, step.steps) == (RECORDS, STEPS) and step.noise_multiplier > 0.3
    charged = step.noise_multiplier * step.clip_norm / (step.sampling_rate * step.population)
    noise = [(b - a) / LR for a, b in zip(seen.weights, seen.weights[1:], strict=False)]
    pooled = float(torch.cat(noise).square().mean().sqrt()) / charged
    alike = torch.corrcoef(torch.stack(noise)) - torch.eye(len(noise))
    assert alike.abs().max() * len(noise[0]) ** 0.5 < 6, "two published versions share noise"
    q, draws = step.sampling_rate, len(attempts(root))
    z = (seen.scored[-1] - draws * q * RECORDS) / (draws * q * (1 - q) * RECORDS) ** 0.5
    print(f"oracle: noise {pooled:.4f} of what is charged ({len(noise)} x {len(noise[0])}), "
          f"sampling rate {seen.scored[-1] / draws / RECORDS:.4f} against {q:.4f}, z {z:+.2f}, "
          f"scored {seen.scored}")  # fmt: skip
    return pooled, z


@pytest.mark.slow
def test_versions_noise_and_sampling_rate_are_what_the_ledger_says(
    crowd: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: something left unpaid, the noise is not sigma C / L, or records are drawn more often than charged."""
    root = tmp_path / "out"
    seen = _watch(crowd, root, monkeypatch, tmp_path)
    assert seen.versions == list(range(STEPS + 1)), "one version a charge, after the public start"
    assert seen.charges == list(range(1, STEPS + 1)) and attempts(root) == seen.charges
    pooled, z = _check_noise_and_rate(seen, root)
    assert abs(pooled - 1) < 0.02 and abs(z) < 5


@pytest.mark.slow
def test_after_a_kill_there_are_more_charges_than_versions(
    crowd: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: a step that died was refunded or repeated: as many versions as charges, or more."""
    root = tmp_path / "out"
    seen = _watch(crowd, root, monkeypatch, tmp_path, kill_after=3)
    assert attempts(root) == list(range(1, STEPS + 1)) and max(seen.versions) == STEPS - 1
    left_at = {version: charges for version, charges in zip(range(1, STEPS), seen.charges, strict=True)}
    assert all(charges >= version for version, charges in left_at.items())
    pooled, z = _check_noise_and_rate(seen, root)
    assert abs(pooled - 1) < 0.02 and abs(z) < 5
