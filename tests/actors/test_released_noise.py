"""Noise as an outsider sees it, in published weight differences under plain SGD: scale, and nothing is shared."""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch

from tests.actors.replay import replay
from tests.actors.setting import BATCH, CLIP, setting

SIGMA, STEPS, STAGES = 2.0, 3, (0, 3)  # of ZeRO: the two with code of their own
LIMIT = 7.0  # z-values; 15 million of them are looked at: a false alarm in 20,000 runs


def correlation(a: torch.Tensor, b: torch.Tensor, itself: bool) -> float:
    """Largest |z| of the correlation of a with b, at every shift of one against the other (with itself: but 0)."""
    spectrum = torch.fft.rfft(a) * torch.fft.rfft(b).conj()
    found = torch.fft.irfft(spectrum, n=len(a)) / (a.norm() * b.norm())
    if itself:
        found[0] = 0
    return float(found.abs().max()) * len(a) ** 0.5


def rejected(noises: list[torch.Tensor]) -> set[str]:
    """What is wrong with vectors that should be independent standard normal."""
    found = {"scale" for n in noises if abs(n.std() - 1) > 0.02} | {
        "mean" for n in noises if abs(n.mean()) * len(n) ** 0.5 > LIMIT
    }
    for i, j in combinations_with_replacement(range(len(noises)), 2):
        if correlation(noises[i], noises[j], i == j) > LIMIT:
            found.add("not white" if i == j else "shared")
    return found


@pytest.fixture(scope="module")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list[torch.Tensor]]:
    """(run, ZeRO stage) -> what an outsider computes from the weights: noise of each step, in units of sigma C / L.

    Two ranks; the second run is a restart with the same config. Draws are empty: a step is noise only.
    """
    cases = [{"name": "noise", "draws": [[]] * STEPS}]
    settings = {
        f"zero{z}": setting(tiny_model, 2, z, rank=32, algorithm="reinforce", noise_multiplier=SIGMA) for z in STAGES
    }
    noises = {}
    for run in range(2):
        found = replay(tmp_path_factory.mktemp("noise"), 2, settings, cases)
        for zero, f in enumerate(found.values()):
            noises[run, zero] = [f.sum("noise", step) / (SIGMA * CLIP) for step in range(STEPS)]
            assert all(torch.equal(other[k], v) for other in f.others for k, v in f.weights.items()), "ranks differ"
    return noises


def test_the_noise_has_the_charged_scale_and_shares_nothing(
    published: dict[tuple[int, int], list[torch.Tensor]],
) -> None:
    """False: noise per rank, averaged, repeated in a step, a shard, a stage or after a restart."""
    everything = [n for noises in published.values() for n in noises]
    assert len(everything) == 2 * len(STAGES) * STEPS and len(everything[0]) > 40_000
    assert rejected(everything) == set(), [f"{float(n.std()):.4f}" for n in everything]


def test_the_statistics_reject_wrong_noise(published: dict[tuple[int, int], list[torch.Tensor]]) -> None:
    """False: the test above has no power: wrong scales, or noise that steps, shards or restarts share, pass it."""
    a, b = published[0, 0][:2]
    half = len(a) // 2
    for factor in (2 / 3, 3 / 2, 2**0.5, 0.5**0.5, BATCH / (BATCH + 1)):
        assert "scale" in rejected([a * factor])
    assert rejected([a, b, a]) == {"shared"}, "a restart that repeats a step"
    assert rejected([torch.cat([a[:half], a[:half]])]) == {"not white"}, "shards with one key"
    assert rejected([a, torch.cat([b[:half], a[: len(a) - half]])]) == {"shared"}, "a shard's noise in another step"
    assert "not white" in rejected([(a + a.roll(1)) / 2**0.5]), "neighbours share"
    assert "shared" in rejected([a, (a + 9 * b) / 82**0.5]), "a tenth of the step before"
