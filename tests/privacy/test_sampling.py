"""A cap on a draw keeps a uniformly random part of it, and so does a drawn user's share."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np

from dprlhf_ray.privacy.sampling import choose, poisson_draw


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


def test_a_user_s_records_are_chosen_uniformly_and_afresh() -> None:
    """False: some subsets of a user's records are chosen more often, or the choice follows a seed."""
    slots, draws = (7, 3, 9, 1, 4), 10_000
    subsets = list(itertools.combinations(slots, 2))
    random.seed(0)
    chosen = [tuple(choose(slots, 2)) for _ in range(draws)]
    random.seed(0)
    assert chosen[:50] != [tuple(choose(slots, 2)) for _ in range(50)]
    counts = Counter(chosen)
    assert set(counts) <= set(subsets)  # in their order
    expected = draws / len(subsets)
    chi2 = sum((counts[s] - expected) ** 2 / expected for s in subsets)
    assert chi2 < 43.0  # 9 degrees of freedom: one false alarm in 500,000; always the first two would give 90,000


def test_all_records_are_chosen_where_there_are_few() -> None:
    assert choose((5, 2), 2) == [5, 2] and choose((5,), 4) == [5] and choose((), 1) == []
