"""A run on one screen: declare all stages, then run them in order, each on what the ones before have released."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dprlhf_ray.actors.cluster import ray, session  # first: sets Ray's environment before ray is imported
from dprlhf_ray.actors.control import Control
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.actors.learner_group import LearnerGroup
from dprlhf_ray.actors.learner_spec import CHECK_SEQUENCES, LearnerSpec
from dprlhf_ray.actors.roles import ask, start_accountant, start_scorer
from dprlhf_ray.collect import Records, Rollouts, Source
from dprlhf_ray.config import AnyStage, RunConfig
from dprlhf_ray.data.preflight import check_population, preflight
from dprlhf_ray.data.sources import load_public_prompts, public_records
from dprlhf_ray.data.units import StageData, load_stage_data
from dprlhf_ray.errors import ConfigError, LedgerDamaged, NoLedger
from dprlhf_ray.evaluation.public import Comparison
from dprlhf_ray.models.card import write_cards
from dprlhf_ray.models.embedded import resolve_model
from dprlhf_ray.observability.metrics import read_metrics
from dprlhf_ray.observability.progress import RunProgress
from dprlhf_ray.observability.report import write_report
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.certificate import DatasetCost, write_certificate
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.planning import StagePlan, plan_stage
from dprlhf_ray.run_dir import RunDir, open_run_dir, read_json
from dprlhf_ray.stage_run import Roles, check_spent, run_stage
from dprlhf_ray.stages.build import start_folder

SEQUENCE_TOKENS = 32
PUBLIC_SEQUENCES = 64  # public texts that learners know: for the check after each sync, and for scales and directions
MEASURES = {"sft": "log_likelihood", "reward_model": "accuracy"}


@dataclass(frozen=True)
class Result:
    """Where the run is and what it gained on public records, by stage that has some."""

    run_dir: Path
    comparisons: dict[str, Comparison]


def run(
    config: RunConfig,
    output: Path,
    resume: bool = False,
    on_step: Callable[[int, Roles], None] | None = None,
    progress: RunProgress | None = None,
) -> Result:
    """Run the configured stages; see `dprlhf run`.

    Args:
        on_step: called after every published step with (attempt, roles), e.g. to resize the fleet.

    Raises:
        DprlhfError: with the exit code that the command returns.
    """
    preflight(config, output)
    here = open_run_dir(output, config, resume)
    with progress or RunProgress() as show, session(config) as namespace:
        tokenizer = _tokenizer(config)
        accountant = _accountant(config, here, namespace)
        data, plans = _declare(config, here, accountant, tokenizer, show)
        for index, stage in enumerate(config.stages):
            if (finished := here.finished(stage.name)) is not None:
                spent = ask(accountant, "spent", plans[index].ledger_stage)
                check_spent(stage.name, spent, read_metrics(here.root), finished)
                show.say(f"stage {stage.name} is done")
                continue
            with _roles(config, index, plans[index], here, namespace, accountant, tokenizer) as roles:
                source = _source(config, stage, roles, tokenizer)
                run_stage(config, index, plans[index], here, roles, data[index], source, show, on_step)
        status = ask(accountant, "status")
        costs = _costs(accountant, plans, data)
        certificate = write_certificate(here.root, config, plans, status, costs)
        ask(accountant, "close")  # the ledger is one whole file again
        for stage in config.stages:
            write_cards(here.model(stage.name), config, stage, certificate)
        write_report(here.root)
        show.say(f"certificate, report and models are in {output}")
    return Result(here.root, _comparisons(config, here))


def _declare(
    config: RunConfig, here: RunDir, accountant: Any, tokenizer: Any, show: RunProgress
) -> tuple[list[StageData], list[StagePlan]]:
    """All schedules are fixed, and fit their budgets, before the first record is used."""
    unit_key = ask(accountant, "unit_key")
    data = [load_stage_data(config, stage, tokenizer, unit_key) for stage in config.stages]
    plans: list[StagePlan] = []
    for stage, found in zip(config.stages, data, strict=True):
        check_population(stage, len(found.units))
        run_id = here.run_id if config.ledger else None
        plans.append(plan_stage(stage, len(found.units), run_id, config.dataset_of(stage.data)))
        show.say(_plan_line(plans[-1], found))
    public = [name for name, source in config.data.items() if source.public]
    ask(accountant, "declare", [Declaration.of(s, p) for s, p in zip(config.stages, plans, strict=True)], public)
    return data, plans


@contextmanager
def _roles(
    config: RunConfig, index: int, plan: StagePlan, here: RunDir, namespace: str, accountant: Any, tokenizer: Any
) -> Iterator[Roles]:
    """Start a stage's roles (they come up side by side) and end them."""
    stage = config.stages[index]
    sequences = public_sequences(config, stage, tokenizer)
    earlier = config.start_of(stage)
    start = here.model(earlier) / start_folder(config.model.dtype) if earlier else resolve_model(config.model.name)
    learners = LearnerGroup(
        LearnerSpec(config, index, plan.step, str(here.root), sequences, str(start)), namespace, "accountant"
    )
    roles, control = Roles(accountant, learners), None
    try:
        if stage.kind == "rl":
            roles.fleet = Fleet(
                str(start), config.rollout, stage.generation, config.model.dtype, sequences[:CHECK_SEQUENCES],
                namespace=namespace, adapter=config.adapter_of(stage),
            )  # fmt: skip
            control = Control(here.root, roles.fleet)
            if config.learner.use_gpu and config.rollout.gpus_per_replica + config.rollout.scorer_gpus:
                learners.wait_ready()  # replicas take what GPUs are left: they may be fewer, other roles may not
            trained = {s.name: here.model(s.name) / "merged" for s in config.stages if s.kind == "reward_model"}
            roles.scorer = start_scorer(stage, trained, namespace, config.rollout.scorer_gpus)
            control.start(config.rollout.replicas)
        yield roles
    finally:
        learners.stop()
        if control is not None:
            control.stop()
        if roles.fleet is not None:
            roles.fleet.stop()
        if roles.scorer is not None:
            ray.kill(roles.scorer)


