"""Secret Poisson sampling: every unit is drawn independently with probability q, by the operating system's
randomness. A cap keeps a uniformly random part of a larger draw, or of a drawn user's records."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np


def poisson_draw(population: int, sampling_rate: float, max_batch: int | None = None) -> np.ndarray:
    """Slots of one draw, ascending, int64. PRIVATE: never logged, stored or derived from the config.

    Each of `population` slots is included independently with probability `sampling_rate`. The generator gets a fresh
    128-bit key from the operating system and is thrown away, so no two draws share state and nothing can be replayed
    after a restart. The draw may be empty; it has no upper limit, unless `max_batch` is set: then of a larger draw a
    uniformly random subset of that size is kept (truncated Poisson sampling, which must be what is charged).
    """
    if not 0.0 < sampling_rate <= 1.0:
        raise ValueError(f"sampling_rate must be in (0, 1], not {sampling_rate}")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(secrets.randbits(256))))
    drawn = np.flatnonzero(generator.random(population) < sampling_rate)
    if max_batch is None or len(drawn) <= max_batch:
        return drawn
    return np.sort(generator.choice(drawn, max_batch, replace=False, shuffle=False))


def choose(slots: Sequence[int], at_most: int) -> list[int]:
    """A uniformly random subset of `at_most` slots, in their order; all of them where there are no more.

    Fresh randomness of the operating system, as in a draw. PRIVATE. Which of a user's records are chosen changes the
    user's own gradient only, which is clipped afterwards: it needs no charge.
    """
    if len(slots) <= at_most:
        return list(slots)
    kept = secrets.SystemRandom().sample(range(len(slots)), at_most)
    return [slots[i] for i in sorted(kept)]
