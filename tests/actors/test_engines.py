"""Real engines, each in an actor's process: they follow the learner's weights and never repeat their draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from dprlhf_ray.actors.engines.transformers import TransformersEngine
from dprlhf_ray.actors.engines.vllm import environment
from dprlhf_ray.actors.rollout import Failure, RolloutActor
from dprlhf_ray.actors.sync_check import root_mean_square
from dprlhf_ray.config import GenerationConfig, RolloutConfig
from dprlhf_ray.errors import SyncFailed
from dprlhf_ray.transport.objects import ObjectHandle, ObjectPublisher, pack

pytestmark = pytest.mark.usefixtures("local_ray")

SEQUENCES = [tuple(range(5, 35)), tuple(range(40, 100, 2))]
PROMPTS = [(20 + i, 30, 40) for i in range(24)]
NEW_TOKENS = 8


def start(folder: Path, engine: str, temperature: float = 1.0, adapter: Any = None, **more: Any) -> Any:
    rollout = RolloutConfig(engine=engine, max_model_len=64, max_num_seqs=16, kv_cache_gib=0.1, threads=1, **more)
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, temperature=temperature)
    return (
        ray.remote(RolloutActor)
        .options(num_cpus=0, runtime_env={"env_vars": environment(rollout)})
        .remote(str(folder), rollout, generation, "float32", adapter)
    )


def call(actor: Any, method: str, *args: Any) -> Any:
    answer = ray.get(actor.apply.remote(getattr(RolloutActor, method), *args), timeout=150)
    assert not isinstance(answer, Failure), str(answer)
    return answer


def model_log_probs(model: Any) -> list[list[float]]:
    rows = []
    with torch.no_grad():
        for ids in SEQUENCES:
            tokens = torch.tensor([ids])
            logits = model(tokens).logits[0, :-1]
            rows.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return rows


def model_greedy(model: Any, prompt: tuple[int, ...], eos: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != eos):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def engine_greedy(actor: RolloutActor, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Runs in the actor: the same sampling path at temperature zero."""
    engine: Any = actor._engine
    sampling = engine._sampling
    engine._sampling = sampling.clone()
    engine._sampling.temperature = 0.0
    try:
        return [ids for ids, _ in engine._sample(prompts)]
    finally:
        engine._sampling = sampling


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_an_engine_follows_loaded_weights_and_two_starts_draw_differently(tiny_model: Path, engine: str) -> None:
    from transformers import AutoModelForCausalLM

    first, second = start(tiny_model, engine), start(tiny_model, engine)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    transport = ObjectPublisher()
    for actor in (first, second):
        call(actor, "load", transport.publish(0, {}))
    assert root_mean_square(call(first, "log_probs", SEQUENCES), model_log_probs(model)) < 1e-3

    draws = [[c[0].token_ids for c in call(actor, "generate", PROMPTS, 1)] for actor in (first, first, second)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert sum(x == y for x, y in zip(draws[a], draws[b], strict=True)) < len(PROMPTS) / 4
    group = call(first, "generate", [PROMPTS[0]], 4)[0]
    assert len({c.token_ids for c in group}) > 1

    old = model_log_probs(model)
    weights = {}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")):
                weights[name] = value.add_(0.05 * torch.randn_like(value))
    new = model_log_probs(model)
    assert root_mean_square(old, new) > 0.1
    assert call(first, "load", transport.publish(7, weights)) == 7 == call(first, "version")
    assert root_mean_square(call(first, "log_probs", SEQUENCES), new) < 1e-3
    assert all(c.version == 7 for row in call(first, "generate", PROMPTS[:2], 2) for c in row)
    if engine == "vllm":
        eos = model.config.eos_token_id
        tokens = ray.get(first.apply.remote(engine_greedy, PROMPTS))
        assert tokens == [model_greedy(model, p, eos) for p in PROMPTS]
    for actor in (first, second):
        ray.kill(actor)


def local_engine(folder: Path, **generation: Any) -> TransformersEngine:
    rollout = RolloutConfig(engine="transformers", max_model_len=16, max_num_seqs=64)
    return TransformersEngine(str(folder), rollout, GenerationConfig(max_new_tokens=8, **generation), "float32")


def test_a_bad_prompt_gets_no_completion_and_changes_nothing_for_the_others(tiny_model: Path) -> None:
    engine = local_engine(tiny_model)
    engine.load(3, {})
    rows = engine.generate([(), (5, 6), (5,) * 9, (10**6,), (7,)], 2)
    assert [len(row) for row in rows] == [0, 2, 0, 0, 2]


def test_completions_end_at_the_first_end_of_sequence_and_padding_changes_no_distribution(tiny_model: Path) -> None:
    engine = local_engine(tiny_model, temperature=0.05)
    engine.load(0, {})
    engine.eos_token_ids = frozenset(range(0, 320, 4))
    alone = {len(engine.generate([(9, 8, 7)], 1)[0][0].token_ids) for _ in range(3)}
    rows = engine.generate([(9, 8, 7), (1, 2, 3, 4, 5, 6, 7)], 20)
    assert {len(c.token_ids) for c in rows[0]} & alone
    for c in (c for row in rows for c in row):
        assert not any(t in engine.eos_token_ids for t in c.token_ids[:-1])
        assert c.finished == (c.token_ids[-1] in engine.eos_token_ids)
        assert c.finished or len(c.token_ids) == 8


def test_weights_that_do_not_fit_the_model_are_refused(tiny_model: Path) -> None:
    engine = local_engine(tiny_model)
    with pytest.raises(ValueError, match="no parameter"):
        engine.load(1, {"model.layers.0.self_attn.unknown": torch.zeros(1)})
    with pytest.raises(ValueError, match="shape"):
        engine.load(1, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="load"):
        engine.generate([(5,)], 1)


def test_damaged_weights_are_refused_by_the_receiver() -> None:
    weights = {"a": torch.randn(3, 2).to(torch.bfloat16), "b": torch.tensor(1.5)}
    handle = ObjectPublisher().publish(1, weights)
    received = handle.fetch()
    assert all(torch.equal(received[k], weights[k]) for k in weights)
    damaged = ObjectHandle(1, handle.names, handle.sha256, ray.put(pack({**weights, "b": torch.tensor(1.25)})))
    with pytest.raises(SyncFailed, match="checksum"):
        damaged.fetch()


@pytest.mark.parametrize("engine", ["vllm", pytest.param("transformers", marks=pytest.mark.slow)])
def test_log_probs_of_what_is_drawn_ahead_are_those_of_the_distribution_it_was_drawn_from(
    tiny_model: Path, engine: str
) -> None:
    """False: they are of another temperature, position or token, and importance weights are wrong in silence."""
    from transformers import AutoModelForCausalLM

    actor = start(tiny_model, engine, temperature=0.7, staleness=1)
    call(actor, "load", ObjectPublisher().publish(0, {}))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    assert root_mean_square(call(actor, "log_probs", SEQUENCES), model_log_probs(model)) < 1e-3  # these have none
    for prompt, (completion,) in zip(PROMPTS, call(actor, "generate", PROMPTS, 1), strict=True):
        tokens = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.no_grad():
            expected = (model(tokens).logits[0, :-1] / 0.7).log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        own = expected[len(prompt) - 1 :].tolist()
        assert completion.log_probs == pytest.approx(own, abs=2e-3)
