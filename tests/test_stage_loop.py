"""The loop of a stage, with a real ledger and accountant: paid for first, and what is lost is made anew.

The roles that need a cluster are stand-ins: here the order of the driver's calls is looked at, not what they compute.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from transformers import AutoConfig, AutoTokenizer

from dprlhf_ray import collect, config_file, pipeline, stage_run
from dprlhf_ray.actors import answers
from dprlhf_ray.actors import scorer as scorer_role
from dprlhf_ray.actors.accountant import AccountantActor
from dprlhf_ray.actors.learner_group import LearnersRestarted
from dprlhf_ray.config import RLStage, ScorerConfig
from dprlhf_ray.data.sources import Records, load_public_prompts
from dprlhf_ray.data.units import StageData
from dprlhf_ray.errors import ConfigError, LedgerDamaged, SyncFailed
from dprlhf_ray.privacy.budget import Declaration
from dprlhf_ray.privacy.ledger import Ledger
from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.planning import StagePlan
from dprlhf_ray.privacy.release import Released
from dprlhf_ray.records import Completion, Experience, Prompt
from dprlhf_ray.run_dir import RunDir

STEP = DPStep("record", "zero_out", 40, 0.5, 4.0, 1.0, 1, 12, 8.0)
RELEASED, PUBLIC, PRIVATE = 0.375, 0.125, -0.75  # mean rewards: released with noise, of public prompts, of the draws


class Quiet:
    """Takes every call and says nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Direct:
    """An actor without Ray: `actor.method.remote(...)` is a plain call."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._target, name))


# Ray, where a call is its answer.
PLAIN = SimpleNamespace(
    get=lambda call: call, put=lambda value: value, wait=lambda calls, timeout: (calls, []), exceptions=ray.exceptions
)


class Enough(Exception):
    """Ends the loop after the attempts that a test looks at."""


@dataclass
class World:
    """Stand-ins that note (what, attempts on disk at that moment). die_at: updates under which the learners die."""

    folder: Path
    accountant: AccountantActor
    die_at: tuple[int, ...] = ()
    seen: list[tuple[str, int]] = field(default_factory=list)
    draws: list[tuple[int, ...]] = field(default_factory=list)
    shares: list[Any] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    baselines: list[float] = field(default_factory=list)
    incarnation: str = "learner-1"
    incarnations: int = 1
    staleness: int = 0
    version: int = 0  # of the fleet
    trained: int = 0  # of the learners
    used: list[tuple[int, int]] = field(default_factory=list)  # version learned on, version of its completions
    pauses: random.Random | None = None  # every call takes an arbitrary time
    every: int = 0
    info: dict[str, int] = field(default_factory=lambda: {"trainable": 1, "version": 0})

    def note(self, what: str) -> None:
        self.seen.append((what, Ledger.read(self.folder / "ledger.db").schedules["rl"].spent))

    def draw(self, population: int, *_: Any) -> tuple[int, ...]:
        self.note("draw")
        self.draws.append(tuple(range(len(self.draws), population, 2)))
        return self.draws[-1]

    def generate(self, prompts: list[Any], count: int) -> list[list[Completion]]:
        self.note("public" if prompts[0] == (9,) else "generate")
        self.pause()
        version = self.version
        return [[Completion((7,), "public" if p == (9,) else "private", True, version)] * count for p in prompts]

    def score(self, texts: list[tuple[str, str, float]]) -> list[float]:
        return [PUBLIC if completion == "public" else PRIVATE for _, completion, _ in texts]

    def wait_ready(self) -> None:
        pass

    def sync(self, handle: Any, *_: Any) -> None:
        self.pause()
        self.version = handle.version

    def interrupt(self) -> None:
        pass

    def give_way(self) -> None:
        pass

    def pause(self) -> None:
        if self.pauses is not None:
            time.sleep(self.pauses.choice((0.0, 0.0, 0.002, 0.02)))

    def status(self) -> dict[str, float]:
        return {}

    def call(self, method: str, arguments: Any = None) -> Any:
        if method != "update":
            return [], self.trained, SimpleNamespace(version=self.trained), []
        self.note("update")
        self.pause()
        ((share,), attempt, baseline, token) = arguments[0]
        self.attempts.append(attempt)
        self.shares.append(tuple(e.prompt.slot for unit in share for e in unit))
        self.used.append((self.trained, share[0][0].completions[0].version))
        self.tokens.append(token)
        self.baselines.append(baseline)
        if len(self.tokens) in self.die_at:
            self.incarnation = f"learner-{len(self.tokens) + 1}"
            raise LearnersRestarted("the learner group died and was restarted; the step in flight is spent")
        self.accountant.redeem(token, self.incarnation, "only")
        self.trained += 1
        handle = SimpleNamespace(version=self.trained)
        return [Released("private/reward", RELEASED, "noised", 0.1)], self.trained, handle, []


def _tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [9]}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    accountant = AccountantActor(str(tmp_path / "ledger.db"))
    accountant.declare([Declaration("notes", "rl", STEP, 8.0, 1e-5)])
    found = World(tmp_path, accountant)
    monkeypatch.setattr(stage_run, "ray", PLAIN)
    monkeypatch.setattr(answers, "ray", PLAIN)
    monkeypatch.setattr(stage_run, "ask", lambda actor, method, *a, **k: getattr(actor, method).remote(*a))
    monkeypatch.setattr(stage_run, "Gauges", lambda *names: Quiet())
    monkeypatch.setattr(stage_run, "poisson_draw", found.draw)
    return found


def _run(world: World, attempts: int) -> None:
    """The stage's loop, until `attempts` have been published."""
    public = world.folder / "public.jsonl"
    public.write_text("".join(json.dumps({"prompt": f"public {i}"}) + "\n" for i in range(4)))
    tree = {
        "data": {"notes": {"source": str(public)}},
        "evaluation": {"source": str(public), "prompts": 4, "every": world.every},
        "rollout": {"staleness": world.staleness},
        "stages": [{"data": "notes", "privacy": {"epsilon": 8.0, "expected_batch": 20, "steps": STEP.steps}}],
    }
    config = config_file.parse(tree)
    items = tuple(Experience(Prompt(i, (i + 10,), f"record {i}"), (), ()) for i in range(STEP.population))
    data = StageData(Records(items, 0), tuple((i,) for i in range(len(items))), 1, None)
    plan = StagePlan("rl", "rl", "notes", STEP, None, 8.0, 1e-5)
    roles = stage_run.Roles(Direct(world.accountant), world, world, Direct(world))  # type: ignore[arg-type]
    prompts = load_public_prompts(config.evaluation, _tokenizer, None, 0, config.data["notes"])
    source = collect.Rollouts(config.stages[0], world, Direct(world), prompts)  # type: ignore[arg-type]
    published = 0

    def on_step(attempt: int, _: Any) -> None:
        nonlocal published
        published += 1
        if published == attempts:
            raise Enough

    with pytest.raises(Enough):
        stage_run.run_stage(config, 0, plan, RunDir(world.folder), roles, data, source, Quiet(), on_step)  # type: ignore[arg-type]


