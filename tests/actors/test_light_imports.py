"""Actors that compute nothing start fast: each import of torch and DeepSpeed costs its process seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["mailbox", "learner_group", "rank", "accountant", "scorer", "roles"])
def test_an_actor_without_a_model_imports_no_torch(module: str) -> None:
    script = (
        "import sys\nfrom dprlhf_ray.actors import cluster\n"
        f"import dprlhf_ray.actors.{module}\n"
        "found = {'torch', 'deepspeed', 'transformers', 'vllm'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-300:]
