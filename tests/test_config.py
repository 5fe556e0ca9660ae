"""Bad configs and bad data: each kind is refused with one clear line and exit code 2, before anything heavy starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.data.preflight import Facts, preflight
from dprlhf_ray.errors import ConfigError


def tree(**sections: Any) -> dict[str, Any]:
    """A good config, with some top-level sections replaced."""
    return {"stages": [{"privacy": {"epsilon": 8.0}}], **sections}


def stage(privacy: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return tree(stages=[{"privacy": {"epsilon": 8.0, **(privacy or {})}, **settings}])


def line_of(refused: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        refused()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and caught.value.exit_code == 2
    return message


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (tree(modle={"name": "x"}), "config: modle: unknown key; did you mean 'model'?"),
        (stage({"epsilom": 1}), "config: stages.0.privacy.epsilom: unknown key; did you mean 'epsilon'?"),
        (
            stage(algorithm={"kind": "reinforce", "clip_rnge": 0.1}),
            "config: stages.0.algorithm.clip_rnge: unknown key; did you mean 'clip_range'?",
        ),
        (tree(data={"a": {"surce": "x"}}), "config: data.a.surce: unknown key; did you mean 'source'?"),
        (stage({"steps": "many"}), "config: stages.0.privacy.steps: should be a whole number (got 'many')"),
        (tree(model="embedded"), "config: model: should be a section of keys and values (got 'embedded')"),
        (
            tree(model={"adapter": {"kind": "lorra"}}),
            "config: model.adapter.kind: should be 'lora', 'ffa_lora', 'lora_xs', 'steering' or 'full' (got 'lorra')",
        ),
        (
            tree(stages=[{"privacy": {}}]),
            "config: stages.0.privacy: epsilon is not set: give a target such as 8.0 "
            "(a missing epsilon never means no limit)",
        ),
        (tree(stages=[{}]), "config: stages.0.privacy: this key is required"),
        (stage({"epsilon": -1}), "config: stages.0.privacy.epsilon: should be greater than 0 (got -1)"),
        (stage({"epsilon": float("nan")}), "config: stages.0.privacy.epsilon: should be a finite number (got nan)"),
        (stage({"delta": 1.5}), "config: stages.0.privacy.delta: should be less than 1 (got 1.5)"),
        (
            stage(data="privte"),
            "config: stage 'rl' uses data set 'privte', which is not declared under data: ['reviews']",
        ),
        (
            stage(algorithm={"kind": "rloo"}),
            "config: stages.0.algorithm: completions_per_prompt must be at least 2 for rloo (reinforce works with 1)",
        ),
        (
            tree(rollout={"max_model_len": 64}),
            "config: rollout.max_model_len is 64, but prompts of up to 256 tokens and 24 new tokens need 280",
        ),
        (
            tree(rollout={"weights": "adapter", "engine": "transformers"}),
            "config: rollout: weights: adapter is served by vLLM only: engine is transformers; use weights: merged",
        ),
        (
            tree(rollout={"weights": "adapter"}, model={"adapter": {"kind": "full"}}),
            "config: stage 'rl': rollout.weights: adapter, but it trains all weights: use merged",
        ),
        (
            tree(rollout={"transport": "nccl"}),
            "config: rollout: transport: nccl needs GPUs: gpus_per_replica is 0; use objects, or gloo",
        ),
        (
            tree(rollout={"transport": "nccl", "gpus_per_replica": 1}),
            "config: rollout.transport: nccl needs learners on GPUs: learner.use_gpu is false",
        ),
        (
            tree(rollout={"transport": "nccl", "gpus_per_replica": 2, "tensor_parallel_size": 2}),
            "config: rollout: transport: nccl sends to engines on one GPU: with tensor_parallel_size above 1 use "
            "objects",
        ),
        (stage({"steps": True}), "config: stages.0.privacy.steps: should not be true"),
        (stage({"epsilon": "six"}), "config: stages.0.privacy.epsilon: should be a number (got 'six')"),
        ({"stages": []}, "config: stages: should have at least 1"),
        ({"stages": {"name": "rl"}}, "config: stages: should be a list, each of its items after a dash"),
        (tree(name="a/b"), "config: name: letters, digits, - and _ only (got 'a/b')"),
        (stage(kind="dpo"), "config: stages.0.kind: no such kind of stage: dpo; there are rl, sft, reward_model"),
        (
            stage({"adjacency": "replace_one"}, partition="a", data="notes")
            | {"data": {"notes": {"source": "n.jsonl", "unit_column": "id", "partitions": {"a": 0.5}}}},
            "config: stage 'rl': under replace_one a replaced unit may be of another partition, whose size would tell: "
            "use adjacency zero_out, or leave partition out",
        ),
        (
            stage({"adjacency": "add_remove", "declared_size": 900}, data="notes", kind="reward_model")
            | {"data": {"notes": {"source": "n.jsonl", "rejected": "public", "rejected_source": "p.jsonl"}}},
            "config: stage 'reward_model': rejected: public goes by a row's number, which a row more or less would "
            "change for all after it: use adjacency zero_out",
        ),
        (
            stage({"adjacency": "replace_one", "unit": "user"}, data="notes", kind="reward_model")
            | {
                "data": {
                    "notes": {
                        "source": "n.jsonl",
                        "unit_column": "id",
                        "rejected": "public",
                        "rejected_source": "p.jsonl",
                    }
                }
            },
            "config: stage 'reward_model': rejected: public goes by a row's number, which a row more or less would "
            "change for all after it: use adjacency zero_out",
        ),
        (
            tree(data={"reviews": {"source": "org/films", "split": "ALL"}}),
            "config: data.reviews.split: 'ALL' is not the plain name of a split: slices and sums could overlap unseen",
        ),
        (stage(optimizer={"betas": [True, 0.9]}), "config: stages.0.optimizer.betas: should not be true"),
        ({"stages": ["rl"]}, "config: stages.0: should be a section of keys and values (got 'rl')"),
        (
            stage(data="notes")
            | {"data": {"notes": {"source": "n.jsonl", "dataset": "open"}, "open": {"public": True}}},
            "config: data.notes.dataset: 'open' is declared public: give another name",
        ),
        (
            tree(data={"reviews": {"source": "org/films", "split": "train[:50%]"}}),
            "config: data.reviews.split: 'train[:50%]' is not the plain name of a split: slices and sums could overlap "
            "unseen",
        ),
        (
            stage({"unit": "user"}),
            "config: stage 'rl': unit user needs data.reviews.unit_column, the column of users' ids",
        ),
        (
            stage({"records_per_user": 3}),
            "config: stages.0.privacy: records_per_user means nothing for unit record: remove it",
        ),
        (
            stage({"max_batch": 500, "updates_per_draw": 2}),
            "config: stages.0.privacy: max_batch has no figure under add_remove or with updates_per_draw > 1: "
            "remove it",
        ),
        (
            stage({"max_batch": 500, "accounting": "adaptive"}),
            "config: stages.0.privacy: accounting: adaptive has no figure under replace_one or max_batch: "
            "fixed_schedule",
        ),
        (
            stage({"metrics_share": 1.0}),
            "config: stages.0.privacy.metrics_share: should be less than 1 (got 1.0)",
        ),
        (
            stage({"metrics_share": 0}),
            "config: stages.0: algorithm.baseline released_mean needs released metrics: metrics_share above 0, "
            "or constant",
        ),
        (
            stage(scorer={"kind": "python"}),
            'config: stages.0.scorer: function is required for kind python, e.g. "my_rewards:score"',
        ),
        (
            tree(ledger="sqlite:///shared/ledger.db"),
            "config: ledger: a URL means PostgreSQL (postgresql+psycopg://user@host/name): for SQLite, give a path",
        ),
        (
            tree(ledger="postgresql+psycopg://user@host/name"),
            "config: ledger_key is required with a database URL: the path of a file only you can read",
        ),
        *(
            (
                tree(ledger=url, ledger_key="/k"),
                "config: ledger: a password in it would be in config.yaml: leave it out, and set PGPASSWORD or "
                "~/.pgpass",
            )
            for url in ("postgresql+psycopg://u:s3/c@host/name", "postgresql+psycopg://u@host/name?password=s3c")
        ),
        *(
            (
                stage(scorer={"kind": "http", "sends_private_text": True, "url": url}),
                "config: stages.0.scorer.url: a secret in it would be in config.yaml: leave it out, and set "
                "DPRLHF_SCORER_TOKEN",
            )
            for url in ("https://u:s3c@host/", "https://s3c@host/", "https://host/score?api_key=s3c")
        ),
    ],
)
def test_bad_values_are_one_line_that_names_key_fault_and_remedy(bad: dict[str, Any], says: str) -> None:
    if "rollout" not in bad:
        bad = {**bad, "rollout": {"max_model_len": 512}}
    assert line_of(lambda: config_file.parse(bad)) == says


def test_bad_config_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    assert line_of(lambda: config_file.load(path)) == f"{path}: no such config file"
    path.write_text("stages: [\n  name: x: y\n")
    assert line_of(lambda: config_file.load(path)).startswith(f"{path}: line 2 is not valid YAML")
    path.write_text("- a\n")
    assert line_of(lambda: config_file.load(path)) == f"{path}: a config is a mapping of keys to values, not list"
    path.write_bytes(b"\xff\xfe\x00a")
    assert "is not valid YAML" in line_of(lambda: config_file.load(path))
    path.write_text("")
    assert "the file is empty" in line_of(lambda: config_file.load(path))
    path.write_text("name: a\nstages: []\nname: b\n")
    assert line_of(lambda: config_file.load(path)) == f"{path}: line 3 is not valid YAML: the key 'name' is there twice"
    path.write_text("? [a, b]\n: 1\n")
    assert "is not valid YAML" in line_of(lambda: config_file.load(path))
    merged = "privacy: &p {epsilon: 1.0, steps: 2}\nstages: [{privacy: {<<: *p, steps: 3}}]\n"
    path.write_text(merged.replace("privacy: &p", "x: &p"))
    assert line_of(lambda: config_file.load(path)).startswith(f"{path}: x: unknown key")  # and no key twice
    assert line_of(lambda: config_file.load(tmp_path)) == f"{tmp_path}: is a folder, give a YAML file"


def test_overrides_reach_list_items_and_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config_file.dump(config_file.parse(good(Path("embedded")))))
    config = config_file.load(path, ["stages.0.privacy.delta=1e-6", "model.adapter.rank=8"])
    assert (config.stages[0].privacy.delta, config.model.adapter.rank) == (1e-6, 8)
    assert line_of(lambda: config_file.load(path, ["model.adapter.rank"])).endswith("write it as key.subkey=value")
    assert "should be an index below 1" in line_of(lambda: config_file.load(path, ["stages.3.name=x"]))


def good(folder: Path, **sections: Any) -> dict[str, Any]:
    return tree(
        **{
            "model": {"name": str(folder)},
            "data": {"reviews": {"prompt_tokens": 5}},
            "rollout": {"max_model_len": 64},
            **sections,
        }
    )


def check(folder: Path, output: Path | None = None, available_gib: float = 64.0, **sections: Any) -> Facts:
    return preflight(config_file.parse(good(folder, **sections)), output, available_gib)


def test_preflight_accepts_a_good_config_and_knows_the_population(tiny_model: Path, tmp_path: Path) -> None:
    facts = check(tiny_model, tmp_path / "runs" / "a")
    assert facts.population == 8990
    assert facts.model is not None and facts.model.max_positions == 256
    assert facts.memory_needed is not None and 1 < facts.memory_needed < 8


def test_preflight_refuses_bad_models_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    assert "no readable" in line_of(lambda: check(missing))
    line = line_of(lambda: check(tiny_model, available_gib=2.0))
    assert "does not fit this machine: about 3.0 GiB are needed" in line and "there are 2.0 GiB" in line
    line = line_of(lambda: check(tiny_model, model={"name": str(tiny_model), "adapter": {"target_modules": ["qproj"]}}))
    assert "'qproj' matches no layer" in line and "k_proj, o_proj, q_proj, up_proj, v_proj" in line
    line = line_of(lambda: check(tiny_model, rollout={"max_model_len": 4096}))
    assert line.startswith("rollout.max_model_len: 4096 tokens, but") and line.endswith("at most 256: use at most that")


def test_preflight_refuses_bad_data_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    def with_source(path: Path | str, **settings: Any) -> str:
        reviews = {"source": str(path), "prompt_tokens": 5, **settings}
        return line_of(lambda: check(tiny_model, data={"reviews": reviews}))

    path = tmp_path / "d.jsonl"
    assert "no such file" in with_source(path)
    path.write_text("")
    assert "the data set is empty" in with_source(path)
    path.write_text('{"text": "a", "stars": 1}\n' * 500)
    assert "no column 'prompt'; its columns are: text, stars" in with_source(path)
    columns = {"prompt": "text"}
    path.write_text('{"text": "a"}\n' * 50)
    assert "expected_batch is 400, but data set 'reviews' has 50 records: use at most 50" in with_source(
        path, columns=columns
    )
    assert "no such embedded data set; there are: embedded:movie-reviews" in with_source("embedded:tweets")
    assert "evaluation needs public prompts" in with_source("embedded:public-openings")


def test_preflight_refuses_delta_of_at_least_one_over_n_unless_overridden(tiny_model: Path) -> None:
    bad = [{"privacy": {"epsilon": 8, "delta": 1e-3}}]
    line = line_of(lambda: check(tiny_model, stages=bad))
    assert "privacy.delta is 0.001, which is not below 1/N = 0.00011 for data set 'reviews' (8990 records)" in line
    bad[0]["privacy"]["allow_large_delta"] = True
    assert check(tiny_model, stages=bad).population == 8990


def test_preflight_sees_one_file_behind_two_spellings(tiny_model: Path, tmp_path: Path) -> None:
    """False: private prompts would be evaluated as public ones, or one data set be certified twice under two names."""
    (tmp_path / "x.jsonl").write_text('{"prompt": "hello"}\n' * 900)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "x.jsonl")
    mine, alias = str(tmp_path / "x.jsonl"), str(tmp_path / ".." / tmp_path.name / "link.jsonl")
    stages = [{"privacy": {"epsilon": 8}}]
    line = line_of(
        lambda: check(
            tiny_model,
            data={"reviews": {"source": mine, "prompt_tokens": 5}},
            evaluation={"source": alias},
            stages=stages,
        )
    )
    assert "evaluation needs public prompts" in line
    twice = {"reviews": {"source": mine, "prompt_tokens": 5}, "again": {"source": alias}}
    assert "are one source" in line_of(lambda: check(tiny_model, data=twice, stages=stages))


def test_preflight_refuses_a_layer_that_is_not_there(tiny_model: Path) -> None:
    adapter = {"kind": "steering", "target_modules": ["down_proj"], "layers": [1, 99]}
    assert "99 is no layer of" in line_of(
        lambda: check(tiny_model, model={"name": str(tiny_model), "adapter": adapter})
    )


def test_preflight_refuses_a_scorer_that_cannot_be_imported(tiny_model: Path) -> None:
    def with_function(name: str) -> str:
        scorer = {"kind": "python", "function": name}
        return line_of(lambda: check(tiny_model, stages=[{"privacy": {"epsilon": 8}, "scorer": scorer}]))

    assert "module 'no_such_rewards' cannot be imported" in with_function("no_such_rewards:score")
    assert "module 'math' has no function 'score'" in with_function("math:score")
    assert "write 'score' as \"package.module:function\"" in with_function("score")


def test_preflight_refuses_an_output_that_cannot_be_made(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = line_of(lambda: check(tiny_model, tmp_path / "file" / "run"))
    assert line.endswith("is a file: give a folder that can be made")


def test_preflight_starts_nothing_heavy() -> None:
    """Were torch or ray imported here, a bad config would be refused only after seconds."""
    code = "import sys, dprlhf_ray.data.preflight; print([m for m in ('torch', 'ray', 'vllm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_override_changes_one_of_the_sections_that_an_anchor_shares(tmp_path: Path) -> None:
    """False: `--set` on one stage silently changes another stage's budget."""
    path = tmp_path / "c.yaml"
    path.write_text("stages:\n- {name: a, privacy: &p {epsilon: 1.0}}\n- {name: b, privacy: *p}\n", encoding="utf-8")
    config = config_file.load(path, ["stages.0.privacy.epsilon=2.0"])
    assert [s.privacy.epsilon for s in config.stages] == [2.0, 1.0]
