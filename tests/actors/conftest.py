"""A Ray of one's own for the tests of actors, with token authentication on (read when ray is imported)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["RAY_AUTH_MODE"] = "token"


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A local Ray, ended after the module's tests."""
    import ray

    # one GPU is a number to Ray: nothing here uses it
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
