"""Weights over a process group: NCCL from GPU to GPU, gloo between hosts without one. One code, two backends.

The publisher serves each engine in a group of two, the learner's first rank and that engine, which lives for one
transfer. An engine that dies or hangs holds up its own transfer and nobody else's, for at most `PATIENCE` seconds; a
fleet that grows or shrinks needs no new group. The handle, which travels through Ray with its authentication, says what
must arrive: names, dtypes, shapes and a fingerprint of each tensor.

vLLM's own weight-transfer engines are not used: they have no time limit, and a fused matrix of which only a part is
sent (an adapter on q and v) is not written as a whole.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from dprlhf_ray.errors import SyncFailed, WeightsLost
from dprlhf_ray.transport.base import Handle, Tensors

Backend = Literal["nccl", "gloo"]
PATIENCE = 120.0  # seconds for one engine's transfer
_GREETING = 10.0  # seconds until a publisher that does not even take a connection counts as dead
_POLL = 0.05  # seconds
_ASKED = "asked"  # queue of requests in the store


@dataclass(frozen=True)
class TensorSpec:
    """What must arrive. fingerprint: see `fingerprint`."""

    dtype: str
    shape: tuple[int, ...]
    fingerprint: tuple[int, int]


@dataclass(frozen=True)
class GroupHandle(Handle):
    """Where to ask for the tensors. patience: seconds."""

    backend: Backend
    host: str
    port: int
    specs: tuple[TensorSpec, ...]
    patience: float

    def fetch(self) -> Tensors:
        deadline, here = time.monotonic() + self.patience, self._greet()
        try:
            return self._fetch(here, deadline)
        except (RuntimeError, OSError):  # torch's distributed errors, a connection cut, too late
            self._greet()
            raise

    def _greet(self) -> str:
        """This side's address on the way to the publisher. WeightsLost: it is gone (TCPStore would try for minutes)."""
        try:
            with socket.create_connection((self.host, self.port), timeout=_GREETING) as connection:
                return str(connection.getsockname()[0])
        except OSError as e:
            raise WeightsLost(f"who published weight version {self.version} is gone ({type(e).__name__})") from None

    def _fetch(self, here: str, deadline: float) -> Tensors:
        store = _connect(self.host, self.port, deadline)
        name = secrets.token_hex(8)
        store.queue_push(_ASKED, json.dumps({"name": name, "version": self.version}))
        store.wait([f"answer/{name}"], timedelta(seconds=_left(deadline)))
        if store.get(f"answer/{name}") != b"yes":
            raise WeightsLost(f"weight version {self.version} is no longer held by the learner")
        group = _pair(self.backend, here, store, name, 1, deadline)
        tensors: Tensors = {}
        with _ending(group):
            for key, spec in zip(self.names, self.specs, strict=True):
                value = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=_device(self.backend))
                _broadcast(group, value, deadline)
                if fingerprint(value) != spec.fingerprint:
                    raise SyncFailed(f"weight version {self.version}: {key} arrived damaged")
                tensors[key] = value
        return tensors


