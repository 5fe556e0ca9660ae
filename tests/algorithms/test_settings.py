"""What an algorithm section may say: combinations without meaning are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from dprlhf_ray import config_file
from dprlhf_ray.config import AlgorithmConfig
from dprlhf_ray.errors import ConfigError


def _parse(**algorithm: Any) -> AlgorithmConfig:
    config = config_file.parse({"stages": [{"privacy": {"mode": "clip_only"}, "algorithm": algorithm}]})
    return config.stages[0].algorithm  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("algorithm", "line"),
    [
        (
            {"kind": "reinforce_pp"},
            ": completions_per_prompt must be at least 2 for reinforce_pp (reinforce works with 1)",
        ),
        (
            {"kind": "reinforce", "clip_range_high": 0.3},
            ": clip_range_high means nothing for reinforce: remove it (it is for ppo, grpo, reinforce_pp)",
        ),
        (
            {"kind": "rloo", "completions_per_prompt": 2, "clip_range": 0.1},
            ": clip_range means nothing for rloo: remove it (it is for ppo, grpo, reinforce_pp)",
        ),
        (
            {"kind": "grpo", "completions_per_prompt": 2, "gae_lambda": 0.9},
            ": gae_lambda means nothing for grpo: remove it (it is for ppo)",
        ),
        (
            {"kind": "ppo", "baseline": "constant"},
            ": baseline means nothing for ppo: remove it (it is for reinforce)",
        ),
        (
            {"kind": "ppo", "kl_in": "loss"},
            ": kl_in means nothing while kl_coef is 0: remove it, or set kl_coef above 0",
        ),
        (
            {"kind": "ppo", "kl_schedule": "linear"},
            ": kl_schedule means nothing while kl_coef is 0: remove it, or set kl_coef above 0",
        ),
        (
            {"kind": "reinforce", "kl_coef": 0.1, "kl_estimator": "k1"},
            ": kl_estimator k1 in the loss has no gradient in expectation: use k2 or k3, or kl_in: reward",
        ),
        (
            {"kind": "reinforce", "importance_cap": 0.5},
            ".importance_cap: should be greater than or equal to 1 (got 0.5)",
        ),
        ({"kind": "reinforce", "advantage_scale": 0.0}, ".advantage_scale: should be greater than 0 (got 0.0)"),
        (
            {"kind": "reinforce", "normalisation": "batch_tokens"},
            ".normalisation: should be 'own_length', 'group_tokens', 'max_length' or 'sum' (got 'batch_tokens')",
        ),
    ],
)
def test_a_combination_without_meaning_is_one_line(algorithm: dict[str, Any], line: str) -> None:
    """False: a setting that does nothing, or no gradient, is taken silently, or the line does not say what is right."""
    with pytest.raises(ConfigError) as e:
        _parse(**algorithm)
    assert str(e.value) == f"config: stages.0.algorithm{line}"


@pytest.mark.parametrize(
    ("algorithm", "place", "estimator"),
    [
        ({"kind": "ppo"}, "reward", "k1"),
        ({"kind": "ppo", "kl_in": "loss"}, "loss", "k3"),
        ({"kind": "grpo", "completions_per_prompt": 2}, "loss", "k3"),
        ({"kind": "reinforce_pp", "completions_per_prompt": 2}, "loss", "k2"),
        ({"kind": "reinforce_pp", "completions_per_prompt": 2, "kl_in": "reward"}, "reward", "k1"),
        ({"kind": "reinforce", "kl_in": "reward", "kl_estimator": "k3"}, "reward", "k3"),
    ],
)
def test_without_a_word_the_kl_is_that_of_the_kind_s_paper(
    algorithm: dict[str, Any], place: str, estimator: str
) -> None:
    """False: a default changes the method that the kind's name stands for."""
    config = _parse(**algorithm, kl_coef=0.1)
    assert (config.kl_place, config.kl_kind) == (place, estimator)


def test_a_written_config_is_read_again() -> None:
    """False: the defaults that `dump` writes for other kinds are refused as settings without meaning."""
    import yaml

    for kind in ("ppo", "reinforce"):
        config = config_file.parse({"stages": [{"privacy": {"mode": "clip_only"}, "algorithm": {"kind": kind}}]})
        assert config_file.parse(yaml.safe_load(config_file.dump(config))) == config
