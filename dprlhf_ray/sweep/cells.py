"""Which runs a sweep consists of: one config, at every epsilon and as every control, once per seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dprlhf_ray import config_file
from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import ConfigError

NO_CLIP = 1e6  # a clip norm that no gradient reaches
CONTROLS = ("clip_only", "public_only", "non_private")

Tree = dict[str, Any]
Change = Callable[[Tree], None]


@dataclass(frozen=True)
class Cell:
    """One run. name: of its budget or control. epsilon: target of every private stage (None: a control)."""

    name: str
    epsilon: float | None
    seed: int
    config: RunConfig

    @property
    def folder(self) -> str:
        return f"{self.name}-seed{self.seed}"


def cells(
    config: RunConfig, epsilons: Sequence[float], controls: Sequence[str], seeds: Sequence[int],
    public_data: str | None = None,
) -> list[Cell]:  # fmt: skip
    """All runs, the cells side by side within each seed, so that an interrupted sweep has whole rounds.

    - epsilon E: target of every stage in mode dp.
    - clip_only: these stages without noise. non_private: and with a clip norm that no gradient reaches.
    - public_only: with `public_data`, these stages on that source instead, in mode public; else without them.

    A seed is public randomness only. Noise and draws are fresh in every run.

    Raises:
        ConfigError: as `check`; a control that this config cannot be turned into.
    """
    check(config, epsilons, controls, seeds, public_data)
    kinds: list[tuple[str, float | None, Change]] = [(f"epsilon-{e:g}", e, _at(e)) for e in epsilons]
    kinds += [(name, None, _control(name, public_data)) for name in controls]
    found = []
    for seed in seeds:
        for name, epsilon, change in kinds:
            tree = config.model_dump(mode="json")
            tree |= {"name": f"{config.name}-{name}-seed{seed}", "seed": seed}  # actors of runs side by side differ
            change(tree)
            found.append(Cell(name, epsilon, seed, config_file.parse(tree, f"sweep: cell {name}")))
    return found


def check(
    config: RunConfig, epsilons: Sequence[float], controls: Sequence[str], seeds: Sequence[int], public_data: str | None
) -> None:
    """Refuse, in one line, what is no sweep: ConfigError."""
    shared = [k for k in ("ledger", "ledger_key", "ledger_anchor") if getattr(config, k) is not None]
    shared += [f"data.{name}.budget" for name, d in config.data.items() if d.budget is not None]
    if shared:
        raise ConfigError(f"{shared[0]}: the runs of a sweep have ledgers of their own, and pay apart: leave it out")
    if not epsilons and not controls:
        raise ConfigError("sweep: nothing to run: give --epsilon, e.g. 1,2,4,8, or --controls")
    if unknown := sorted(set(controls) - set(CONTROLS)):
        raise ConfigError(f"--controls: there is no {unknown[0]!r}; there are {', '.join(CONTROLS)}")
    for option, values in (("--epsilon", epsilons), ("--controls", controls), ("--seeds", seeds)):
        if len(set(values)) != len(values):
            raise ConfigError(f"{option}: one value is there twice: give each once")
    if not seeds:
        raise ConfigError("--seeds: none given: give at least one, e.g. 0")
    if not any(s.privacy.mode == "dp" for s in config.stages):
        raise ConfigError("stages: none is in mode dp, so that no budget can be swept: set privacy.mode: dp")
    if public_data is not None:
        if "public_only" not in controls:
            raise ConfigError("--public-data: is for the control public_only: add it to --controls, or leave it out")
        if public_data not in config.data or not config.data[public_data].public:
            raise ConfigError(f"--public-data: {public_data!r} is no data set declared public under data")
    elif "public_only" in controls and not any(s.privacy.mode == "public" for s in config.stages):
        raise ConfigError("--controls public_only: no stage is public: name a public data set with --public-data")


def _at(epsilon: float) -> Change:
    return lambda tree: _private(tree, epsilon=epsilon)


def _control(name: str, public_data: str | None) -> Change:
    if name == "clip_only":
        return lambda tree: _private(tree, **_NO_NOISE)
    if name == "non_private":
        return lambda tree: _private(tree, **_NO_NOISE, clip_norm=NO_CLIP)
    return lambda tree: _public_only(tree, public_data)


_NO_NOISE: Tree = {"mode": "clip_only", "epsilon": None, "accounting": "fixed_schedule"}
_PUBLIC: Tree = {
    "mode": "public", "epsilon": None, "accounting": "fixed_schedule", "unit": "record", "records_per_user": None,
    "adjacency": "zero_out", "declared_size": None, "max_batch": None,
}  # fmt: skip


def _private(tree: Tree, **changes: Any) -> None:
    """Change the private stages' privacy."""
    for stage in tree["stages"]:
        if stage["privacy"]["mode"] == "dp":
            stage["privacy"] |= changes


def _public_only(tree: Tree, public_data: str | None) -> None:
    if public_data is None:
        tree["stages"] = [s for s in tree["stages"] if s["privacy"]["mode"] == "public"]
        return
    for stage in tree["stages"]:
        if stage["privacy"]["mode"] != "public":
            stage |= {"data": public_data, "partition": None, "privacy": stage["privacy"] | _PUBLIC}
