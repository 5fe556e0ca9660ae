"""One stage: reserve, draw, collect, learn, publish, until its attempts are spent.

The driver holds the private records in memory and passes them to the roles; it writes released values only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from dprlhf_ray.actors.cluster import ray  # first: sets Ray's environment before ray is imported
from dprlhf_ray.actors.fleet import Fleet
from dprlhf_ray.actors.learner_group import LearnerGroup
from dprlhf_ray.actors.roles import ask, reserve
from dprlhf_ray.actors.sync_check import LogProbs
from dprlhf_ray.collect import Source
from dprlhf_ray.config import AnyStage, RunConfig
from dprlhf_ray.data.units import StageData
from dprlhf_ray.errors import ConfigError, LearnersRestarted, LedgerDamaged
from dprlhf_ray.evaluation.public import Comparison, Evaluation, compare
from dprlhf_ray.lane import Drawn, Lane
from dprlhf_ray.models.card import write_cards
from dprlhf_ray.observability.gauges import Gauges
from dprlhf_ray.observability.metrics import MetricsLog, last_value, read_metrics
from dprlhf_ray.observability.progress import Laps, RunProgress
from dprlhf_ray.privacy.planning import StagePlan
from dprlhf_ray.privacy.release import Operational, Released
from dprlhf_ray.privacy.sampling import choose, poisson_draw
from dprlhf_ray.records import Unit
from dprlhf_ray.run_dir import RunDir, read_json, write_atomically
from dprlhf_ray.stages.batching import deal
from dprlhf_ray.transport import Handle


@dataclass
class Roles:
    """Handles of one stage's roles. fleet, scorer: of an rl stage."""

    accountant: Any
    learners: LearnerGroup
    fleet: Fleet | None = None
    scorer: Any = None


def run_stage(
    config: RunConfig, index: int, plan: StagePlan, here: RunDir, roles: Roles, data: StageData, source: Source,
    show: RunProgress, on_step: Callable[[int, Roles], None] | None,
) -> Comparison | None:  # fmt: skip
    """Every attempt is paid for before anything private is touched, and published or lost as a whole.

    Returns:
        What the stage gained on public records (None: it has none).
    """
    stage, workers = config.stages[index], config.learner.num_workers
    log = MetricsLog(here.root, config.tracking, config.name)
    _bring_up(roles, show)
    attempt = ask(roles.accountant, "spent", plan.ledger_stage)
    before = _before(here, stage, roles, source, attempt, show)
    rows = read_metrics(here.root)
    check_spent(stage.name, attempt, rows)
    show.begin(stage.name, attempt, stage.privacy.steps, plan.public)
    baseline = last_value(rows, stage.name, "private/reward")
    begun, ahead = attempt, config.rollout.staleness if roles.fleet is not None else 0
    lane = Lane(lambda: _prepare(roles, plan, data, source), ahead)
    gauges = Gauges(config.name, _partition(plan, stage))
    try:
        while attempt < stage.privacy.steps:
            clock = Laps()
            try:
                lane.fill(stage.privacy.steps - attempt)
                drawn = lane.take()
                attempt = drawn.attempt
                clock.lap("wait" if ahead else None)
                baseline = _baseline(stage, baseline, before)
                shares = [([ray.put(share)], attempt, baseline, drawn.token) for share in deal(drawn.units, workers)]
                released, version, *weights = _update(roles, shares)
                clock.lap("learn")
                synced = lane.run(lambda weights=weights: _sync(roles, *weights))  # type: ignore[misc]
                if not ahead:
                    clock.lap("sync")
                if attempt % config.learner.checkpoint_every == 0 or attempt == stage.privacy.steps:
                    roles.learners.call("save", [(attempt, ask(roles.accountant, "head"))] * workers)
                clock.lap("checkpoint")
            except LearnersRestarted as e:
                show.say(f"{e}; going on from the newest checkpoint")
                begun = attempt = _start_over(lane, roles, plan, show, begun + lane.asked)
                continue
            except ray.exceptions.ActorUnavailableError:  # the accountant's: others' deaths are met where they happen
                begun = attempt = _start_over(lane, roles, plan, show, begun + lane.asked)
                show.say(f"the accountant died and is back; {attempt} attempts are spent")
                continue
            baseline = next((r.value for r in released if r.name == "private/reward"), baseline)
            if drawn.epsilon_spent is not None:
                released.append(Released("epsilon_spent", drawn.epsilon_spent, "accounting"))
            if config.evaluation.every and attempt % config.evaluation.every == 0:
                now = _glance(synced, source) if ahead else _look(roles, source, show)
                released += [] if now is None else [Released(f"public/{source.measure}", now.mean, "public_prompts")]
            log.write(stage.name, attempt, released)
            laps = [*drawn.seconds, *clock.figures()]
            fleet, learning = _figures(roles, drawn, version)
            gauges.step(stage.name, attempt, released)
            gauges.operations(stage.name, fleet, learning, laps)
            show.step(stage.name, attempt, stage.privacy.steps, plan.target, released, fleet, laps)
            if on_step is not None:
                on_step(attempt, roles)
        _last_sync(lane, roles, show)
    except BaseException:
        if roles.fleet is not None:
            roles.fleet.interrupt()
        raise
    finally:
        lane.close()
        gauges.close()
    show.end()
    log.close()
    after = _look(roles, source, show)
    persist(roles, show, lambda: roles.learners.call("export", [(str(here.model(stage.name)),)] * workers))
    write_cards(here.model(stage.name), config, stage, None)  # says that it is not certified yet
    found = _conclude(here, stage, source, before, after, config.evaluation.samples, show)
    here.finish(stage.name, attempt, ask(roles.accountant, "head"))
    return found


