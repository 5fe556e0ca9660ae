"""Values that may leave: each carries how it came to be releasable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from dprlhf_ray.privacy.mechanism import DPStep
from dprlhf_ray.privacy.noise import NoisedSum

Origin = Literal["noised", "public_prompts", "accounting", "config"]


@dataclass(frozen=True)
class Released:
    """One metric that may be written to a released file.

    origin: noised (a charged Gaussian release), public_prompts (computed on public data with released weights),
    accounting (public parameters of the ledger), config (a public constant). std: standard deviation of its noise.
    """

    name: str
    value: float
    origin: Origin
    std: float = 0.0

    def __post_init__(self) -> None:
        _check_number(self.name, self.value)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Operational:
    """One figure for the operator (terminal, dashboard): throughput, times, restarts. Never in a released file."""

    name: str
    value: float

    def __post_init__(self) -> None:
        _check_number(self.name, self.value)


def only(kind: type, values: Iterable[object]) -> None:
    """Raise TypeError unless all values are of `kind` (Released or Operational): nothing else is shown or written."""
    for v in values:
        if not isinstance(v, kind):
            raise TypeError(f"only {kind.__name__.lower()} values can be logged here, not {type(v).__name__}")


def release_means(noised: NoisedSum, scales: Mapping[str, float], step: DPStep) -> list[Released]:
    """Means of per-unit metrics: noised sum / public expected batch, times the public scale of each named entry."""
    means = (noised.value / step.expected_batch).tolist()
    std = noised.std / step.expected_batch
    return [
        Released(f"private/{name}", mean * scale, "noised", std * scale)
        for mean, (name, scale) in zip(means, scales.items(), strict=True)
    ]


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name}: a plain number can be logged, not {type(value).__name__}")
