"""The sentences of a certificate that depend on how a run was configured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dprlhf_ray.config import RunConfig
from dprlhf_ray.privacy.mechanism import DPStep

VOID = "Nothing is guaranteed."
PROMISE = (
    "Everything this run released (weights, checkpoints, models, metrics, report) is differentially private with "
    "respect to each data set below, as stated, under the assumptions listed."
)
NOISE = {
    "gaussian": "Gaussian, once per coordinate on the sum over all ranks, float64 draws by Philox with a fresh 128-bit "
    "key from the operating system per release",
    "secure": "Gaussian (secure), once per coordinate on the sum over all ranks, from a cryptographic stream; sum and "
    "noise are rounded to a public grid, so that the low bits of what is released tell nothing",
}
_FINITE_PRECISION = "the finite precision of floating-point Gaussian noise"
_EXCLUDED = (
    "timing and other side channels",
    "an adversary inside the cluster",
    "hyper-parameter search (not charged)",
    "that aborts may depend on the data (assumed independent)",
    "that rounding in a completion or a gradient may depend on what else is in the batch (engine and learner)",
)


def joined(parts: Iterable[str]) -> str:
    """The different ones of several stages, in order."""
    return "; ".join(dict.fromkeys(parts))


def sampler(step: DPStep) -> str:
    """How units get into a draw."""
    cap = "" if step.max_batch is None else f", truncated to {step.max_batch} units by a uniformly random choice"
    return f"Poisson{cap}, by Philox with a fresh 128-bit key from the operating system per draw"


def metrics(steps: Sequence[DPStep]) -> dict[str, str]:
    """Released metrics by name pattern, and how they come to be releasable."""
    found = {"public/*": "computed on public prompts with released weights; costs nothing"}
    if any(step.metric_noise_multiplier is not None for step in steps):
        found["private/*"] = (
            "per-unit values clipped to one joint bound, summed, noised (metric_noise_multiplier), divided by the "
            "public expected batch; one release per draw, part of the mechanism that is accounted for"
        )
    return found


def assumed(config: RunConfig) -> list[str]:
    """What the statement takes from whoever declared it."""
    found = ["what is declared public (below) does not depend on the private data"]
    if any(d.unit_column or d.source.startswith("embedded:") for d in config.data.values()):
        found.append("unit ids are real: one id is one unit in all sources of a data set, and the other way round")
        found.append("the ids in a source did not change while the run was interrupted")
    if any(d.unit_column is None and not d.source.startswith("embedded:") for d in config.data.values()):
        found.append("where rows have no ids, each row is a unit of its own")
    if any(s.scorer.kind == "python" for s in config.stages):
        found.append("Python scorers keep no state between records and send none away")
    found.append("a Ray cluster that was there before the run spills no objects to disk")
    if config.ledger is None:
        found.append("no other run reads these data sets, or its cost is added elsewhere")
    return found


def excluded(steps: Sequence[DPStep]) -> list[str]:
    """What the statement does not cover."""
    plain = any(step.noise != "secure" for step in steps)
    return [*_EXCLUDED, *([_FINITE_PRECISION] if plain else [])]
