"""A rehearsal: a Ray cluster of several nodes on this machine, with tokens, without a GPU.

    python cluster/local.py --nodes 3

It prints where the job server listens, then stays in the foreground; Ctrl-C ends all of it. Every port is free and on
127.0.0.1. Settings are those of launcher.yaml as far as one machine has a use for them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dprlhf_ray.actors import token

HOST = "127.0.0.1"
PATIENCE, TRIES = 120.0, 3  # seconds for a node to come up, and how often it may try
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # As part of a cluster Ray replaces 127.0.0.1 by the machine's own address, and listens on all of them. So it is
    # told that there are no clusters here, as is who connects; only `ray start` of a further node is not.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
START = """
from ray._private import ray_constants, services
from ray.scripts.scripts import main
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
main()
"""


@dataclass
class LocalCluster:
    """address: of Ray itself; jobs: of the job server and dashboard. nodes: processes, the head first."""

    address: str
    jobs: str
    folder: Path
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind((HOST, 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()


@contextmanager
def cluster(nodes: int, cpus: int, labels: Sequence[str] = ()) -> Iterator[LocalCluster]:
    """A head with `cpus` CPUs and nodes - 1 workers with as many each; ends everything it started.

    Args:
        labels: of the workers, in order, e.g. "dprlhf-role=rollouts".

    Raises:
        RuntimeError: a node did not come up. ConfigError: Ray's token is in other hands.
    """
    token.prepare(None)
    gcs, jobs = free_ports(2)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    (folder / "overflow").mkdir()
    found = LocalCluster(f"{HOST}:{gcs}", f"http://{HOST}:{jobs}", folder)
    try:
        head = ["--head", f"--port={gcs}", f"--dashboard-port={jobs}", f"--dashboard-host={HOST}"]
        head += ['--system-config={"automatic_object_spilling_enabled": false}', "--labels=dprlhf-role=head"]
        _start(found, [*head, f"--ray-client-server-port={free_ports(1)[0]}"], cpus)
        for i in range(nodes - 1):
            label = [f"--labels={labels[i]}"] if i < len(labels) else []
            _start(found, [f"--address={found.address}", *label], cpus)
        yield found
    finally:
        for node in reversed(found.nodes):
            end(node)
        shutil.rmtree(folder, ignore_errors=True)


def end(node: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    """End a node: `ray start --block` ends its Ray processes with it, and a group's kill those that are left."""
    node.send_signal(how)
    with suppress(subprocess.TimeoutExpired):
        node.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def _start(found: LocalCluster, options: Sequence[str], cpus: int) -> None:
    """Start a node and wait until it is part of the cluster. Ray gives it 30 s, which a busy machine may need twice."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | ENVIRONMENT
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    for attempt in range(TRIES):
        log = found.folder / f"node-{len(found.nodes)}-{attempt}.log"
        with log.open("wb") as out:
            node = subprocess.Popen(
                _command(found, options, cpus), env=environment, stdout=out, stderr=out, start_new_session=True
            )
        found.nodes.append(node)
        deadline = time.monotonic() + PATIENCE
        while node.poll() is None and time.monotonic() < deadline:
            if "Ray runtime started" in log.read_text(errors="replace"):
                return
            time.sleep(0.2)
        end(found.nodes.pop())
    raise RuntimeError(f"a Ray node did not come up:\n{log.read_text(errors='replace')[-2000:]}")


def _command(found: LocalCluster, options: Sequence[str], cpus: int) -> list[str]:
    agent, agent_grpc, runtime_env, metrics = free_ports(4)
    command = [sys.executable, "-c", START, "start", "--block", *options]
    command += [f"--node-ip-address={HOST}", f"--num-cpus={cpus}", "--num-gpus=0", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    command += [f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}"]
    command += [f"--object-store-memory={256 << 20}", f"--object-spilling-directory={found.folder}/overflow"]
    return command + ([f"--temp-dir={found.folder}/ray"] if "--head" in options else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="that each node says it has")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with cluster(given.nodes, given.cpus) as found:
        example = f"dprlhf submit configs/quickstart.yaml --output $PWD/runs/submitted --address {found.jobs}"
        print(f"{given.nodes} nodes; job server and dashboard: {found.jobs}; Ray: {found.address}")
        print(f"the token is in ~/.ray/auth_token; for example: {example}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ending the nodes", flush=True)


if __name__ == "__main__":
    main()
