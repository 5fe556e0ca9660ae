"""One fault, and the tests that several of them name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """tests: pytest node ids, the fastest that see it."""

    rule: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PER_UNIT = "tests/privacy/test_per_unit.py::"
ACCOUNTING = "tests/privacy/test_accounting.py::"
LEDGER = "tests/privacy/test_ledger.py::"
PERMIT = "tests/privacy/test_permit.py::"
FRESH = "tests/privacy/test_durable_and_fresh.py::"
LOSSES = "tests/algorithms/test_losses.py::"
REPLAY = "tests/stages/test_neighbour_replay.py::"
LOOP = "tests/test_stage_loop.py::"
REFUSALS = "tests/actors/test_learner_refusals.py::"
LEARNER = "tests/actors/test_learner.py::"
CERTIFICATE = "tests/privacy/test_certificate.py::"
PUBLIC = "tests/privacy/test_public_stages.py::"
BUDGET = "tests/privacy/test_ledger_budget.py::"
PLANNING = "tests/privacy/test_planning.py::"

CLIPPED = (PER_UNIT + "test_clipped_sum_is_the_sum_of_clipped_vectors_over_all_parameters",)
POISONED = (PER_UNIT + "test_a_poisoned_unit_moves_the_sum_by_at_most_c",)
SCALE = (PER_UNIT + "test_noise_has_the_scale_that_is_charged_and_no_other",)
POISSON = (PER_UNIT + "test_sampling_is_poisson",)
NOISE_ONCE = (LEARNER + "test_noise_is_added_once_whatever_the_ranks_and_the_stage[0]",)
TWO_RANKS = (LEARNER + "test_two_ranks_make_the_same_update_at_every_zero_stage[0]",)
