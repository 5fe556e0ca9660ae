"""Values that may leave: each carries how it came to be releasable."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from torch import Tensor

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

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def release_means(noised: NoisedSum, names: tuple[str, ...], scales: Tensor, step: DPStep) -> list[Released]:
    """Means of per-unit metrics: noised sum / public expected batch, times the public scale of each entry."""
    means = noised.value.cpu() / step.expected_batch
    std = noised.std / step.expected_batch
    return [
        Released(f"private/{n}", float(m * s), "noised", float(std * s))
        for n, m, s in zip(names, means, scales, strict=True)
    ]
