"""Runs under fault in this process, on a Ray that the module shares, and what has to hold after each."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dprlhf_ray import config_file, pipeline
from dprlhf_ray.actors.cluster import ray
from dprlhf_ray.config import RunConfig
from dprlhf_ray.stage_run import Roles
from tests.chaos import oracle
from tests.chaos.plan import Case
from tests.end_to_end.runs import RECORDS, World, forms, leaks


def configured(world: World, name: str, steps: int, **changes: Any) -> RunConfig:
    """A small run under its own name; changes: as `World.tree`, or of the stage ("stage__privacy__steps")."""
    own = {k: v for k, v in changes.items() if "__" not in k}
    inner = {k: v for k, v in changes.items() if "__" in k and not k.startswith("stage__")}
    tree = world.tree(steps, **inner) | {"name": name} | own
    for key, value in changes.items():
        if key.startswith("stage__"):
            section, _, field = key.removeprefix("stage__").partition("__")
            tree["stages"][0].setdefault(section, {})[field] = value
    tree["learner"].setdefault("max_failures", 30)
    return config_file.parse(tree)


def run(
    config: RunConfig, root: Path, resume: bool = False, on_step: Callable[[int, Roles], None] | None = None
) -> BaseException | None:
    """Run; returns what ended it early. Whatever happens, its actors are gone."""
    try:
        pipeline.run(config, root, resume, on_step)
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        e.__traceback__ = None  # its frames hold the actors
        e.__context__ = None
        return e
    finally:
        clear(f"dprlhf-{config.name}")
    return None


def clear(namespace: str) -> None:
    """End what is left of a run, and wait until its names are free: a driver's process would have ended."""
    gc.collect()
    deadline = time.monotonic() + 30
    while named := [a["name"] for a in ray.util.list_named_actors(True) if a["namespace"] == namespace]:
        assert time.monotonic() < deadline, named
        for name in named:
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name, namespace=namespace))
        time.sleep(0.1)


def check(
    case: Case,
    config: RunConfig,
    root: Path,
    world: World,
    done: bool = True,
    ledger: tuple[str, str] | tuple[None, None] = (None, None),
) -> oracle.Seen:
    """AssertionError where a rule of the oracle is broken; what it saw."""
    seen = oracle.look(case.lines(), root, *ledger)
    assert oracle.problems(seen, config.stages[0].privacy.updates_per_draw) == []
    if done:
        assert oracle.certificate_problems(root, config, RECORDS, len(seen.charged)) == []
    assert leaks([root], private(world)) == []
    return seen


def private(world: World) -> list[bytes]:
    """Every form of what must not be anywhere."""
    return [n for mark in world.marks for n in forms(mark)]