def _prepare(roles: Roles, plan: StagePlan, data: StageData, source: Source) -> Drawn:
    """Charge one attempt, draw, collect: in this order."""
    clock = Laps()
    reserved = reserve(roles.accountant, plan.ledger_stage, roles.learners.incarnation)
    drawn = draw(data, plan)
    clock.lap("reserve")
    units = source.collect(drawn)
    clock.lap("collect")
    return Drawn(reserved.attempt, reserved.token, reserved.epsilon_spent, units, clock.figures())


def _start_over(lane: Lane, roles: Roles, plan: StagePlan, show: RunProgress, asked: int) -> int:
    """After a death: everything that was asked for is lost. Returns the attempts spent.

    Draws ahead that were not begun are charged too: how many were is a matter of how long private completions took.
    """
    ahead = lane.ahead
    lane.clear()
    _recover(roles, show)
    spent = int(ask(roles.accountant, "spent", plan.ledger_stage))
    while ahead and spent < asked:
        try:
            spent = reserve(roles.accountant, plan.ledger_stage, roles.learners.incarnation).attempt
        except ray.exceptions.ActorUnavailableError:
            spent = int(ask(roles.accountant, "spent", plan.ledger_stage))
    return spent


def _glance(sync: Future[None], source: Source) -> Evaluation | None:
    """Evaluate the weights of a sync, once it is done. None: somebody died, which the next draw meets too, and answers
    for all that are in flight."""
    try:
        sync.result()
        return source.evaluate()
    except (LearnersRestarted, ray.exceptions.RayError):
        return None


def _last_sync(lane: Lane, roles: Roles, show: RunProgress) -> None:
    """Until the last weights are with the fleet, and verified."""
    try:
        lane.run(lambda: None).result()
    except LearnersRestarted as e:
        show.say(f"{e}; going on from the newest checkpoint")
        lane.clear()
        _recover(roles, show)


def _update(roles: Roles, shares: list[tuple[Any, ...]] | None) -> tuple[list[Released], int, Handle | None, LogProbs]:
    """One update (None: none, only the present weights): what was released, the version, the handle of its weights.

    Raises:
        LearnersRestarted: they died.
    """
    released, version, handle, reference = roles.learners.call("publish" if shares is None else "update", shares)
    return list(released), version, handle, reference


def _partition(plan: StagePlan, stage: AnyStage) -> str:
    return plan.dataset if stage.partition is None else f"{plan.dataset}/{stage.partition}"


def _figures(roles: Roles, drawn: Drawn, version: int) -> tuple[list[Operational], list[Operational]]:
    """What the operator sees of the fleet and of the learners."""
    learners = [Operational("incarnations", float(roles.learners.incarnations))]
    if roles.fleet is None:
        return [], learners
    fleet = [Operational(name, value) for name, value in roles.fleet.status().items() if value is not None]
    used = next((c.version for u in drawn.units for e in u for c in e.completions), None)
    return fleet + ([] if used is None else [Operational("staleness", version - 1.0 - used)]), learners


def draw(data: StageData, plan: StagePlan) -> list[Unit]:
    """A secret Poisson draw of units; of a drawn user, some records at random. PRIVATE."""
    items, at_most = data.records.items, data.records_per_draw
    drawn = poisson_draw(len(data.units), plan.step.sampling_rate, plan.step.max_batch)
    return [tuple(items[slot] for slot in choose(data.units[u], at_most)) for u in drawn]


