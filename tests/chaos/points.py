"""Points of a run where a fault can strike, in whatever process it passes them, and a journal of every passage.

A point is a function or method of `dprlhf_ray`, wrapped when its module is imported (`TARGETS`). Each passage is
written to the journal before anything else happens: the independent count that `oracle.py` holds against the ledger.
Which fault strikes where is in the plan (`plan.py`); a fault that struck is in the journal too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import importlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

FOLDER = "DPRLHF_CHAOS"  # environment: the folder of plan.json

# module -> (function or method, point). Facts of a passage beside the attempt are made in `_facts`.
TARGETS: dict[str, list[tuple[str, str]]] = {
    "dprlhf_ray.privacy.ledger": [("Ledger.charge", "accountant.charge"), ("Ledger.declare", "accountant.declare")],
    "dprlhf_ray.actors.accountant": [
        ("AccountantActor.__init__", "accountant.start"),
        ("AccountantActor.redeem", "accountant.redeem"),
        ("AccountantActor.head", "accountant.head"),
        ("AccountantActor.composition", "accountant.composition"),
    ],
    "dprlhf_ray.actors.learner": [
        ("Learner.__init__", "learner.start"),
        ("Learner.restore", "learner.restore"),
        ("Learner.update", "learner.update"),
        ("noise_gradient", "learner.noise"),
        ("Learner._write_and_step", "learner.step"),
        ("Learner.weights", "learner.publish"),
        ("Learner.save", "learner.save"),
        ("Learner.export", "learner.export"),
    ],
    "dprlhf_ray.models.adapters": [("frozen_parts", "learner.half_saved")],
    "dprlhf_ray.actors.rollout": [
        ("RolloutActor.__init__", "replica.start"),
        ("RolloutActor.load", "replica.load"),
        ("RolloutActor.log_probs", "replica.check"),
        ("RolloutActor.generate", "replica.generate"),
    ],
    "dprlhf_ray.actors.scorer": [
        ("ScorerActor.__init__", "scorer.start"),
        ("ScorerActor.score", "scorer.score"),
    ],
    "dprlhf_ray.transport.objects": [("ObjectHandle.fetch", "weights.fetch"), ("unpack", "weights.unpack")],
    "dprlhf_ray.stages.scoring": [("PythonFunction.score", "scorer.function")],
    "dprlhf_ray.stage_run": [("poisson_draw", "driver.draw"), ("_bring_up", "driver.bring_up")],
    "dprlhf_ray.actors.fleet": [("Fleet.generate", "driver.generate"), ("Fleet.sync", "driver.sync")],
    "dprlhf_ray.actors.learner_group": [("LearnerGroup.call", "driver.call"), ("LearnerGroup.stop", "driver.stop")],
    "dprlhf_ray.observability.metrics": [("MetricsLog.write", "driver.metrics")],
    "dprlhf_ray.run_dir": [("RunDir.finish", "driver.finish")],
    "dprlhf_ray.pipeline": [("write_certificate", "driver.certificate"), ("write_report", "driver.report")],
}


# ------------------------------------------------------------------------------------------------------- arming


def arm() -> None:
    """Wrap the points of every module of `TARGETS`: of those that are imported now, of others when they are."""
    for name, points in TARGETS.items():
        if name in sys.modules:
            _wrap_all(sys.modules[name], points)
    sys.meta_path.insert(0, _Finder())


def disarm() -> None:
    """Undo `arm` in this process."""
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
    for name, points in TARGETS.items():
        for path, _ in points if name in sys.modules else []:
            owner, attribute = _owner(sys.modules[name], path)
            wrapped = vars(owner)[attribute]
            if hasattr(wrapped, "chaos_original"):
                setattr(owner, attribute, wrapped.chaos_original)


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps a module's points right after it was executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in TARGETS:
            return None
        others = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        spec = next((s for f in others if (s := f.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _wrap_all(module, TARGETS[name])

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _owner(module: ModuleType, path: str) -> tuple[Any, str]:
    *classes, attribute = path.split(".")
    return functools.reduce(getattr, classes, module), attribute


def _wrap_all(module: ModuleType, points: list[tuple[str, str]]) -> None:
    for path, point in points:
        owner, attribute = _owner(module, path)
        original = vars(owner)[attribute]
        if not hasattr(original, "chaos_original"):
            setattr(owner, attribute, _wrapped(original, point))


def _wrapped(original: Callable[..., Any], point: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if FOLDER not in os.environ:
            return original(*args, **kwargs)
        facts = _facts(point, args, kwargs)
        passing(point, "before", facts, args, None)
        result = original(*args, **kwargs)
        if point == "accountant.charge":
            facts["attempt"] = result.attempt
        return passing(point, "after", facts, args, result)

    wrapper.chaos_original = original  # type: ignore[attr-defined]
    return wrapper


def _facts(point: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a fault's `where` may ask for."""
    if point == "accountant.charge":
        return {"attempt": args[0].spent(args[1]) + 1}
    if point == "learner.noise":
        return {"attempt": args[1].attempt, "updates": args[1].updates}
    if point == "learner.update":
        return {"attempt": args[2], "rank": args[0].rank}
    if point == "learner.step":
        return {"rank": args[0].rank}
    if point == "learner.save":
        return {"attempt": args[1], "rank": args[0].rank}
    if point == "driver.call":
        return {"method": args[1]}
    if point == "driver.metrics":
        return {"attempt": args[2]}
    if point == "driver.generate":
        return {"public": len(args[1]) == 8}
    return {}


