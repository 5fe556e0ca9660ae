"""How a published weight version gets from the learner to the rollout engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Handle:
    """What travels in a message in place of the weights."""

    version: int
    names: tuple[str, ...]


class WeightTransport(Protocol):
    """Publish once, receive anywhere in the cluster."""

    def publish(self, version: int, weights: Mapping[str, torch.Tensor]) -> Handle:
        """Make complete named tensors available; the learner's side."""

    def receive(self, handle: Handle) -> dict[str, torch.Tensor]:
        """Get them back, checked; the engine's side. Raises SyncFailed when they are damaged."""
