"""A run on one screen: start the roles, then per stage one loop of reserve, draw, generate, score, learn, publish.

The driver holds the private records in memory and passes them to the roles; it writes released values only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dprlhf_ray.actors.cluster import ray, session  # first: sets Ray's environment before ray is imported
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.actors.learner import CHECK_SEQUENCES, LearnerSpec
from dprlhf_ray.actors.learner_group import LearnerGroup, LearnersRestarted
from dprlhf_ray.actors.roles import ask, start_accountant, start_scorer
from dprlhf_ray.config import RLStage, RunConfig
from dprlhf_ray.data.preflight import check_population, preflight
from dprlhf_ray.data.sources import Prompts, load_public_prompts
from dprlhf_ray.data.units import load_stage_data
from dprlhf_ray.errors import LedgerDamaged, NoLedger
from dprlhf_ray.evaluation.public import Comparison, Evaluation, compare
from dprlhf_ray.models.card import write_cards
from dprlhf_ray.models.embedded import resolve_model
from dprlhf_ray.observability.gauges import Gauges
from dprlhf_ray.observability.metrics import MetricsLog, last_value, read_metrics
from dprlhf_ray.observability.progress import Laps, RunProgress
from dprlhf_ray.observability.report import write_report
from dprlhf_ray.privacy.certificate import DatasetCost, write_certificate
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.partitions import Units
from dprlhf_ray.privacy.planning import StagePlan, plan_stage
from dprlhf_ray.privacy.release import Operational, Released
from dprlhf_ray.privacy.sampling import poisson_draw
from dprlhf_ray.records import Experience, Prompt
from dprlhf_ray.run_dir import RunDir, open_run_dir, read_json, write_atomically
from dprlhf_ray.stages.batching import deal

PUBLIC_SEQUENCES = 64  # public texts that learners know: for the check after each sync, and for adapter kind steering


@dataclass
class Roles:
    """Handles of one stage's roles."""

    accountant: Any
    scorer: Any
    fleet: Fleet
    learners: LearnerGroup


@dataclass(frozen=True)
class Result:
    """Where the run is and what it gained on public prompts, by stage."""

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
    comparisons = {}
    with progress or RunProgress() as show, session(config) as namespace:
        tokenizer = _tokenizer(config)
        accountant = _accountant(config, here, namespace)
        unit_key = ask(accountant, "unit_key")
        plans: list[StagePlan] = []
        private: list[Prompts] = []
        units: dict[str, Units | None] = {}
        for stage in config.stages:  # all schedules are fixed, and fit their budgets, before the first record is used
            prompts, readers = load_stage_data(config, stage, tokenizer, unit_key)
            check_population(stage, len(prompts))
            plan = plan_stage(
                stage, len(prompts), here.run_id if config.ledger else None, config.dataset_of(stage.data)
            )
            plans.append(plan)
            private.append(prompts)
            units[plan.ledger_stage] = readers
            schedule = (plan.dataset, plan.ledger_stage, plan.step, plan.target, plan.delta)
            ask(accountant, "declare", *schedule, stage.privacy.allow_large_delta, plan.filter is not None)
            show.say(_plan_line(plan, prompts))
        for index, (stage, plan, prompts) in enumerate(zip(config.stages, plans, private, strict=True)):
            with _roles(config, index, plan, here, namespace, accountant, tokenizer) as roles:
                comparisons[stage.name] = _rl(config, index, plan, here, roles, prompts, tokenizer, show, on_step)
        status = ask(accountant, "status")
        certificate = write_certificate(here.root, config, plans, status, _costs(accountant, plans, units))
        ask(accountant, "close")  # the ledger is one whole file again
        for stage in config.stages:
            write_cards(here.model(stage.name), config, stage, certificate)
        write_report(here.root)
        show.say(f"certificate, report and models are in {output}")
    return Result(here.root, comparisons)


