"""The sentences of a certificate that depend on how a run was configured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from dprlhf_ray.config import RLStage, RunConfig, ScorerConfig
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.planning import StagePlan

VOID = "Nothing is guaranteed."
PROMISE = (
    "Everything this run released (weights, checkpoints, models, metrics, report) is differentially private with "
    "respect to each data set below, as stated, under the assumptions listed."
)
NOTHING_PRIVATE = (
    "Nothing private was read: everything this run released comes from what was declared public, so that there "
    "is nothing to guarantee, and nothing was paid."
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
    "that rounding in a completion, a reward or a gradient may depend on what else is in the batch (engine, scorer, "
    "learner)",
)


def joined(parts: Iterable[str]) -> str:
    """The different ones of several stages, in order; "none" where no stage has one."""
    return "; ".join(dict.fromkeys(parts)) or "none"


def promise(plans: Sequence[StagePlan]) -> str:
    """What a run that nothing voids is certified for."""
    return NOTHING_PRIVATE if all(p.public for p in plans) else PROMISE


def unit(config: RunConfig, step: DPStep, sources: Iterable[str]) -> str:
    """Who is protected, in words."""
    if step.unit == "record":
        return "one record"
    columns = ", ".join(f"{config.data[s].unit_column} ({s})" for s in sources)
    return f"one user: all records of one id together; the ids are in column {columns}"


def draw(step: DPStep, records_per_draw: int) -> str | None:
    """What a user brings to a draw; None for unit record."""
    if step.unit == "record":
        return None
    if step.records_per_user is not None:
        return (
            f"records are sampled and clipped one by one; a user has at most {step.records_per_user} records, and "
            "those beyond are left out"
        )
    return (
        f"users are sampled; one who is drawn brings at most {records_per_draw} of their own records, chosen uniformly "
        "at random, whose losses are averaged; one clip bounds them together"
    )


def sampler(step: DPStep) -> str:
    """How units get into a draw."""
    cap = (
        ""
        if step.max_batch is None
        else f", truncated to {step.max_batch} {step.sampled}s by a uniformly random choice"
    )
    return f"Poisson{cap}, by Philox with a fresh 128-bit key from the operating system per draw"


def metrics(plans: Sequence[StagePlan]) -> dict[str, str]:
    """Released metrics by name pattern, and how they come to be releasable."""
    found = {"public/*": "computed on data declared public with released weights; costs nothing"}
    noised = [p for p in plans if p.step.metric_noise_multiplier is not None]
    if any(not p.public for p in noised):
        found["private/*"] = (
            "per-unit values clipped to one joint bound, summed, noised (metric_noise_multiplier), divided by the "
            "public expected batch; one release per draw, part of the mechanism that is accounted for"
        )
    if names := ", ".join(p.stage for p in noised if p.public):
        found[f"private/* of stage {names}"] = "made alike, of data declared public; costs nothing"
    return found


def public(config: RunConfig) -> dict[str, str | list[str]]:
    """What was declared public, by role."""
    shown = {name: data.source for name, data in config.data.items() if data.public}
    shown |= {f"{name}.rejected_source": d.rejected_source for name, d in config.data.items() if d.rejected_source}
    found: dict[str, str | list[str]] = {
        "model": config.model.name,
        "evaluation prompts": config.evaluation.source,
        "scorers": sorted({_scorer(s) for s in _scorers(config) if s.kind != "ensemble" and not s.stage}),
        "data sets": [f"{name} = {source}" for name, source in shown.items()],
        "held-out data sets": sorted({s.heldout for s in config.stages if s.heldout}),
    }
    return {role: value for role, value in found.items() if value}


def post_processing(config: RunConfig) -> list[str]:
    """What costs nothing because it is computed from what earlier stages released."""
    found = [
        f"stage {s.name} starts from what stage {start} released"
        for s in config.stages
        if (start := config.start_of(s)) is not None
    ]
    for s in config.stages:
        if isinstance(s, RLStage):
            models = dict.fromkeys(scorer.stage for scorer in s.scorer.flat() if scorer.stage)
            found += [f"stage {s.name} is scored by the reward model that stage {m} released" for m in models]
            if s.scorer.standardise:
                found.append(f"rewards of stage {s.name} are standardised by those of public prompts at its start")
    return found


def assumed(config: RunConfig) -> list[str]:
    """What the statement takes from whoever declared it."""
    found = ["what is listed as declared public does not depend on the private data"]
    private = [config.data[s.data] for s in config.stages if s.privacy.mode != "public"]
    if any(d.unit_column or d.source.startswith("embedded:") for d in private):
        found.append("unit ids are real: one id is one unit in all sources of a data set, and the other way round")
        found.append("the ids in a source did not change while the run was interrupted")
    if any(s.privacy.unit == "user" for s in config.stages if s.privacy.mode != "public"):
        found.append(
            "a user is one person, all of whose records in the sources of a data set have that one id (records without "
            "an id are not read)"
        )
    if any(d.unit_column is None and not d.source.startswith("embedded:") for d in private):
        found.append("where rows have no ids, each row is a unit of its own")
    if any(s.kind in ("python", "http") for s in _scorers(config)):
        found.append("Python and http scorers keep no state between records; Python scorers send none away")
    found.append("a Ray cluster that was there before the run spills no objects to disk")
    if config.ledger is None and private:
        found.append("no other run reads these data sets, or its cost is added elsewhere")
    return found


def excluded(config: RunConfig, steps: Sequence[DPStep]) -> list[str]:
    """What the statement does not cover."""
    hosts = sorted({_host(s.url) for s in _scorers(config) if s.url})
    away = [f"prompts and completions that are sent to {host} to be scored: they leave the cluster" for host in hosts]
    plain = any(step.noise != "secure" for step in steps)
    return [*_EXCLUDED, *away, *([_FINITE_PRECISION] if plain else [])]


def _scorers(config: RunConfig) -> list[ScorerConfig]:
    """Of all stages, members of ensembles too."""
    return [scorer for s in config.stages if isinstance(s, RLStage) for scorer in s.scorer.flat()]


def _scorer(scorer: ScorerConfig) -> str:
    if scorer.model is not None:
        return f"{scorer.kind} {scorer.model}"
    if scorer.url is not None:
        return f"{scorer.kind} {_host(scorer.url)}"
    return scorer.function or scorer.kind


def _host(url: str) -> str:
    """What may be shown of a URL: never a password or a token in it."""
    return str(urlsplit(url).hostname)
