"""A whole run with the shipped defaults (vLLM, LoRA): it leaves what it promises, and nothing private."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dprlhf_ray import pipeline
from dprlhf_ray.config import RunConfig
from dprlhf_ray.observability.metrics import read_metrics
from dprlhf_ray.stage_run import Roles
from tests.end_to_end.rewards import FAILS_ON, score
from tests.end_to_end.runs import World, attempts, final_version, forms, leaks, token_forms

STEPS = 3
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=1 << 27)
params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
sequences = json.loads(sys.argv[2])
out = llm.generate([{"prompt_token_ids": s} for s in sequences], params, use_tqdm=False)
rows = [[e[t].logprob for t, e in zip(s[1:], o.prompt_logprobs[1:])] for s, o in zip(sequences, out)]
open(sys.argv[3], "w").write(json.dumps(rows))
"""


@dataclass
class Seen:
    """What the run had in memory. private: (prompt ids, completion) pairs; memory: the learner's last log-probs."""

    config: RunConfig
    root: Path
    private: list[tuple[tuple[int, ...], Any]] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    memory: list[list[float]] = field(default_factory=list)


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    seen = Seen(world.config(STEPS, rollout__engine="vllm"), tmp_path_factory.mktemp("run") / "out")

    def watch(attempt: int, roles: Roles) -> None:
        if attempt == 1:
            generate = roles.fleet.generate

            def keep(prompts: Any, count: int) -> Any:
                rows = generate(prompts, count)
                seen.private += [(tuple(p), c) for p, row in zip(prompts, rows, strict=True) for c in row]
                return rows

            roles.fleet.generate = keep  # type: ignore[method-assign]
        if attempt == STEPS:
            seen.sequences = [list(s) for s in roles.fleet.check_sequences]
            seen.memory = roles.learners.call("publish")[3]

    with pytest.MonkeyPatch.context() as patch:  # the logs stay: they are searched
        patch.setattr("dprlhf_ray.actors.cluster.remove_scratch", lambda folder: None)
        pipeline.run(seen.config, seen.root, on_step=watch)
    return seen


def log_probs(model: Any, sequences: list[list[int]]) -> list[list[float]]:
    rows = []
    for ids in sequences:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].float()
        rows.append(logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return rows


def close(a: list[list[float]], b: list[list[float]]) -> bool:
    """Within 1e-3 nats everywhere: float32 in another order of operations."""
    return all(np.allclose(x, y, atol=1e-3, rtol=0) for x, y in zip(a, b, strict=True))


def test_the_run_directory_is_complete_and_the_ledger_and_certificate_agree_on_the_planned_epsilon(done: Seen) -> None:
    files = ("config.yaml", "ledger.db", "certificate.json", "certificate.md", "metrics.jsonl", "report.html",
             "evaluation-rl.json", "models/rl/adapter/adapter_model.safetensors",
             "models/rl/merged/model.safetensors", "models/rl/merged/tokenizer.json")  # fmt: skip
    assert [f for f in files if not (done.root / f).is_file()] == []
    certificate = json.loads((done.root / "certificate.json").read_text())
    (stage,) = certificate["stages"]
    target = done.config.stages[0].privacy.epsilon
    assert target is not None and 0.9 * target < stage["epsilon"]["pld"] <= target
    assert certificate["certified"] and stage["attempts_charged"] == STEPS
    assert attempts(done.root) == list(range(1, STEPS + 1)) and final_version(done.root) == STEPS


def test_every_released_metric_says_where_it_comes_from(done: Seen) -> None:
    rows = read_metrics(done.root)
    assert [r["attempt"] for r in rows] == list(range(1, STEPS + 1))
    for metric in [m for r in rows for m in r["metrics"]]:
        expected = "noised" if metric["name"].startswith("private/") else "accounting"
        assert metric["origin"] == expected and (metric["std"] > 0) == (expected == "noised"), metric


def test_the_adapter_moved_and_opens_three_ways_with_the_log_probs_of_the_learner(
    done: Seen, world: World, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = done.root / "models" / "rl"
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    moved = [float(v.abs().max()) for k, v in tensors.items() if "lora_B" in k]
    assert len(moved) == 8 and min(moved) > 0, "four layers, two matrices each"

    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    untrained = log_probs(base, done.sequences)
    merged = log_probs(AutoModelForCausalLM.from_pretrained(folder / "merged"), done.sequences)
    adapter = log_probs(PeftModel.from_pretrained(base, folder / "adapter"), done.sequences)
    answer = tmp_path / "rows.json"
    command = [sys.executable, "-c", VLLM, str(folder / "merged"), json.dumps(done.sequences), str(answer)]
    subprocess.run(command, check=True, env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    served = json.loads(answer.read_text())

    assert not close(untrained, done.memory), "training changed nothing that these sequences show"
    assert close(merged, done.memory) and close(adapter, done.memory) and close(served, done.memory)


def test_nothing_private_is_in_any_file_of_the_run_or_of_ray(done: Seen, world: World, scratch: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.model)
    texts = world.private_ids(tokenizer)
    private = [(ids, c) for ids, c in done.private if ids in texts]
    assert len(private) > 20, "the run drew almost nothing: this test would see no leak"
    assert any(FAILS_ON in texts[ids] for ids, _ in private), "no record made the scorer fail"
    needles = [n for mark in world.marks for n in forms(mark)] + [n for ids in texts for n in token_forms(ids)]
    needles += [n for _, c in private if len(c.text) > 12 for n in forms(c.text)]
    needles += [n for _, c in private if len(c.token_ids) > 6 for n in token_forms(c.token_ids)]
    rewards = [score(texts[ids], c.text) for ids, c in private if FAILS_ON not in texts[ids]]
    needles += [n for r in rewards for n in (repr(r)[:13].encode(), np.float64(r).tobytes())]
    sessions = list(scratch.glob("ray-*/r/session_*/logs"))
    assert sessions, "Ray's session folder is elsewhere: nothing was searched"
    assert leaks([done.root, scratch], needles) == []