def _rl(
    config: RunConfig, index: int, plan: StagePlan, here: RunDir, roles: Roles, prompts: Prompts, tokenizer: Any,
    show: RunProgress, on_step: Callable[[int, Roles], None] | None,
) -> Comparison:  # fmt: skip
    """One RL stage: every attempt is paid for before anything private is touched, and published or lost as a whole."""
    stage, data = config.stages[index], config.data[config.stages[index].data]
    public = load_public_prompts(config.evaluation, tokenizer, data.prompt_tokens, config.seed, data)
    log, gauges = MetricsLog(here.root, config.tracking, config.name), Gauges(config.name)
    _bring_up(roles, show)
    before = _before(here, stage, roles, public, show)
    attempt = ask(roles.accountant, "spent", plan.ledger_stage)
    rows = read_metrics(here.root)
    if attempt < (released_before := max((r["attempt"] for r in rows if r["stage"] == stage.name), default=0)):
        raise LedgerDamaged(f"ledger: {attempt} attempts of stage {stage.name!r}, but {released_before} were released")
    show.begin(stage.name, attempt, stage.privacy.steps)
    baseline = last_value(rows, stage.name, "private/reward")
    while attempt < stage.privacy.steps:
        clock = Laps()
        try:
            reserved = ray.get(roles.accountant.reserve.remote(plan.ledger_stage, roles.learners.incarnation))
            attempt = reserved.attempt
            drawn = [prompts.items[i] for i in poisson_draw(len(prompts), plan.step.sampling_rate, plan.step.max_batch)]
            clock.lap("reserve")
            experiences = rollout(drawn, stage, roles)
            clock.lap("rollout")
            baseline = _baseline(stage, baseline, before)
            shares = [
                ([ray.put(share)], baseline, reserved.token) for share in deal(experiences, config.learner.num_workers)
            ]
            released = _publish(roles, "update", shares, clock)
            if attempt % config.learner.checkpoint_every == 0 or attempt == stage.privacy.steps:
                head = ask(roles.accountant, "head")
                roles.learners.call("save", [(attempt, head)] * config.learner.num_workers)
            clock.lap("checkpoint")
        except LearnersRestarted as e:
            show.say(f"{e}; going on from the newest checkpoint")
            _bring_up(roles, show)
            continue
        except ray.exceptions.ActorUnavailableError:  # the accountant's: other roles' deaths are met where they happen
            attempt = ask(roles.accountant, "spent", plan.ledger_stage)
            show.say(f"the accountant died and is back; {attempt} attempts are spent")
            continue
        baseline = next((r.value for r in released if r.name == "private/reward"), baseline)
        if reserved.epsilon_spent is not None:
            released.append(Released("epsilon_spent", reserved.epsilon_spent, "accounting"))
        if config.evaluation.every and attempt % config.evaluation.every == 0:
            released.append(Released("public/reward", _evaluate(stage, roles, public).mean, "public_prompts"))
        log.write(stage.name, attempt, released)
        figures = [Operational(name, value) for name, value in roles.fleet.status().items() if value is not None]
        gauges.step(stage.name, attempt, released)
        gauges.fleet(figures)
        show.step(stage.name, attempt, stage.privacy.steps, plan.target, released, figures, clock.figures())
        if on_step is not None:
            on_step(attempt, roles)
    show.end()
    log.close()
    after = _evaluate(stage, roles, public)
    _persist(roles, show, lambda: _export(roles, here.model(stage.name), config.learner.num_workers))
    write_cards(here.model(stage.name), config, stage, None)  # says that it is not certified yet
    return _conclude(here, stage, public, before, after, config.evaluation.samples, show)


def rollout(drawn: list[Prompt], stage: RLStage, roles: Roles) -> list[Experience]:
    """Generate and score a draw. A record that causes a failure of its own comes back as a null record."""
    usable = [p for p in drawn if p.token_ids]
    group = stage.algorithm.completions_per_prompt
    completions = roles.fleet.generate([p.token_ids for p in usable], group) if usable else []
    pairs = [(p.text, c.text) for p, row in zip(usable, completions, strict=True) for c in row]
    rewards = iter(ray.get(roles.scorer.score.remote(pairs)) if pairs else [])
    return [  # a prompt that the engine cannot take has no completions, and so no rewards
        Experience(p, tuple(row), tuple(islice(rewards, len(row)))) for p, row in zip(usable, completions, strict=True)
    ]


def _bring_up(roles: Roles, show: RunProgress) -> None:
    """Wait for the learners, and bring every replica to the version that they start from."""
    _persist(roles, show, lambda: _publish(roles, "publish"))
    show.say(
        f"learners ready: {roles.learners.info['trainable']} trainable numbers, "
        f"version {roles.learners.info['version']}"
    )


def _persist(roles: Roles, show: RunProgress, call: Callable[[], Any]) -> None:
    """Make a call that touches nothing private; learners that die under it come back, and it is made again."""
    while True:
        roles.learners.wait_ready()
        try:
            call()
            return
        except LearnersRestarted as e:
            show.say(f"{e}; trying again")


def _export(roles: Roles, folder: Path, workers: int) -> None:
    roles.learners.call("export", [(str(folder),)] * workers)


def _publish(
    roles: Roles, method: str, arguments: list[tuple[Any, ...]] | None = None, clock: Laps | None = None
) -> list[Released]:
    """Run a learner command that yields a weight version; bring every replica to it and check them."""
    clock = clock or Laps()
    released, version, weights, reference = roles.learners.call(method, arguments)
    clock.lap("learn")
    roles.fleet.sync(version, ray.get(weights), reference)
    clock.lap("sync")
    return list(released)


