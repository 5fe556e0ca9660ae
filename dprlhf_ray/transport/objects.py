"""Weights through Ray's object store: one copy per node, fetched by whoever holds the handle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import ray
import torch

from dprlhf_ray.errors import SyncFailed
from dprlhf_ray.transport.base import Handle


@dataclass(frozen=True)
class ObjectHandle(Handle):
    """A reference into the object store, with the SHA-256 of what it must resolve to."""

    sha256: str
    ref: ray.ObjectRef


class ObjectStoreTransport:
    """The `WeightTransport` for any Ray cluster."""

    def publish(self, version: int, weights: Mapping[str, torch.Tensor]) -> ObjectHandle:
        """Put CPU copies of the tensors into the object store."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        return ObjectHandle(version, tuple(tensors), checksum(tensors), ray.put(tensors))

    def receive(self, handle: Handle) -> dict[str, torch.Tensor]:
        """Fetch and verify. Raises SyncFailed when the checksum differs."""
        if not isinstance(handle, ObjectHandle):
            raise TypeError(f"a handle of another transport: {type(handle).__name__}")
        tensors: dict[str, torch.Tensor] = ray.get(handle.ref)
        if checksum(tensors) != handle.sha256:
            raise SyncFailed(f"weight version {handle.version} arrived damaged: its checksum is not the learner's")
        return tensors


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