def public_sequences(config: RunConfig, stage: AnyStage, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Beginnings of public prompts, so that a longer one than the stage takes serves too (a template stays whole)."""
    data = config.data[stage.data]
    longest = None if data.chat_template else min(SEQUENCE_TOKENS, data.max_prompt_tokens)
    public = load_public_prompts(config.evaluation, tokenizer, longest, 0, data)
    return tuple(p.token_ids[:SEQUENCE_TOKENS] for p in public[:PUBLIC_SEQUENCES])


def _source(config: RunConfig, stage: AnyStage, roles: Roles, tokenizer: Any) -> Source:
    """What feeds a stage."""
    count, seed = config.evaluation.prompts, config.seed
    if stage.kind == "rl":
        data = config.data[stage.data]
        public = load_public_prompts(config.evaluation, tokenizer, data.prompt_tokens, seed, data)
        assert roles.fleet is not None
        return Rollouts(stage, roles.fleet, roles.scorer, public)
    heldout = (
        [] if stage.heldout is None else public_records(config.data[stage.heldout], stage.kind, tokenizer, count, seed)
    )
    return Records(MEASURES[stage.kind], roles.learners, heldout)


def _accountant(config: RunConfig, here: RunDir, namespace: str) -> Any:
    """Check the ledger here, where damage is one clear line, then start the role that writes it."""
    where, anchor = config.ledger or str(here.ledger), here.newest_head()
    try:
        Ledger.read(where, config.ledger_key, anchor=anchor, anchor_file=config.ledger_anchor, writing=True)
    except NoLedger as e:
        if anchor is not None or read_metrics(here.root):
            raise LedgerDamaged(f"{e}; what this run has released was paid for in one: restore it") from None
    accountant = start_accountant(where, config.ledger_key, anchor, config.ledger_anchor, namespace)
    for dataset, budget in config.budgets().items():
        ask(accountant, "set_budget", dataset, budget.epsilon, budget.delta)
    return accountant


def _costs(accountant: Any, plans: list[StagePlan], data: list[StageData]) -> dict[str, DatasetCost]:
    """Per private data set, what this run and all that the ledger knows of cost, at the smallest of the run's deltas.

    The units of every stage go to the accountant with each question: one that was started again knows of none.
    """
    units = {p.ledger_stage: found.readers for p, found in zip(plans, data, strict=True)}
    deltas: dict[str, float] = {}
    for p in plans:
        if not p.public:
            deltas[p.dataset] = min(p.delta, deltas.get(p.dataset, 1.0))
    return {
        name: DatasetCost(*(ask(accountant, "composition", name, delta, units, only) for only in (True, False)))
        for name, delta in deltas.items()
    }


def _comparisons(config: RunConfig, here: RunDir) -> dict[str, Comparison]:
    """What the stages gained on public records, by name."""
    kept = {s.name: read_json(here.evaluation(s.name)) for s in config.stages if here.evaluation(s.name).exists()}
    return {name: Comparison(**tree["comparison"]) for name, tree in kept.items()}


def _plan_line(plan: StagePlan, data: StageData) -> str:
    s = plan.step
    if plan.public:
        bound = "free (public data)"
    elif plan.epsilon is None:
        bound = "no guarantee (clip only)"
    else:
        bound = f"eps {plan.certified:.3f} at delta {plan.delta:g}"
    nulls = f", {data.records.null_count} unusable records count as null" if data.records.null_count else ""
    what = "users" if s.unit == "user" and s.records_per_user is None else "records"
    return (
        f"stage {plan.stage}: {s.steps} draws of {s.expected_batch:.0f} of {s.population} {what} "
        f"(q {s.sampling_rate:.4f}), noise multiplier {s.noise_multiplier:.4f}, {bound}{nulls}"
    )


def _tokenizer(config: RunConfig) -> Any:
    """Of the policy.

    Raises:
        ConfigError: it has ids that the model lacks: a text with one of them would end the learners, and that tells.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = resolve_model(config.model.name)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
    most, rows = max(tokenizer.get_vocab().values()), settings.get_text_config().vocab_size
    if most >= rows:
        raise ConfigError(
            f"model.name: the tokenizer of {config.model.name} has ids up to {most}, the model only {rows} embeddings: "
            "resize them (resize_token_embeddings), and save the model again"
        )
    return tokenizer