class GroupPublisher:
    """Holds the newest versions and serves them from threads beside the learner's work.

    Args:
        host: address of this node that engines reach; nothing listens on another.
        keep: how many versions stay: an engine that starts late asks for the fleet's version, which may be older than
            the learner's.
        patience: seconds for one engine's transfer.
    """

    def __init__(self, backend: Backend, host: str, keep: int = 2, patience: float = PATIENCE) -> None:
        self._backend, self._host, self._keep, self._patience = backend, host, keep, patience
        self._held: OrderedDict[int, Tensors] = OrderedDict()
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock() if backend == "nccl" else contextlib.nullcontext()
        self._closed = threading.Event()
        with socket.create_server((host, 0)) as listening:
            self._port = int(listening.getsockname()[1])
            self._store: Any = dist.TCPStore(
                host, self._port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=patience),
                master_listen_fd=listening.detach(),
            )  # fmt: skip
        self._thread = threading.Thread(target=self._serve, daemon=True, name="weights")
        self._thread.start()

    def publish(self, version: int, weights: Mapping[str, torch.Tensor]) -> GroupHandle:
        """Hold copies of the tensors for engines that ask."""
        device = _device(self._backend)
        with self._lock:
            self._held.pop(version, None)
            while len(self._held) >= self._keep:
                self._held.popitem(last=False)
        tensors = {n: v.detach().to(device, copy=True).contiguous() for n, v in weights.items()}
        specs = tuple(
            TensorSpec(str(v.dtype).removeprefix("torch."), tuple(v.shape), fingerprint(v)) for v in tensors.values()
        )
        with self._lock:
            self._held[version] = tensors
        return GroupHandle(version, tuple(tensors), self._backend, self._host, self._port, specs, self._patience)

    def close(self) -> None:
        """Serve no more."""
        self._closed.set()
        self._thread.join()
        self._store = None  # its port is closed
        with self._lock:
            self._held.clear()

    def _serve(self) -> None:
        store = _connect(self._host, self._port, time.monotonic() + self._patience)
        while not self._closed.is_set():
            if not store.queue_len(_ASKED):
                self._closed.wait(_POLL)
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError):  # not a request of ours
                asked = json.loads(store.queue_pop(_ASKED, block=False))
                arguments = (str(asked["name"]), int(asked["version"]))
                threading.Thread(target=self._send, args=arguments, daemon=True, name="weights-send").start()

    def _send(self, name: str, version: int) -> None:
        """One engine's transfer. Whatever ends it, ends only it: the engine says what it did not get."""
        with self._lock:
            tensors = self._held.get(version)
        deadline = time.monotonic() + self._patience
        with contextlib.suppress(RuntimeError, ValueError, OSError), self._one_at_a_time:
            _left(deadline)  # who waited so long for others has given up
            store = _connect(self._host, self._port, deadline)
            store.set(f"answer/{name}", "no" if tensors is None else "yes")
            if tensors is None:
                return
            group = _pair(self._backend, self._host, store, name, 0, deadline)
            with _ending(group):
                for value in tensors.values():
                    _broadcast(group, value, deadline)


def fingerprint(value: torch.Tensor) -> tuple[int, int]:
    """Sum and position-weighted sum (modulo 2^64) of a tensor's 8-byte words, on its own device: a check against
    accidents, at memory speed. Who may connect at all is a matter of the network (docs: the ports)."""
    data = value.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % 8:
        data = torch.cat([data, data.new_zeros(8 - data.numel() % 8)])
    words = data.view(torch.int64)
    places = torch.arange(1, 2 * words.numel(), 2, device=words.device)
    return int(words.sum()), int((words * places).sum())


def _device(backend: Backend) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError("a weight transfer took too long")
    return left


def _connect(host: str, port: int, deadline: float) -> Any:
    return dist.TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_left(deadline))
    )


def _pair(backend: Backend, here: str, store: Any, name: str, rank: int, deadline: float) -> Any:
    """A process group of two, listening on `here`; rank 0 sends."""
    own, limit = dist.PrefixStore(f"pair/{name}", store), timedelta(seconds=_left(deadline))
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=10 * PATIENCE)  # ours is shorter: torch's would end the process
        return dist.ProcessGroupNCCL(own, rank, 2, options)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices, options._timeout = [dist.ProcessGroupGloo.create_device(hostname=here)], limit
    return dist.ProcessGroupGloo(own, rank, 2, options)


def _broadcast(group: Any, value: torch.Tensor, deadline: float) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    work = group.broadcast([value], options)
    while not work.is_completed():
        _left(deadline)
        time.sleep(0.0005)
    work.wait()


@contextlib.contextmanager
def _ending(group: Any) -> Any:
    """A group that failed is aborted: its peer may never answer."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            group.abort()
        raise
    with contextlib.suppress(RuntimeError):
        group.shutdown()