# ------------------------------------------------------------------------------------------------------ passages


def passing(point: str, phase: str, facts: dict[str, Any], args: tuple[Any, ...], result: Any) -> Any:
    """Note the passage, and let a planned fault strike. Returns the result, or what a fault makes of it."""
    try:
        with open(os.path.join(os.environ[FOLDER], "plan.json"), encoding="utf-8") as f:
            plan = json.load(f)
    except FileNotFoundError:  # between two cases
        return result
    struck = None
    with journal(plan["journal"]) as (known, write):
        charged = max((e["attempt"] for e in known if e["point"] == "accountant.charge" and e["phase"] == "after"),
                      default=0)  # fmt: skip
        passage = (
            {"point": point, "phase": phase, "attempt": charged}
            | facts
            | {"pid": os.getpid(), "time": round(time.time(), 2)}
        )
        write(passage)
        for fault in plan["faults"]:
            if all(passage.get(k) == v for k, v in fault["where"].items()):
                times = sum(e["point"] == "fault" and e["phase"] == fault["id"] for e in known)
                if times < fault["times"]:
                    struck = fault
                    write({"point": "fault", "phase": fault["id"], "attempt": passage["attempt"], "pid": os.getpid()})
                    break
    return result if struck is None else strike(struck["action"], plan["journal"], args, result)


@contextlib.contextmanager
def journal(path: str) -> Iterator[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """What is in the journal, and a function that appends to it; for one process at a time."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with open(path, encoding="utf-8") as f:
            known = [json.loads(line) for line in f]
        yield known, lambda line: void(os.write(descriptor, (json.dumps(line) + "\n").encode()))
    finally:
        os.close(descriptor)


def void(_: object) -> None:
    """Nothing."""


# -------------------------------------------------------------------------------------------------------- faults


def strike(action: str, journal_path: str, args: tuple[Any, ...], result: Any) -> Any:
    """What a fault does; "name" or "name:argument"."""
    name, _, argument = action.partition(":")
    if name == "signal":  # to this process
        os.kill(os.getpid(), getattr(signal, argument))
        time.sleep(0.2)
    elif name == "kill":  # the living processes of a role
        for pid in living(journal_path, argument):
            os.kill(pid, signal.SIGKILL)
            while alive(pid):
                time.sleep(0.01)
    elif name == "hang":  # the living processes of a role, for ever
        for pid in living(journal_path, argument):
            os.kill(pid, signal.SIGSTOP)
    elif name == "sleep":
        time.sleep(float(argument))
    elif name == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif name == "quote":  # as careless libraries do: the private argument is in the message
        raise ValueError(f"cannot process {_texts(args)}")
    elif name == "call":  # module:function(args, result) -> result
        module, _, function = argument.partition(":")
        return getattr(importlib.import_module(module), function)(args, result)
    else:
        raise ValueError(f"no such action: {action}")
    return result


def living(journal_path: str, role: str) -> list[int]:
    """Processes of a role that passed a point and live."""
    with open(journal_path, encoding="utf-8") as f:
        pids = {e["pid"] for e in map(json.loads, f) if e["point"].startswith(f"{role}.")}
    return sorted(p for p in pids if p != os.getpid() and alive(p))


def alive(pid: int) -> bool:
    """A process of Ray's that is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as f:
            state = f.read().rpartition(")")[2].split()[0]
        with open(f"/proc/{pid}/cmdline", encoding="utf-8") as f:
            return state != "Z" and "ray" in f.read()
    except OSError:
        return False


def _texts(args: tuple[Any, ...]) -> str:
    """Private texts and token ids in a call's arguments, as plain text."""

    def plain(x: Any) -> str:
        if isinstance(x, (list, tuple)):
            return " ".join(map(plain, x))
        if isinstance(x, (str, int)):
            return str(x)
        return " ".join(plain(getattr(x, k)) for k in ("prompt", "text", "token_ids") if hasattr(x, k))

    return plain(args[1:2])
