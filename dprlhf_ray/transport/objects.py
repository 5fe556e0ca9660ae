"""Weights through Ray's object store: shared memory, one copy per node, mapped and not copied by those who read it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import ray
import torch

from dprlhf_ray.errors import SyncFailed, WeightsLost
from dprlhf_ray.transport.base import Handle, Tensors

PATIENCE = 240.0  # seconds for one engine's transfer
Packed = dict[str, tuple[str, tuple[int, ...], np.ndarray]]  # name -> dtype, shape, bytes: what Ray maps without a copy


@dataclass(frozen=True)
class ObjectHandle(Handle):
    """A reference into the object store, with the SHA-256 of what it must resolve to."""

    sha256: str
    ref: ray.ObjectRef

    def fetch(self) -> Tensors:
        try:
            tensors = unpack(ray.get(self.ref, timeout=PATIENCE))
        except ray.exceptions.ObjectLostError as e:
            raise WeightsLost(f"weight version {self.version} is gone ({type(e).__name__})") from None
        if checksum(tensors) != self.sha256:
            raise SyncFailed(f"weight version {self.version} arrived damaged: its checksum is not the learner's")
        return tensors


class ObjectPublisher:
    """The `Publisher` for any Ray cluster."""

    def publish(self, version: int, weights: Mapping[str, torch.Tensor]) -> ObjectHandle:
        """Put CPU copies of the tensors into the object store."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        return ObjectHandle(version, tuple(tensors), checksum(tensors), ray.put(pack(tensors)))

    def close(self) -> None:
        """Nothing to do: an object lives as long as a handle to it and its owner."""


def pack(tensors: Mapping[str, torch.Tensor]) -> Packed:
    return {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape), _bytes(t)) for n, t in tensors.items()}


def unpack(packed: Packed) -> Tensors:
    """Tensors on the packed memory, for reading only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return {
            name: torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
            for name, (dtype, shape, data) in packed.items()
        }


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value).data)
    return digest.hexdigest()


def _bytes(value: torch.Tensor) -> np.ndarray:
    data: np.ndarray = value.reshape(-1).view(torch.uint8).numpy()
    return data
