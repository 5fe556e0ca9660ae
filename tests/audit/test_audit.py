"""The audit exceeds the claim where a protection is broken on purpose, and does not where everything is in place.

Its power is worked out before it is run. Confidence 0.9999: one false alarm in ten thousand runs of these tests.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dprlhf_ray.audit import Reading, audit, power
from dprlhf_ray.audit.bounds import choose_threshold, epsilon_at, lower_bound, rates
from dprlhf_ray.audit.canary import SIZE, scores
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.permit import Permit

DELTA = 1e-5
STEP = DPStep("record", "zero_out", 4, 1.0, 3.7306326, 0.3, 1, 1, None)  # claims epsilon 1
ANY, GAUSSIAN = Reading(DELTA, 0.9999), Reading(DELTA, 0.9999, "gaussian")
FEW, MANY = 400, 4000


def _spoil_noise(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The test-only fault: noise of `factor` times the deviation that was charged."""
    charged = Permit.spend_update
    monkeypatch.setattr(Permit, "spend_update", lambda self: factor * charged(self))


def test_the_power_of_what_follows_is_known_beforehand() -> None:
    """False: the audit is too weak to see a fault, or so strong that it sees one where there is none."""
    sigma = STEP.noise_multiplier
    assert power(SIZE / sigma, 1.0, FEW, ANY) > 0.9999  # no clip: the canary moves the sum by its whole size
    assert power(2 / sigma, 1.0, MANY, GAUSSIAN) > 0.999  # half the noise
    assert power(1 / sigma, 1.0, MANY, GAUSSIAN) < 1e-3
    assert power(1 / sigma, 1.0, MANY, ANY) < 1e-3


def test_with_everything_in_place_the_audit_does_not_exceed_the_claim() -> None:
    """False: the room gives away more than it charges for."""
    report = audit(STEP, 1000, GAUSSIAN)
    assert report.claimed == pytest.approx(1.0, rel=1e-3)
    assert not report.exceeded, report


@pytest.mark.parametrize("changes", [{"steps": 4}, {"updates_per_draw": 3}, {"adjacency": "replace_one"}])
def test_more_releases_and_the_other_adjacency_stay_below_their_claims(changes: dict[str, Any]) -> None:
    """False: releases that compose, or the distance of 2 C under replace_one, are charged too little."""
    report = audit(replace(STEP, **changes), 250, GAUSSIAN)
    assert report.claimed > 1.5 and not report.exceeded, report


def test_without_the_clip_the_audit_exceeds_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: a canary of a thousand times C is clipped even with the clip off: the audit looks at something else."""
    monkeypatch.setattr("dprlhf_ray.audit.canary.ClippedSum", lambda sizes, clip_norm: ClippedSum(sizes, 1e9))
    report = audit(STEP, FEW, ANY)
    assert report.exceeded and report.lower_bound > 3, report


def test_without_noise_the_audit_exceeds_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: the attacker does not see the released sum."""
    _spoil_noise(monkeypatch, 0.0)
    report = audit(STEP, FEW, ANY)
    assert report.exceeded and report.lower_bound > 3, report


def test_with_half_the_noise_the_audit_exceeds_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: the audit finds only what is broken completely."""
    _spoil_noise(monkeypatch, 0.5)
    report = audit(STEP, MANY, GAUSSIAN)
    assert report.exceeded, report
    assert report.lower_bound < epsilon_at(2 / STEP.noise_multiplier, DELTA), "above the true epsilon: no lower bound"


def test_the_attacker_sees_the_canary_at_its_clipped_size_only_when_it_is_drawn() -> None:
    """False: the scores are not the released sums of the room, or the canary is in every draw."""
    loud = replace(STEP, noise_multiplier=0.01)
    assert np.allclose(scores(loud, 20, canary=True), 1.0, atol=0.1)
    assert np.allclose(scores(loud, 20, canary=False), 0.0, atol=0.1)
    sampled = scores(replace(loud, sampling_rate=0.5, steps=1), 200, canary=True)
    assert 0.25 < np.mean(sampled > 0.5) < 0.75 and np.all((np.abs(sampled) < 0.1) | (np.abs(sampled - 1) < 0.1))


# ---------------------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
def test_epsilon_of_a_gaussian_is_that_of_the_accountant(mu: float) -> None:
    """False: theorem 8 of Balle and Wang is not what is computed."""
    claimed = accounting.epsilon(replace(STEP, noise_multiplier=1 / mu), DELTA).pld
    assert epsilon_at(mu, DELTA) == pytest.approx(claimed, rel=2e-3)
    assert epsilon_at(0.0, DELTA) == 0.0


def test_the_limits_of_clopper_and_pearson() -> None:
    """False: a rate is believed more than its repetitions allow."""
    low, high = rates(50, 0, 100, 0.95)
    assert (float(low), float(high)) == (pytest.approx(0.39832, abs=1e-5), pytest.approx(1 - 0.025 ** (1 / 100)))
    low, high = rates(0, 100, 100, 0.95)
    assert (float(low), float(high)) == (0.0, 1.0)


def test_the_bound_by_hand_and_nothing_from_chance() -> None:
    """False: the bound is not log((TPR - delta) / FPR) of the limits, or a coin proves something."""
    tpr, fpr = (float(x) for x in rates(900, 10, 1000, 0.9999))
    by_hand = max(math.log((tpr - DELTA) / fpr), math.log((1 - fpr - DELTA) / (1 - tpr)))
    assert lower_bound(900, 10, 1000, ANY) == pytest.approx(by_hand)
    for reading in (ANY, GAUSSIAN):
        assert lower_bound(500, 500, 1000, reading) == 0.0
        assert lower_bound(1000, 1000, 1000, reading) == lower_bound(0, 0, 1000, reading) == 0.0


def test_the_threshold_lies_between_two_separate_groups() -> None:
    """False: the attacker wastes what he sees."""
    t = choose_threshold(np.array([5.0, 6.0, 7.0] * 20), np.array([1.0, 2.0, 3.0] * 20), ANY)
    assert 3 <= t < 5


def test_what_cannot_be_read_is_refused() -> None:
    """False: a probability outside (0, 1), or the wrong curve for a sampled schedule, gives a figure."""
    with pytest.raises(ValueError, match="probabilities"):
        Reading(0.0)
    with pytest.raises(ValueError, match="sampling_rate 1"):
        audit(replace(STEP, sampling_rate=0.5), 10, GAUSSIAN)
