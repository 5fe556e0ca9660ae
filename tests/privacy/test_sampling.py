"""A cap on a draw keeps a uniformly random part of it."""

from __future__ import annotations

import math

import numpy as np

from dprlhf_ray.privacy.sampling import poisson_draw


def test_a_cap_never_lets_more_through_and_leaves_smaller_draws_alone() -> None:
    """False: a capped draw is too large, or the cap changes how often a draw is small."""
    sizes = np.array([len(poisson_draw(200, 0.1, 20)) for _ in range(4000)])
    free = np.array([len(poisson_draw(200, 0.1)) for _ in range(4000)])
    assert sizes.max() == 20 < free.max()
    chance = (free < 20).mean()
    assert abs((sizes < 20).mean() - chance) < 5 * math.sqrt(2 * chance * (1 - chance) / 4000)
    assert len(poisson_draw(50, 1.0, 7)) == 7


def test_who_is_cut_is_uniformly_random() -> None:
    """False: some slots are kept more often than others (as the first or the last of a draw would be), or in pairs."""
    n, draws, cap = 40, 6000, 10
    hits = np.zeros((draws, n))
    for d in range(draws):
        slots = poisson_draw(n, 0.5, cap)
        assert (np.diff(slots) > 0).all()
        hits[d, slots] = 1
    rate = hits.sum() / (draws * n)
    assert np.abs(hits.mean(0) - rate).max() < 5 * math.sqrt(rate * (1 - rate) / draws)
    pairs = np.corrcoef(hits.T)[np.triu_indices(n, 1)]  # a sample of nearly fixed size: about -1/(n-1) each
    assert np.abs(pairs + 1 / (n - 1)).max() < 6 / math.sqrt(draws)