def _baseline(stage: RLStage, released: float | None, before: Evaluation) -> float:
    """A public constant, or the newest released mean reward; before there is one, that of the public prompts."""
    if stage.algorithm.baseline == "constant":
        return stage.algorithm.baseline_value
    return released if released is not None else before.mean


def _evaluate(stage: RLStage, roles: Roles, public: list[Prompt]) -> Evaluation:
    single = stage.model_copy(update={"algorithm": stage.algorithm.model_copy(update={"completions_per_prompt": 1})})
    done = rollout(public, single, roles)
    return Evaluation(  # a prompt that the engine cannot take has neither
        tuple(0.0 if r is None else r.reveal() for e in done for r in (*e.rewards, None)[:1]),
        tuple(text for e in done for text in (*(c.text for c in e.completions), "")[:1]),
    )


def _before(here: RunDir, stage: RLStage, roles: Roles, public: list[Prompt], show: RunProgress) -> Evaluation:
    """Reward of the untrained policy on public prompts; kept, so that a resumed run compares with the same."""
    path = here.evaluation(stage.name)
    if path.exists():
        kept = read_json(path)["before"]
        return Evaluation(tuple(kept["rewards"]), tuple(kept["texts"]))
    before = _evaluate(stage, roles, public)
    write_atomically(path, json.dumps({"before": asdict(before)}))
    show.say(f"mean reward on {len(public)} public prompts before: {before.mean:.3f}")
    return before


def _conclude(
    here: RunDir, stage: RLStage, public: list[Prompt], before: Evaluation, after: Evaluation, samples: int,
    show: RunProgress,
) -> Comparison:  # fmt: skip
    found = compare(before.rewards, after.rewards)
    texts = [p.text for p in public]
    tree = {"comparison": found.as_dict(), "prompts": texts, "before": asdict(before), "after": asdict(after)}
    write_atomically(here.evaluation(stage.name), json.dumps(tree))
    show.say(
        f"mean reward on {found.prompts} public prompts: {found.before:.3f} -> {found.after:.3f}, "
        f"difference {found.difference:+.3f} (95 % interval {found.low:+.3f} to {found.high:+.3f})"
    )
    for i in range(min(samples, len(texts))):
        show.say(f"  {texts[i]!r}\n      before: {before.texts[i]!r}\n      after:  {after.texts[i]!r}")
    return found


@contextmanager
def _roles(
    config: RunConfig, index: int, plan: StagePlan, here: RunDir, namespace: str, accountant: Any, tokenizer: Any
) -> Iterator[Roles]:
    """Start a stage's roles (they come up side by side) and end them."""
    stage, data = config.stages[index], config.data[config.stages[index].data]
    public = load_public_prompts(config.evaluation, tokenizer, None, 0, data)[:PUBLIC_SEQUENCES]
    sequences = tuple(p.token_ids[:32] for p in public)
    path = str(resolve_model(config.model.name))
    fleet = Fleet(
        path, config.rollout, stage.generation, config.model.dtype, sequences[:CHECK_SEQUENCES], namespace=namespace
    )
    spec = LearnerSpec(config, index, plan.step, str(here.root), sequences)
    fleet.start(config.rollout.replicas)
    learners = LearnerGroup(spec, namespace, "accountant")
    scorer = start_scorer(stage, namespace)
    try:
        yield Roles(accountant, scorer, fleet, learners)
    finally:
        learners.stop()
        fleet.stop()
        ray.kill(scorer)


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


def _costs(accountant: Any, plans: list[StagePlan], units: dict[str, Units | None]) -> dict[str, DatasetCost]:
    """Per declared data set, what this run and all that the ledger knows of cost, at the smallest of the run's deltas.

    The units of every stage go to the accountant with each question: one that was started again knows of none.
    """
    deltas: dict[str, float] = {}
    for p in plans:
        deltas[p.dataset] = min(p.delta, deltas.get(p.dataset, 1.0))
    return {
        name: DatasetCost(*(ask(accountant, "composition", name, delta, units, only) for only in (True, False)))
        for name, delta in deltas.items()
    }


def _plan_line(plan: StagePlan, prompts: Prompts) -> str:
    s = plan.step
    bound = "no guarantee (clip only)" if plan.epsilon is None else f"eps {plan.certified:.3f} at delta {plan.delta:g}"
    nulls = f", {prompts.null_count} unusable records count as null" if prompts.null_count else ""
    return (
        f"stage {plan.stage}: {s.steps} draws of {s.expected_batch:.0f} of {s.population} records "
        f"(q {s.sampling_rate:.4f}), noise multiplier {s.noise_multiplier:.4f}, {bound}{nulls}"
    )


def _tokenizer(config: RunConfig) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(config.model.name))
