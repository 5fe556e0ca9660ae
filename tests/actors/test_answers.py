"""The small roles: one that hangs is killed and started again, and is asked again, or its call fails as at a death."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dprlhf_ray import collect
from dprlhf_ray.actors import answers, roles
from dprlhf_ray.actors.answers import RoleHangs, answer
from dprlhf_ray.actors.roles import ask, start_scorer
from dprlhf_ray.config import RLStage
from tests.actors.hanging_role import Role

pytestmark = pytest.mark.usefixtures("local_ray")


def _start(repeats: int) -> Any:
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": repeats}
    return ray.remote(Role).options(**options).remote()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LONG", 10.0)


def _hang(role: Any) -> int:
    pid = int(ray.get(role.pid.remote()))
    os.kill(pid, signal.SIGSTOP)
    return pid


def _is_gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_a_call_that_may_be_repeated_is_answered_after_a_hang(impatient: None) -> None:
    """False: a scorer that hangs holds up a run for ever, or goes on beside its successor."""
    role = _start(-1)
    pid = _hang(role)
    assert answer(role, "scorer", "twice", role.twice.remote([3])) == [6]
    assert _is_gone(pid)


def test_a_call_that_must_not_be_repeated_fails_as_at_a_death(impatient: None) -> None:
    """False: an attempt is charged twice, or a run waits for ever for an accountant that hangs."""
    role = _start(0)
    pid = _hang(role)
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        answer(role, "accountant", "twice", role.twice.remote([3]))
    assert ask(role, "twice", [4]) == [8] and _is_gone(pid)


def test_the_time_of_a_hang_is_not_the_time_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: after a hang that took longer than a start may, a run ends instead of asking the new accountant."""
    clock, died = [1000.0], ray.exceptions.ActorUnavailableError("it was killed", b"0" * 16)
    answers_in_turn = iter([died, died, 7])

    def slow(*_: Any) -> Any:
        clock[0] += 600.0 if clock[0] == 1000.0 else 1.0
        found = next(answers_in_turn)
        if found is died:
            raise died
        return found

    monkeypatch.setattr(roles, "answer", slow)
    monkeypatch.setattr(roles, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: None))
    assert ask(SimpleNamespace(spent=SimpleNamespace(remote=lambda: None)), "spent", patience=120.0) == 7


@pytest.mark.parametrize("repeated", [True, False])
def test_a_role_that_hangs_again_and_again_ends_the_run_in_one_line(
    repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: a role whose disk is gone is killed and asked for ever. A call that Ray does not repeat fails after each
    kill, and the next one hangs again."""
    killed: list[Any] = []
    died = ray.exceptions.ActorUnavailableError("it was killed", b"0" * 16)

    def wait(calls: list[list[int]], timeout: float) -> tuple[list[Any], list[Any]]:
        (call,) = calls
        return (calls, []) if not repeated and len(killed) > call[0] else ([], calls)

    def get(call: Any) -> None:
        raise died

    fake = SimpleNamespace(wait=wait, get=get, kill=lambda *a, **k: killed.append(a), exceptions=ray.exceptions)
    monkeypatch.setattr(answers, "ray", fake)
    role = SimpleNamespace(spent=SimpleNamespace(remote=lambda: [len(killed)]))
    monkeypatch.setattr(roles, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: None))
    with pytest.raises(RoleHangs, match=f"the accountant gave no answer within 600 s, {answers.HANGS} times") as found:
        ask(role, "spent")
    assert "\n" not in str(found.value) and "--resume" in str(found.value)
    assert len(killed) == answers.HANGS and not answers._in_a_row


def test_a_slow_scorer_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """False: a large draw that takes longer than one answer may is taken for a hang."""
    monkeypatch.setattr(answers, "LONG", 4.0)
    monkeypatch.setattr(collect, "PART", 2)
    role = _start(-1)
    pid = ray.get(role.pid.remote())
    source = collect.Rollouts(None, None, role, [])  # type: ignore[arg-type]
    rows = list(range(9))
    assert source._ask_scorer("twice", rows, 1.0) == [2 * x for x in rows]  # five parts: 5 s
    assert ray.get(role.pid.remote()) == pid
    assert source._ask_scorer("twice", []) == []


def test_a_scorer_has_the_gpus_that_it_asks_for_and_sees_no_other() -> None:
    """False: a reward model scores on a CPU on a cluster of GPUs; or on a GPU beside other roles, where the length of
    one record decides whether there is memory for another's reward."""
    stage = RLStage.model_validate({"privacy": {"epsilon": 1.0}, "scorer": {"kind": "sentiment_rule"}})
    sees = lambda actor: os.environ.get("CUDA_VISIBLE_DEVICES")  # noqa: E731
    for gpus, seen in ((1, "0"), (0, "")):
        scorer = start_scorer(stage, {}, "gpus", gpus)
        _until_free(1.0 - gpus)
        assert ray.get(scorer.__ray_call__.remote(sees)) == seen
        (reward,) = ray.get(scorer.score.remote([("It was", " a great film", 0.0)]))
        assert reward.reveal() > 0
        ray.kill(scorer)
        _until_free(1.0)


def _until_free(gpus: float) -> None:
    """The names of dead actors are free then, too."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("GPU", 0.0) != gpus:
        assert time.monotonic() < deadline
        time.sleep(0.1)
