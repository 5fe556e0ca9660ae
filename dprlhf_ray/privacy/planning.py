"""From a config to the one description of a DP step that sampler, clipper, noise, ledger and certificate share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dprlhf_ray.config import AdapterConfig, AnyStage, RunConfig
from dprlhf_ray.errors import ConfigError
from dprlhf_ray.privacy import accounting, filter
from dprlhf_ray.privacy.accounting import EpsilonReport
from dprlhf_ray.privacy.chain import Guarantee
from dprlhf_ray.privacy.composition import Composition, Part, compose
from dprlhf_ray.privacy.filter import Filter
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.partitions import WHOLE, Units, spans

METRIC_NOISE_WITHOUT_EPSILON = 5.0  # sigma_m of modes clip_only and public: about what a private run's metrics have


@dataclass(frozen=True)
class StagePlan:
    """What a stage will spend. epsilon and target are None in modes clip_only (nothing is guaranteed) and public.

    ledger_stage: the stage's name in the ledger; in a ledger shared by runs it starts with the run's id.
    epsilon: of the planned attempts. filter: the gate under adaptive accounting, else None. public: the data are
    declared public, so that the stage costs nothing.
    """

    stage: str
    ledger_stage: str
    dataset: str
    step: DPStep
    epsilon: EpsilonReport | None
    target: float | None
    delta: float
    filter: Filter | None = None
    public: bool = False

    @property
    def guarantee(self) -> Guarantee:
        return "public" if self.public else "none" if self.target is None else "dp"

    @property
    def certified(self) -> float | None:
        """The epsilon that is certified: the filter's under adaptive accounting, else the schedule's PLD figure."""
        if self.filter is not None:
            return self.filter.epsilon
        return None if self.epsilon is None else self.epsilon.pld


def plan_stage(stage: AnyStage, size: int, run_id: str | None = None, dataset: str | None = None) -> StagePlan:
    """Calibrate the noise of a stage to its target, on the safe side. Without a target there is none, but on metrics:
    these are released in one way, whatever the mode.

    Args:
        size: what is sampled: records, or users (unit user without `records_per_user`); replaced by `declared_size`
            under add_remove, where the size is private.
        dataset: declared name of the data set that pays (default: the stage's source).

    Raises:
        ConfigError: the target cannot be met, or a setting is refused.
    """
    p = stage.privacy
    ledger_stage = f"{run_id}/{stage.name}" if run_id else stage.name
    population = p.declared_size if p.adjacency == "add_remove" and p.declared_size else size
    step = DPStep(
        unit=p.unit,
        adjacency=p.adjacency,
        population=population,
        sampling_rate=min(1.0, p.expected_batch / population),
        noise_multiplier=0.0,
        clip_norm=p.clip_norm,
        updates_per_draw=p.updates_per_draw,
        steps=p.steps,
        metric_noise_multiplier=METRIC_NOISE_WITHOUT_EPSILON if p.metrics_share and p.epsilon is None else None,
        noise=p.noise,
        max_batch=p.max_batch,
        records_per_user=p.records_per_user,
    )
    if p.expected_batch > population:
        raise ConfigError(
            f"stage {stage.name!r}: privacy.expected_batch {p.expected_batch} exceeds {population} {step.sampled}s"
        )
    name = dataset or stage.data
    if p.epsilon is None:
        return StagePlan(stage.name, ledger_stage, name, step, None, None, p.delta, public=p.mode == "public")
    accounting.check_delta(p.delta, population, p.allow_large_delta)
    one, adaptive = replace(step, updates_per_draw=1), p.accounting == "adaptive"
    if adaptive:
        sigma = filter.calibrate(one, p.epsilon, p.delta)
    else:
        sigma = accounting.calibrate(one, p.epsilon, p.delta, allow_large_delta=True)
    step = share(step, sigma, p.metrics_share)
    report = accounting.epsilon(step, p.delta, allow_large_delta=True)
    gate = filter.choose_order(step, p.epsilon, p.delta) if adaptive else None
    return StagePlan(stage.name, ledger_stage, name, step, report, p.epsilon, p.delta, gate)


def composed(config: RunConfig, plans: Sequence[StagePlan]) -> dict[str, Composition]:
    """What the stages will cost together, by private data set, at the smallest of their deltas.

    About: sizes of partitions follow from the ledger's key, and a smaller one has a larger q. Units of different
    partitions of one map are different; what else the ids would tell is not known yet.
    """
    found: dict[str, Composition] = {}
    stages = [(s, p) for s, p in zip(config.stages, plans, strict=True) if not p.public]
    for name in dict.fromkeys(p.dataset for _, p in stages):
        mine = [(s, p, spans(config.data[s.data].partitions).get(s.partition or "", WHOLE))
                for s, p in stages if p.dataset == name]  # fmt: skip
        starts = sorted({low for *_, (low, _) in mine})
        parts = []
        for s, p, (low, high) in mine:
            data = config.data[s.data]
            ids = data.unit_column is not None or data.source.startswith("embedded:")
            inside = frozenset(i.to_bytes(2, "big") for i, x in enumerate(starts) if low <= x < high)
            part = Part(s.name, p.step, Units(inside, (low, high)) if ids else None)
            gate = p.filter
            parts.append(part if gate is None else replace(part, alpha=gate.alpha, rho_budget=gate.rho_budget))
        found[name] = compose(parts, min(p.delta for _, p, _ in mine))
    return found


def share(step: DPStep, sigma: float, metrics_share: float) -> DPStep:
    """Split a draw's precision sigma^-2 between its metrics (their share) and its K updates (the rest, evenly).

    sigma_m^-2 = share sigma^-2 and K sigma_g^-2 = (1 - share) sigma^-2; share 0: no metric is released. The step's
    effective noise is sigma, never less (the last digits are rounded up).
    """
    sigma *= 1 + 1e-12
    return replace(
        step,
        noise_multiplier=sigma * (step.updates_per_draw / (1 - metrics_share)) ** 0.5,
        metric_noise_multiplier=sigma / metrics_share**0.5 if metrics_share else None,
    )


def trainable_numbers(adapter: AdapterConfig, parameters: int, linears: Mapping[str, tuple[int, int]]) -> int:
    """d: how many numbers of a model train (without a value head).

    Args:
        linears: name -> (out, in) of the model's matrices.
    """
    if adapter.kind == "full":
        return parameters
    targets = {n: s for n, s in linears.items() if n.endswith(tuple(f".{t}" for t in adapter.target_modules))}
    if adapter.layers is not None:
        chosen = {str(n) for n in adapter.layers}
        targets = {n: s for n, s in targets.items() if chosen & set(n.split("."))}
    r = adapter.rank
    each = {
        "lora": lambda o, i: r * (o + i),
        "ffa_lora": lambda o, i: r * o,
        "lora_xs": lambda o, i: r * r,
        "steering": lambda o, i: o,
    }
    return sum(each[adapter.kind](*shape) for shape in targets.values())


def expectations(stage: AnyStage, plan: StagePlan, dimension: int | None) -> dict[str, float | int | None]:
    """What a step will cost and how much signal can survive, all per step and from public numbers.

    completions, tokens (rl): expected, at most. noise_norm: E |noise| on the mean gradient, about sigma C sqrt(d) / L,
    against signal_at_most = C (all clipped gradients aligned) and sampling_noise = C / sqrt(L) (none aligned).
    """
    s, p = plan.step, stage.privacy
    records = s.expected_batch * (p.records_per_draw if s.sampled == "user" else 1)
    each = {"rl": stage.algorithm.completions_per_prompt if stage.kind == "rl" else 1, "sft": 1, "reward_model": 2}
    completions = records * each[stage.kind]
    noise = None if dimension is None else s.noise_multiplier * s.clip_norm * dimension**0.5 / s.expected_batch
    return {
        "trainable": dimension,
        "completions_per_step": completions,
        "tokens_per_step": completions * stage.generation.max_new_tokens if stage.kind == "rl" else None,
        "signal_at_most": s.clip_norm,
        "sampling_noise": s.clip_norm / s.expected_batch**0.5,
        "noise_norm": noise,
    }
