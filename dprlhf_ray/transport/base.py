"""How a published weight version gets from the learner to the rollout engines.

A learner publishes a version once and gets a small `Handle`, which travels through the driver to every engine; an
engine calls `fetch` on it. Whatever happens, that ends in bounded time: with the learner's exact tensors, or an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Handle(ABC):
    """What travels in a message in place of the weights: released values only, never a record."""

    version: int
    names: tuple[str, ...]

    @abstractmethod
    def fetch(self) -> Tensors:
        """The published tensors, complete and checked; the engine's side.

        Raises:
            WeightsLost: whoever published them is gone, or has dropped this version.
            SyncFailed: they arrived damaged.
        """


class Publisher(Protocol):
    """The learner's side."""

    def publish(self, version: int, weights: Mapping[str, torch.Tensor]) -> Handle:
        """Make complete named tensors available to every engine of the cluster."""

    def close(self) -> None:
        """Publish no more; what was published may be gone."""
