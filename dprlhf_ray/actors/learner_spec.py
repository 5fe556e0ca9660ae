"""What learners are told to build."""

from __future__ import annotations

from dataclasses import dataclass

from dprlhf_ray.config import RunConfig
from dprlhf_ray.privacy.mechanism import DPStep

CHECK_SEQUENCES = 6  # public sequences on which engines and learner are compared after each sync


@dataclass(frozen=True)
class LearnerSpec:
    """What a rank needs to build itself: public settings only.

    start: folder of the weights that the stage starts from.
    """

    config: RunConfig
    stage_index: int
    step: DPStep
    run_dir: str
    public_sequences: tuple[tuple[int, ...], ...]
    start: str
