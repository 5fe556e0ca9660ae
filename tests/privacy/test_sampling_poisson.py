"""Poisson sampling, told apart from everything that looks like it: rate, size, independence of units, steps, restarts.

Every statistic is a z-value, standard normal under Poisson sampling. The same statistics have to reject the samplers
that are used by mistake: shuffling passes almost every other test.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from dprlhf_ray.privacy.sampling import poisson_draw

N, Q, STEPS = 100, 0.1, 20_000
LIMIT = 6.0  # z-values; about 15,000 of them are looked at in a run: a false alarm in 30,000 runs
LAGS = range(1, 11)
RESTART = """
from dprlhf_ray.privacy.sampling import poisson_draw
for _ in range(20):
    print(*poisson_draw(500, 0.5))
"""


def z_values(drawn: np.ndarray, q: float) -> dict[str, float]:
    """Largest |z| by what it tests. drawn: (steps, units) bool."""
    steps, units = drawn.shape
    centred = (drawn - q) / (q * (1 - q)) ** 0.5  # mean 0, variance 1, independent
    rate = centred.sum(0) / steps**0.5
    size = centred.sum(1) / units**0.5
    fourth = 3 + (1 - 6 * q * (1 - q)) / (units * q * (1 - q))  # kurtosis of a binomial size
    variance = (size.var() - 1) / ((fourth - 1) / steps) ** 0.5
    pairs = centred.T @ centred / steps**0.5
    lagged = [(centred[lag:] * centred[:-lag]).sum(0) / (steps - lag) ** 0.5 for lag in LAGS]
    every_unit = [x.sum() / units**0.5 for x in lagged]
    return {
        "inclusion rate of a unit": float(np.abs(rate).max()),
        "mean size": float(abs(size.sum()) / steps**0.5),
        "variance of the size": float(abs(variance)),
        "covariance between units": float(np.abs(pairs[~np.eye(units, dtype=bool)]).max()),
        "covariance between steps": float(np.abs(np.concatenate([*lagged, every_unit])).max()),
    }


def rejected(drawn: np.ndarray, q: float) -> set[str]:
    return {name for name, z in z_values(drawn, q).items() if z > LIMIT}


def _mask(draws: Iterator[np.ndarray]) -> np.ndarray:
    drawn = np.zeros((STEPS, N), dtype=bool)
    for row, units in zip(drawn, draws, strict=False):
        row[units] = True
    return drawn


def test_every_unit_is_drawn_independently_with_probability_q() -> None:
    """False: the sampler is not Poisson, and the amplification that the accountant counts on is not there."""
    found = z_values(_mask(poisson_draw(N, Q) for _ in range(STEPS)), Q)
    print(found)
    assert max(found.values()) < LIMIT, found


def _fixed_size() -> Iterator[np.ndarray]:
    g = np.random.default_rng()
    while True:
        yield g.choice(N, int(N * Q), replace=False)


def _shuffled() -> Iterator[np.ndarray]:
    g = np.random.default_rng()
    while True:
        yield from np.split(g.permutation(N), int(1 / Q))


def _with_replacement() -> Iterator[np.ndarray]:
    g = np.random.default_rng()
    while True:
        yield g.integers(0, N, int(N * Q))


def _capped() -> Iterator[np.ndarray]:
    while True:
        yield poisson_draw(N, Q)[: int(N * Q * 1.2)]


def _never_small() -> Iterator[np.ndarray]:
    while True:
        found = poisson_draw(N, Q)
        yield found if len(found) > 5 else poisson_draw(N, Q)


def _in_pairs() -> Iterator[np.ndarray]:
    while True:
        halves = poisson_draw(N // 2, Q)
        yield np.concatenate([2 * halves, 2 * halves + 1])


def _two_alike() -> Iterator[np.ndarray]:
    while True:
        drawn = poisson_draw(N, Q)
        yield np.union1d(drawn, [7]) if 6 in drawn else drawn[drawn != 7]


def _retried_with_the_same_draw() -> Iterator[np.ndarray]:
    while True:
        drawn = poisson_draw(N, Q)
        yield drawn
        if random.random() < 0.02:
            yield drawn


def _one_is_drawn_more_often() -> Iterator[np.ndarray]:
    while True:
        drawn = poisson_draw(N, Q)
        yield np.union1d(drawn, [13]) if random.random() < 0.04 else drawn


def _rate_too_high() -> Iterator[np.ndarray]:
    while True:
        yield poisson_draw(N, Q * 1.03)


@pytest.mark.parametrize(
    ("sampler", "what"),
    [
        (_fixed_size, "variance of the size"),
        (_shuffled, "covariance between steps"),
        (_with_replacement, "variance of the size"),
        (_capped, "variance of the size"),
        (_never_small, "mean size"),
        (_in_pairs, "covariance between units"),
        (_two_alike, "covariance between units"),
        (_retried_with_the_same_draw, "covariance between steps"),
        (_one_is_drawn_more_often, "inclusion rate of a unit"),
        (_rate_too_high, "mean size"),
    ],
)
def test_the_statistics_reject_what_only_looks_like_it(sampler: Callable[[], Iterator[np.ndarray]], what: str) -> None:
    """False: the test above has no power against this fault."""
    drawn = _mask(sampler())
    assert what in rejected(drawn, Q), z_values(drawn, Q)


def _alike(a: list[np.ndarray], b: list[np.ndarray], units: int, q: float) -> bool:
    """Whether any draw of `a` shares more, or fewer, units with one of `b` than independent draws would."""
    left, right = (np.array([np.isin(np.arange(units), d) for d in draws], dtype=float) for draws in (a, b))
    z = (left - q) @ (right - q).T / (units**0.5 * q * (1 - q))
    if a is b:
        np.fill_diagonal(z, 0)
    return bool(np.abs(z).max() > LIMIT)


def test_nothing_is_repeated_after_a_restart_and_no_seed_reaches_the_sampler() -> None:
    """False: draws come from a seed, a saved state or the process's start: a restarted run repeats what was drawn."""
    runs = []
    for _ in range(2):
        out = subprocess.run([sys.executable, "-c", RESTART], capture_output=True, text=True, check=True).stdout
        runs.append([np.array(line.split(), dtype=int) for line in out.splitlines()])
    for _ in range(2):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        runs.append([poisson_draw(500, 0.5) for _ in range(20)])
    assert not any(_alike(a, b, 500, 0.5) for i, a in enumerate(runs) for b in runs[i:])
    generators = np.random.default_rng(5), np.random.default_rng(5)  # a seeded sampler, restarted
    wrong = [[np.flatnonzero(g.random(500) < 0.5) for _ in range(20)] for g in generators]
    assert _alike(*wrong, 500, 0.5)


def test_the_edges() -> None:
    """False: q = 1 leaves somebody out, a tiny q never draws or draws too often, or one unit is not a population."""
    assert poisson_draw(50, 1.0).tolist() == list(range(50))
    tiny = sum(len(poisson_draw(1_000_000, 1e-5)) for _ in range(100))
    assert abs(tiny - 1000) < LIMIT * 1000**0.5
    alone = sum(len(poisson_draw(1, 0.5)) for _ in range(2000))
    assert abs(alone - 1000) < LIMIT * 500**0.5
    assert all(len(poisson_draw(3, 1e-12)) == 0 for _ in range(100)), "an empty draw is a draw"
    for q in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError):
            poisson_draw(10, q)
