"""Whether a rollout engine answers from the weights that the learner published: arithmetic on log-probabilities."""

from __future__ import annotations

import math

LogProbs = list[list[float]]  # nats, one list per fixed public sequence


def disagreement(
    log_probs: LogProbs,
    reference: LogProbs,
    tolerance: float,
    before: tuple[LogProbs, LogProbs] | None = None,
) -> str | None:
    """What is wrong with an engine's log-probabilities after a sync, or None.

    Two things can be: they are far from the learner's; or, as one small update hides well below the tolerance, they
    stood still to the last bit while the learner's moved.

    Args:
        log_probs: the engine's, at the new weights.
        reference: the learner's, at the new weights.
        tolerance: largest root mean square difference, in nats.
        before: the engine's and the learner's at the previous weights.
    """
    difference = root_mean_square(log_probs, reference)
    if not difference <= tolerance:
        return (
            f"log-probabilities differ from the learner's by {difference:.4f} (root mean square), "
            f"rollout.sync_tolerance is {tolerance}: the engine does not run the learner's weights, "
            "or not in the learner's precision"
        )
    if before is not None:
        moved = root_mean_square(reference, before[1])
        if moved > tolerance / 10 and log_probs == before[0]:
            return f"the learner's log-probabilities moved by {moved:.4f} (root mean square), the engine's not at all"
    return None


def root_mean_square(a: LogProbs, b: LogProbs) -> float:
    """Root mean square difference over all positions; infinite for different shapes or a NaN."""
    if [len(row) for row in a] != [len(row) for row in b] or not any(a):
        return math.inf
    squares = [(x - y) ** 2 for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True)]
    mean = math.fsum(squares) / len(squares)
    return math.inf if math.isnan(mean) else math.sqrt(mean)