def test_nothing_private_is_touched_before_its_charge_is_on_disk(world: World) -> None:
    """False: a draw, a rollout or an update happens before the ledger's file holds what pays for it."""
    _run(world, 3)
    private = [entry for entry in world.seen if entry[0] != "public"]
    assert private == [(what, n) for n in (1, 2, 3) for what in ("draw", "generate", "update")]


@pytest.mark.parametrize(("staleness", "every"), [(0, 0), (1, 0), (2, 0), (1, 2)])
def test_which_weights_answer_a_draw_goes_by_its_number_and_not_by_the_clock(
    world: World, staleness: int, every: int
) -> None:
    """False: how long one record's completion takes decides which policy the others' completions come from, so that
    clipping no longer bounds that record's influence; or a draw is made before it is paid for."""
    world.staleness, world.every, world.pauses = staleness, every, random.Random(staleness)
    world.die_at = (4,)
    _run(world, 9)
    before_death = [(v, max(0, v - staleness)) for v in range(4)]
    after = [(v, max(3, v - staleness)) for v in range(3, 9)]
    assert world.used == before_death + after
    assert all(attempts >= n for n, attempts in enumerate((a for what, a in world.seen if what == "draw"), 1))
    private = [what for what, _ in world.seen if what in ("draw", "generate")]
    assert private == ["draw", "generate"] * (len(private) // 2)
    learned = [tuple(sorted(s)) for s in world.shares]
    assert learned == [d for d in world.draws if d in learned]  # a draw that was in flight at the death is lost
    assert len(set(world.tokens)) == len(world.tokens)
    first = 5 + staleness  # what the death costs does not depend on how far the draws ahead had got
    assert world.attempts == [1, 2, 3, 4, *range(first, first + 6)]


def test_a_draw_that_failed_ends_the_run_and_so_does_a_sync_nobody_waits_for(world: World) -> None:
    """False: with draws ahead an engine that disagrees with the learner goes unnoticed."""
    world.staleness = 1

    def disagree(handle: Any, *_: Any) -> None:
        if handle.version == 2:
            raise SyncFailed("version 2: not the learner's")

    world.sync = disagree  # type: ignore[method-assign]
    with pytest.raises(SyncFailed, match="version 2"):
        _run(world, 9)
    assert world.trained == 3  # draw 3 was generated before the sync that failed; draw 4 would have come after it


def test_everybody_who_was_drawn_takes_part_and_nobody_else(world: World) -> None:
    """False: units are dropped, repeated or replaced between the draw and the learner."""
    _run(world, 3)
    assert [tuple(sorted(s)) for s in world.shares] == world.draws


def test_an_attempt_that_died_is_charged_again_with_a_new_draw_rollout_and_permit(world: World) -> None:
    """False: a retry uses the same attempt, draw, completions or permit, so that two releases share their noise's
    charge, or the died attempt is refunded."""
    world.die_at = (2,)
    _run(world, 3)
    private = [entry for entry in world.seen if entry[0] != "public"]
    assert private == [(what, n) for n in (1, 2, 3, 4) for what in ("draw", "generate", "update")]
    assert len(set(world.tokens)) == len(world.tokens) == 4
    assert [tuple(sorted(s)) for s in world.shares] == world.draws
    assert world.accountant.spent("rl") == 4


def test_without_an_acknowledged_charge_there_is_no_draw(world: World) -> None:
    """False: the loop goes on when the accountant refuses."""
    world.accountant.close()
    with pytest.raises(LedgerDamaged):
        _run(world, 1)
    assert [what for what, _ in world.seen if what != "public"] == []


def test_the_baseline_is_a_released_value_never_that_of_the_draw(world: World) -> None:
    """False: the mean reward of private completions reaches the next step without noise."""
    _run(world, 3)
    assert world.baselines == [PUBLIC, RELEASED, RELEASED]


def test_a_prompt_without_completions_is_null_and_shifts_nobody_s_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: the next records get its rewards, or the step dies whenever it is drawn, which tells that it is there."""
    stage = RLStage.model_validate({
        "privacy": {"epsilon": 1.0}, "algorithm": {"kind": "rloo", "completions_per_prompt": 2},
    })  # fmt: skip
    drawn = [(Experience(Prompt(i, (i + 1,), str(i)), (), ()),) for i in range(4)]

    def generate(prompts: Any, group: int) -> list[list[Completion]]:
        return [[] if p == (2,) else [Completion((g,), f"{p[0]}.{g}", False, 0) for g in range(group)] for p in prompts]

    score = SimpleNamespace(remote=lambda texts: [float(text) for _, text, _ in texts])
    monkeypatch.setattr(answers, "ray", PLAIN)
    fleet, scorer = SimpleNamespace(generate=generate), SimpleNamespace(score=score)
    source = collect.Rollouts(stage, fleet, scorer, [])  # type: ignore[arg-type]
    done = [e for unit in source.collect(drawn) for e in unit]
    assert [e.is_null for e in done] == [False, True, False, False]
    assert [[r.reveal() for r in e.rewards if r] for e in done] == [[1.0, 1.1], [], [3.0, 3.1], [4.0, 4.1]]


def test_a_user_s_completions_come_back_to_that_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: records move from one unit to another, which then has more influence than is accounted for."""
    stage = RLStage.model_validate({"privacy": {"epsilon": 1.0}})
    slots = [(0, 1), (), (2,), (3, 4, 5)]
    drawn = [tuple(Experience(Prompt(i, (i + 1,), str(i)), (), ()) for i in unit) for unit in slots]
    generate = lambda prompts, group: [[Completion(p, str(p[0]), True, 0)] for p in prompts]  # noqa: E731
    score = SimpleNamespace(remote=lambda texts: [float(text) for _, text, _ in texts])
    monkeypatch.setattr(answers, "ray", PLAIN)
    source = collect.Rollouts(stage, SimpleNamespace(generate=generate), SimpleNamespace(score=score), [])  # type: ignore[arg-type]
    units = source.collect(drawn)
    assert [tuple(e.prompt.slot for e in unit) for unit in units] == slots
    assert all(e.rewards[0].reveal() == e.prompt.slot + 1 for unit in units for e in unit if e.rewards[0])


def test_penalties_are_the_completion_s_own() -> None:
    """False: a length penalty or that for a missing end is not applied, or applied to completions that ended."""
    scorer = ScorerConfig(length_penalty=0.1, missing_eos_penalty=0.5)
    assert collect.penalty(scorer, Completion((1, 2, 3), "", True, 0)) == pytest.approx(0.3)
    assert collect.penalty(scorer, Completion((1, 2, 3), "", False, 0)) == pytest.approx(0.8)


def test_a_drawn_user_brings_own_records_only_and_at_most_so_many() -> None:
    """False: a draw holds records of users that were not drawn, or one user brings more than is said."""
    items = tuple(Experience(Prompt(i, (i + 10,), ""), (), ()) for i in range(10))
    users = ((0, 3, 4, 9), (1,), (2, 5, 6, 7, 8))
    data = StageData(Records(items, 0), users, 2, None)
    plan = StagePlan("rl", "rl", "notes", replace(STEP, unit="user", population=3, sampling_rate=1.0), None, 8.0, 1e-5)
    seen: set[int] = set()
    for _ in range(100):
        units = stage_run.draw(data, plan)
        slots = [tuple(e.prompt.slot for e in unit) for unit in units]
        assert [len(s) for s in slots] == [2, 1, 2]
        assert all(set(s) <= set(own) and len(set(s)) == len(s) for s, own in zip(slots, users, strict=True))
        seen.update(s for unit in slots for s in unit)
    assert seen == set(range(10))


def test_standardised_rewards_have_the_unit_of_public_prompts_and_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: private rewards set the scale, it moves with the policy, or a resumed run has another one."""
    stage = RLStage.model_validate({
        "privacy": {"epsilon": 1.0},
        "scorer": {"kind": "python", "function": "m:f", "standardise": True, "reward_bound": 1.5,
                   "length_penalty": 0.25},
    })  # fmt: skip
    offset = 0.0

    class ByText:
        def score(self, pairs: Any) -> list[float | None]:
            return [None if c == "4" else float(c) + offset for _, c in pairs]

    monkeypatch.setattr(scorer_role, "build_scorer", lambda *_: ByText())
    monkeypatch.setattr(answers, "ray", PLAIN)
    scorer = Direct(scorer_role.ScorerActor(stage.scorer))
    fleet = SimpleNamespace(generate=lambda ids, group: [[Completion((1,), str(i[0]), True, 0)] for i in ids])
    public = [Prompt(i, (i,), "") for i in (1, 3, 4)]
    source = collect.Rollouts(stage, fleet, scorer, public)  # type: ignore[arg-type]
    drawn = [(Experience(Prompt(0, (2,), ""), (), ()),), (Experience(Prompt(1, (9,), ""), (), ()),)]
    with pytest.raises(RuntimeError, match="no unit"):
        source.collect(drawn)
    assert source.evaluate().rewards == (-1.25, 0.75, 0.0) and source.unit == (2.0, 1.0)

    def rewards(of: collect.Rollouts) -> list[float]:
        return [r.reveal() for (e,) in of.collect(drawn) for r in e.rewards if r]

    assert rewards(source) == [-0.25, 1.5]
    offset = 10.0  # as another policy would: the unit stays
    assert source.evaluate().rewards == (1.5, 1.5, 0.0) and source.unit == (2.0, 1.0)
    resumed = collect.Rollouts(stage, fleet, scorer, public)  # type: ignore[arg-type]
    resumed.unit, offset = source.unit, 0.0
    assert rewards(resumed) == [-0.25, 1.5]


def test_a_stage_that_has_spent_does_not_take_a_trained_policy_for_its_start(world: World) -> None:
    """False: the unit of rewards, or the comparison with the start, is silently that of another policy."""
    _run(world, 1)
    RunDir(world.folder).evaluation("rl").unlink()
    with pytest.raises(ConfigError, match=r"evaluation-rl\.json: is gone"):
        _run(world, 2)


def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """False: a record with such an id in its text ends the learners, and the missing attempt tells of it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = config_file.parse({"model": {"name": str(tmp_path)}, "stages": [{"privacy": {"epsilon": 1.0}}]})
    tokenizer.save_pretrained(tmp_path)
    assert pipeline._tokenizer(config).get_vocab() == tokenizer.get_vocab()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.name: the tokenizer of .* resize them"):
        pipeline._tokenizer(config)


def test_long_public_texts_serve_a_stage_with_short_prompts(tiny_model: Path, tmp_path: Path) -> None:
    """False: a stage whose prompts are short has nothing to compare engines with, and does not start."""
    public = tmp_path / "public.jsonl"
    public.write_text(
        "".join(json.dumps({"prompt": f"text {i} " + "that goes on and on " * 50}) + "\n" for i in range(3))
    )
    tree = {
        "data": {"notes": {"source": str(public), "max_prompt_tokens": 8}},
        "evaluation": {"source": str(public), "prompts": 3},
        "stages": [{"data": "notes", "privacy": {"epsilon": 8.0}}],
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = config_file.parse(tree)
    found = pipeline.public_sequences(config, config.stages[0], tokenizer)
    assert [len(s) for s in found] == [8, 8, 8]


def test_a_stage_without_a_fleet_has_no_weights_to_fetch() -> None:
    """False: supervised stages and reward models, whose learners publish none, do not start."""
    learners = SimpleNamespace(call=lambda method, shares: ([], 3, None, []))
    roles = stage_run.Roles(None, learners)  # type: ignore[arg-type]
    assert stage_run._update(roles, None) == ([], 3, None, [])
    stage_run._sync(roles, None, [])
