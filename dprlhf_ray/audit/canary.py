"""A white-box audit of the privacy room: can an attacker see one record whose gradient is a single, huge coordinate?

The strongest attacker that the guarantee speaks of (the gradient-space attack of Nasr et al. 2021, "Adversary
instantiation"): he knows every other record, places a canary with a Dirac gradient, and sees every released sum. What
is driven is the room itself: permits, Poisson draws, recorded per-unit gradients, the clip, the noise. Only the model
is a toy, a linear one, because there a unit's gradient is its own input.

The bound that comes out is a lower one: below the claim it proves nothing, above the claim it proves a defect.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dprlhf_ray.audit.bounds import Reading, choose_threshold, lower_bound
from dprlhf_ray.privacy import accounting
from dprlhf_ray.privacy.clipping import ClippedSum
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.noise import noise_gradient
from dprlhf_ray.privacy.per_unit import Recorder
from dprlhf_ray.privacy.permit import PermitOffice
from dprlhf_ray.privacy.sampling import poisson_draw

DIMENSION = 8
SIZE = 1e3  # of the canary's gradient, in units of C: whoever does not clip is seen at once


@dataclass(frozen=True)
class AuditReport:
    """claimed: the PLD epsilon of the schedule; lower_bound: what the attacker proved; both at reading.delta.

    repetitions: of the schedule with the canary, and as many without it, that the bound was read from.
    """

    claimed: float
    lower_bound: float
    threshold: float
    repetitions: int
    reading: Reading

    @property
    def exceeded(self) -> bool:
        """The claim is refuted, at the confidence of the reading."""
        return self.lower_bound > self.claimed


def audit(step: DPStep, repetitions: int, reading: Reading) -> AuditReport:
    """Repeat the whole schedule with and without a canary and bound its epsilon from below.

    Args:
        step: a small schedule: its time is repetitions * steps * updates_per_draw.
        repetitions: judged of each kind; a quarter more of each chooses the threshold.

    Raises:
        ValueError: the Gaussian curve is asked for, but the schedule samples: its curve is another one.
        ConfigError: the schedule has no epsilon at this delta.
    """
    if reading.curve == "gaussian" and step.sampling_rate < 1:
        raise ValueError(f"curve gaussian needs sampling_rate 1, not {step.sampling_rate}; curve any")
    claimed = accounting.epsilon(step, reading.delta).pld
    first = max(1, repetitions // 4)
    present, absent = (scores(step, first + repetitions, canary) for canary in (True, False))
    threshold = choose_threshold(present[:first], absent[:first], reading)
    hits, alarms = int((present[first:] > threshold).sum()), int((absent[first:] > threshold).sum())
    return AuditReport(claimed, lower_bound(hits, alarms, repetitions, reading), threshold, repetitions, reading)


def scores(step: DPStep, repetitions: int, canary: bool) -> np.ndarray:
    """What the attacker reads off each repetition: the canary's coordinate, summed over all released sums, over C.

    Unit 0 is the canary. Without it, that unit is null; under replace_one it is the opposite gradient instead.

    Returns:
        (repetitions,) float64
    """
    model = nn.Linear(DIMENSION, 1, bias=False)
    recorder = Recorder(model)
    units = torch.zeros(step.population, DIMENSION)
    units[1:, 1] = step.clip_norm  # the others, as near to the bound as they can be
    replaced = step.adjacency == "replace_one"
    units[0, 0] = SIZE * step.clip_norm * (1 if canary else -1)
    valid = torch.ones(step.population, dtype=torch.bool)
    valid[0] = canary or replaced
    return np.array([_repetition(step, recorder, model, units, valid) for _ in range(repetitions)]) / step.clip_norm


def _repetition(step: DPStep, recorder: Recorder, model: nn.Module, units: torch.Tensor, valid: torch.Tensor) -> float:
    office, seen = PermitOffice(), 0.0
    for attempt in range(1, step.steps + 1):
        permit = office.redeem(office.issue("audit", attempt, step, "audit"), "audit", "once")
        slots = torch.from_numpy(poisson_draw(step.population, step.sampling_rate))
        for _ in range(step.updates_per_draw):
            total = ClippedSum(recorder.sizes, step.clip_norm)
            if len(slots):
                with recorder.record(len(slots)):
                    model(units[slots]).sum().backward()
                    total.add(recorder.take(), valid[slots])
            seen += float(noise_gradient(total.total, permit).value[0])
    return seen