def check_spent(stage: str, spent: int, rows: list[dict[str, Any]], finished: int = 0) -> None:
    """Raise LedgerDamaged where more attempts of a stage were released, or went into its finished model, than its
    ledger knows of."""
    released = max([finished, *(r["attempt"] for r in rows if r["stage"] == stage)])
    if spent < released:
        raise LedgerDamaged(f"ledger: {spent} attempts of stage {stage!r}, but {released} were released")


def persist(roles: Roles, show: RunProgress, call: Callable[[], Any]) -> Any:
    """Make a call that touches nothing private; learners that die under it come back, and it is made again."""
    while True:
        roles.learners.wait_ready()
        try:
            return call()
        except LearnersRestarted as e:
            show.say(f"{e}; trying again")
            _give_way(roles)


def _look(roles: Roles, source: Source, show: RunProgress) -> Evaluation | None:
    """Evaluate the present weights; learners that die under it come back first."""
    while True:
        try:
            return source.evaluate()
        except LearnersRestarted as e:
            show.say(f"{e}; going on from the newest checkpoint")
            _recover(roles, show)


def _recover(roles: Roles, show: RunProgress) -> None:
    """As `_bring_up`, after a death."""
    _give_way(roles)
    _bring_up(roles, show)


def _give_way(roles: Roles) -> None:
    """Learners that come back may need the GPUs of replicas that do not serve yet."""
    if roles.fleet is not None:
        roles.fleet.give_way()


def _bring_up(roles: Roles, show: RunProgress) -> None:
    """Wait for the learners, and bring every replica to the version that they start from."""
    persist(roles, show, lambda: _sync(roles, *_update(roles, None)[2:]))
    show.say(
        f"learners ready: {roles.learners.info['trainable']} trainable numbers, "
        f"version {roles.learners.info['version']}"
    )


def _sync(roles: Roles, handle: Handle | None, reference: LogProbs) -> None:
    """Bring every replica to a weight version, and check each against the learner."""
    if roles.fleet is not None and handle is not None:
        roles.fleet.sync(handle, reference)


def _baseline(stage: AnyStage, released: float | None, before: Evaluation | None) -> float:
    """A public constant, or the newest released mean reward; before there is one, that of the public prompts."""
    if stage.kind != "rl" or before is None:
        return 0.0
    if stage.algorithm.baseline == "constant":
        return stage.algorithm.baseline_value
    return released if released is not None else before.mean


def _before(
    here: RunDir, stage: AnyStage, roles: Roles, source: Source, spent: int, show: RunProgress
) -> Evaluation | None:
    """Of the untrained model on public records; kept, so that a resumed run compares with the same.

    Raises:
        ConfigError: attempts are spent, and what the first one started from is gone.
    """
    path = here.evaluation(stage.name)
    if spent and not path.exists() and stage.kind == "rl":
        raise ConfigError(
            f"{path}: is gone, and rewards before the {spent} spent attempts cannot be had again: restore it"
        )
    if path.exists():
        tree = read_json(path)
        kept, unit = tree["before"], tree.get("unit")
        if stage.kind == "rl" and stage.scorer.standardise and not unit:  # else every attempt would be spent in vain
            raise ConfigError(f"{path}: has no unit of the rewards any more: restore it")
        source.unit = None if unit is None else (unit[0], unit[1])
        return Evaluation(tuple(kept["rewards"]), tuple(kept["texts"]))
    before = _look(roles, source, show)
    if before is not None:
        tree = {"measure": source.measure, "unit": source.unit, "before": asdict(before)}
        write_atomically(path, json.dumps(tree))
        show.say(f"mean {source.measure} on {len(before.rewards)} public records before: {before.mean:.3f}")
    return before


def _conclude(
    here: RunDir, stage: AnyStage, source: Source, before: Evaluation | None, after: Evaluation | None, samples: int,
    show: RunProgress,
) -> Comparison | None:  # fmt: skip
    if before is None or after is None:
        return None
    found = compare(before.rewards, after.rewards)
    tree = {
        "measure": source.measure,
        "unit": source.unit,
        "comparison": found.as_dict(),
        "prompts": list(source.prompts),
    }
    write_atomically(here.evaluation(stage.name), json.dumps(tree | {"before": asdict(before), "after": asdict(after)}))
    show.say(
        f"mean {source.measure} on {found.prompts} public records: {found.before:.3f} -> {found.after:.3f}, "
        f"difference {found.difference:+.3f} (95 % interval {found.low:+.3f} to {found.high:+.3f})"
    )
    for prompt, was, is_now in list(zip(source.prompts, before.texts, after.texts, strict=False))[:samples]:
        show.say(f"  {prompt!r}\n      before: {was!r}\n      after:  {is_now!r}")
    return found
