"""Joining Ray: a private one on this machine, or a cluster by address; the same code runs on both."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import DprlhfError

# before ray is imported: tokens for every connection, the second generation of Ray Train
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that is late must not start a Ray of its own
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray

SHARED_MEMORY = "/dev/shm"
START_TRIES = 3


@contextmanager
def session(config: RunConfig) -> Iterator[str]:
    """Connect to Ray; yields the namespace of this run's actors. What was started here ends here."""
    namespace = f"dprlhf-{config.name}"
    if ray.is_initialized():  # a notebook, a test, or a Ray job that connected before
        yield namespace
        return
    worker_env = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not config.learner.use_gpu:
        threads = config.learner.threads or max(1, (os.cpu_count() or 1) // config.learner.num_workers)
        # Ray would set one thread per CPU that an actor reserves. The allocator keeps freed memory: a step allocates
        # the same large tensors again and again, and giving them back costs a page fault for every 4 KiB.
        worker_env |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(threads),
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        }
    common: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": worker_env},
    }
    scratch, overflow = "", None
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **common)
    else:
        scratch = tempfile.mkdtemp(prefix="ray-")
        # What a full object store would map to files goes to memory too. Where there is no such folder (not Linux), Ray
        # uses the scratch folder.
        overflow = tempfile.mkdtemp(prefix="ray-", dir=SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
        _start_local(
            num_cpus=max(os.cpu_count() or 1, config.learner.num_workers),
            include_dashboard=config.ray.dashboard,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            _system_config={"automatic_object_spilling_enabled": False},  # no private text spilled to disk
            _temp_dir=scratch,
            object_spilling_directory=overflow,
            **common,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # how schedulers stop a job: the same as Ctrl-C
    failed = True
    try:
        yield namespace
        failed = False
    finally:
        ray.shutdown()
        if overflow:
            shutil.rmtree(overflow, ignore_errors=True)
        if scratch and not failed:
            remove_scratch(scratch)


def _start_local(**settings: Any) -> None:
    """Start Ray here. It gives its own processes 30 s, which a busy machine may need more than once.

    Raises:
        DprlhfError: it did not start.
    """
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as e:  # a bare one; nothing private was read yet
            ray.shutdown()
            if not left:
                reason = (str(e).splitlines() or [type(e).__name__])[0]
                raise DprlhfError(f"Ray did not start on this machine; is it overloaded or full? {reason}") from None


def remove_scratch(folder: str) -> None:
    """Logs and sockets of a local cluster that is gone; those of a failed run stay for the operator."""
    shutil.rmtree(folder, ignore_errors=True)
