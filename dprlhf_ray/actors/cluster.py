"""Joining Ray: a private one on this machine, or a cluster by address; the same code runs on both."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from dprlhf_ray.actors import token
from dprlhf_ray.actors.compilers import compilers_of_this_environment
from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import ConfigError, DprlhfError
from dprlhf_ray.network import past_proxies

# before ray is imported: tokens for every connection, the second generation of Ray Train
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one more process, which tells those who listen
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that is late must not start a Ray of its own
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import ray_constants
from ray._private.utils import estimate_available_memory, resolve_object_store_memory

SHARED_MEMORY = "/dev/shm"
SHARE_OF_SHARED_MEMORY = 0.95
START_TRIES = 3


@contextmanager
def session(config: RunConfig) -> Iterator[str]:
    """Connect to Ray; yields the namespace of this run's actors. What was started here ends here."""
    namespace = f"dprlhf-{config.name}"
    if ray.is_initialized():  # a notebook, a test, or a Ray job that connected before
        yield namespace
        return
    compilers_of_this_environment()
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
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    token.prepare(address)
    past_proxies()
    with ExitStack() as ended:
        if address:
            ended.callback(ray.shutdown)
            ray.init(address=address, **common)
        else:
            ended.enter_context(_private_ray(config, common))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # how schedulers stop a job: the same as Ctrl-C
        yield namespace


@contextmanager
def _private_ray(config: RunConfig, common: dict[str, Any]) -> Iterator[None]:
    """A Ray of this run's own, for this user and this machine only.

    Raises:
        ConfigError: its object store does not fit into memory. DprlhfError: it did not start.
    """
    memory = object_store_memory()
    scratch = tempfile.mkdtemp(prefix="ray-")
    overflow = tempfile.mkdtemp(prefix="ray-", dir=SHARED_MEMORY)
    failed = True
    try:
        with _loopback_only():
            _start_local(
                num_cpus=max(os.cpu_count() or 1, config.learner.num_workers),
                include_dashboard=config.ray.dashboard,
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                _system_config={"automatic_object_spilling_enabled": False},  # no private text spilled to disk
                _temp_dir=f"{scratch}/r",  # Ray opens its folder to everybody (0777); the one around it stays closed
                _plasma_directory=SHARED_MEMORY,
                object_store_memory=memory,
                object_spilling_directory=overflow,  # what a full object store maps to files is in memory too
                **common,
            )
            _check_gpus(config)
            yield
        failed = False
    finally:
        ray.shutdown()
        shutil.rmtree(overflow, ignore_errors=True)
        if not failed:
            remove_scratch(scratch)


def _check_gpus(config: RunConfig) -> None:
    """On one machine nobody adds GPUs: what waits for one would wait for ever."""
    needed = float(config.learner.num_workers * config.learner.use_gpu)
    if any(s.kind == "rl" for s in config.stages):
        needed += config.rollout.gpus_per_replica + config.rollout.scorer_gpus
    if needed > (there := ray.cluster_resources().get("GPU", 0)):
        raise ConfigError(
            f"learner.use_gpu, rollout.gpus_per_replica, rollout.scorer_gpus: {needed:g} GPUs are needed for learners, "
            f"one replica and the scorer, this machine has {there:g}: ask for less, or name a cluster (ray.address)"
        )


def object_store_memory() -> int:
    """Bytes of the object store of a private Ray: Ray's own choice, and no more than shared memory has free. Beyond
    that Ray would put the store, and with it private text, on a disk.

    Raises:
        ConfigError: less is free than Ray takes.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    fits = int(SHARE_OF_SHARED_MEMORY * free)
    if fits < ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES:
        raise ConfigError(
            f"{SHARED_MEMORY}: {free >> 20} MiB are free, too little for Ray's object store, which would go to a disk: "
            "make room for 1 GiB or more, in a container by --shm-size=4g"
        )
    return min(fits, resolve_object_store_memory(estimate_available_memory()))


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray, as part of a cluster, replaces 127.0.0.1 by the machine's own address, and then listens on all of them. With
    this switch (for systems on which it has no clusters) it does not, nor do the processes that it starts."""
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    variable = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable


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
