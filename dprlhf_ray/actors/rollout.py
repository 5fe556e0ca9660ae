"""The rollout actor: a thin Ray shell around one engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dprlhf_ray.actors.engines import build_engine
from dprlhf_ray.config import AdapterConfig, GenerationConfig, RolloutConfig
from dprlhf_ray.errors import WeightsLost, place_of
from dprlhf_ray.records import Completion
from dprlhf_ray.transport import Handle


@dataclass(frozen=True)
class Failure:
    """What went wrong in a replica: an error's type and place, never its message: that may quote private values.

    weights_lost: it is not the replica that failed: the published weights are gone.
    """

    what: str
    weights_lost: bool = False

    def __str__(self) -> str:
        return self.what


class RolloutActor:
    """One replica. The fleet calls its methods through `apply`, as `FaultTolerantActorManager` does."""

    def __init__(
        self,
        model_path: str,
        rollout: RolloutConfig,
        generation: GenerationConfig,
        dtype: str,
        adapter: AdapterConfig | None = None,
    ) -> None:
        self._engine = build_engine(model_path, rollout, generation, dtype, adapter or AdapterConfig())

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `func(self, ...)`. An error comes back as a `Failure`; the process lives on and nothing is logged."""
        try:
            return func(self, *args, **kwargs)
        except Exception as error:  # every kind: a raised error would carry its message into Ray's logs
            return Failure(place_of(error), isinstance(error, WeightsLost))

    def ping(self) -> str:
        """Answers once the engine is built and idle."""
        return "pong"

    def pid(self) -> int:
        """Process id on the replica's node, for the operator."""
        return os.getpid()

    def version(self) -> int | None:
        """The weight version in use."""
        return self._engine.version

    def load(self, handle: Handle) -> int:
        """Receive and load a published weight version; returns it."""
        self._engine.load(handle.version, handle.fetch())
        return handle.version

    def generate(self, prompts: Sequence[Sequence[int]], completions_per_prompt: int) -> list[list[Completion]]:
        """See `Engine.generate`."""
        return self._engine.generate(prompts, completions_per_prompt)

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.log_probs`."""
        return self._engine.log_probs(sequences)
