"""Our PLD figures against Opacus's PRV accountant (Gopi, Lee and Wutschitz 2021), which shares no code with ours."""

from __future__ import annotations

import numpy as np
import pytest
from opacus.accountants import PRVAccountant

from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.mechanism import DPStep

SEED = 20_230_816  # public: the cases are the same on every machine


def cases(count: int) -> list[tuple[DPStep, float]]:
    """`count` schedules and deltas, log-uniform in q, sigma, T and delta, where epsilon is at most 40."""
    generator = np.random.default_rng(SEED)
    found: list[tuple[DPStep, float]] = []
    while len(found) < count:
        q, sigma = (float(10 ** generator.uniform(*limits)) for limits in ((-3, -0.3), (-0.2, 1)))
        steps, delta = int(10 ** generator.uniform(0, 3.5)), float(10 ** generator.uniform(-8, -4))
        step = DPStep("record", "zero_out", 1000, q, sigma, 1.0, 1, steps, None)
        if accounting.epsilon(step, delta, allow_large_delta=True).pld <= 40:
            found.append((step, delta))
    return found


def check(step: DPStep, delta: float) -> None:
    report = accounting.epsilon(step, delta, allow_large_delta=True)
    other = PRVAccountant()
    other.history = [(step.noise_multiplier, step.sampling_rate, step.steps)]
    distribution = other._get_dprv(eps_error=0.01, delta_error=delta / 1000)
    lower, _, upper = distribution.compute_epsilon(delta, delta / 1000, 0.01)
    assert lower <= report.pld <= 1.05 * upper + 0.05
    assert report.rdp is not None and report.pld <= report.rdp


def test_twenty_schedules_lie_in_the_bounds_of_another_accountant() -> None:
    """False: our epsilon is below what another accountant proves to be too low, far above it, or above RDP."""
    for step, delta in cases(20):
        check(step, delta)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_schedules_lie_in_the_bounds_of_another_accountant() -> None:
    for step, delta in cases(200)[20:]:
        check(step, delta)
