"""vLLM serves the learner's adapter on the untouched base model, one version after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dprlhf_ray.actors.sync_check import root_mean_square
from dprlhf_ray.config import AdapterConfig, ModelConfig
from dprlhf_ray.models import adapters
from dprlhf_ray.models.policy import load_policy
from dprlhf_ray.transport.objects import ObjectPublisher
from tests.actors.test_engines import PROMPTS, SEQUENCES, call, model_log_probs, start

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "steering"])
def test_a_served_adapter_answers_as_the_learner_does_at_each_of_three_versions(tiny_model: Path, kind: str) -> None:
    """False: vLLM keeps an older adapter, scales it otherwise, or leaves a layer out, and the policy that draws is not
    the one that learns."""
    config = ModelConfig(dtype="float32", adapter=AdapterConfig(kind=kind, rank=2, alpha=5.0, layers=(1, 3)))
    policy = load_policy(tiny_model, config, 0)
    actor = start(tiny_model, "vllm", weights="adapter", adapter=config.adapter)
    seen = []
    for version in range(3):
        handle = ObjectPublisher().publish(version, adapters.served_factors(policy.model))
        assert call(actor, "load", handle) == version
        seen.append(call(actor, "log_probs", SEQUENCES))
        assert root_mean_square(seen[-1], model_log_probs(policy.model)) < 1e-3
        assert all(c.version == version for row in call(actor, "generate", PROMPTS[:2], 2) for c in row)
        with torch.no_grad():
            for p in policy.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn_like(p))
    assert root_mean_square(seen[0], seen[1]) > 0.01 < root_mean_square(seen[1], seen[2]), (
        "the adapters changed nothing"
    )
