"""A run as a Ray job: what travels to the cluster, under which name, and how it is followed, stopped and continued.

Only the config and the modules of `python` scorers travel. Ray keeps what is uploaded in its own store and on disks of
the nodes, so data never do: they are read where they lie on the cluster, and every path in the config is absolute.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dprlhf_ray import config_file
from dprlhf_ray.config import RLStage, RunConfig
from dprlhf_ray.data.columns import SUFFIXES
from dprlhf_ray.errors import ConfigError, DprlhfError, place_of
from dprlhf_ray.models.embedded import looks_local
from dprlhf_ray.network import holds_secret, past_proxies, travels_open
from dprlhf_ray.run_dir import write_atomically

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entry point of a job
RUN_KEY = "dprlhf_run"  # metadata of a job: the name of its run
_PATHS = ("ledger", "ledger_key", "ledger_anchor")
_PATIENCE = 60.0  # seconds for a lost connection to come back


@dataclass(frozen=True)
class Ended:
    """How a job ended. exit_code: of `dprlhf run`; 130 where it was stopped."""

    status: str
    exit_code: int


def check_paths(tree: dict[str, Any], output: Path | None) -> None:
    """In a job the working directory is a copy that ends with it: paths are absolute.

    Args:
        tree: the config as it was written, before its paths were completed.

    Raises:
        ConfigError: the first relative path.
    """
    if output is None or not output.is_absolute():
        where = "is not given" if output is None else f"is {output}"
        raise ConfigError(f"--output: {where}; a job's working directory ends with it: name an absolute folder")
    for key, value in _paths(tree):
        if not value.startswith("/") and "://" not in value:
            raise ConfigError(f"{key}: {value} is no absolute path: nodes of the cluster read it where it lies there")


def _paths(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, value) of everything in a config that names a file or folder."""
    yield from ((key, tree[key]) for key in _PATHS if isinstance(tree.get(key), str))
    found: list[tuple[str, Any]] = [("evaluation.source", (tree.get("evaluation") or {}).get("source"))]
    for name, data in (tree.get("data") or {}).items():
        found += [(f"data.{name}.{key}", (data or {}).get(key)) for key in ("source", "rejected_source")]
    found += [("model.name", (tree.get("model") or {}).get("name"))]
    for i, stage in enumerate(tree.get("stages") or []):
        found += _scorer_models((stage or {}).get("scorer"), f"stages.{i}.scorer")
    for key, value in found:
        if isinstance(value, str) and not value.startswith("embedded"):
            folder = key.endswith(("model", "name"))
            here = looks_local(value) or Path(value).expanduser().exists()
            if here if folder else (value.endswith(SUFFIXES) or value.startswith((".", "/", "~"))):
                yield key, value


def _scorer_models(scorer: Any, key: str) -> list[tuple[str, Any]]:
    """Of a scorer and, if it is an ensemble, of its members."""
    if not isinstance(scorer, dict):
        return []
    members = scorer.get("members") or []
    inner = [m for i, member in enumerate(members) for m in _scorer_models(member, f"{key}.members.{i}")]
    return [(f"{key}.model", scorer.get("model")), *inner]


def modules(config: RunConfig) -> list[Path]:
    """Files, or package folders, of the functions that `python` scorers name: those that are not installed.

    Raises:
        ConfigError: one that cannot be found from here.
    """
    names: dict[str, str] = {}
    for i, stage in enumerate(config.stages):
        for scorer in stage.scorer.flat() if isinstance(stage, RLStage) else ():
            if scorer.function:
                names.setdefault(scorer.function.partition(":")[0].partition(".")[0], f"stages.{i}.scorer.function")
    found = []
    for name, key in names.items():
        with _working_directory_first():
            spec = importlib.util.find_spec(name)
        if spec is None or not (spec.origin or spec.submodule_search_locations):
            raise ConfigError(f"{key}: no module {name!r} here: submit from the folder that has {name}.py")
        path = Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))
        if not _installed(path):
            found.append(path)
    return found


@contextmanager
def _working_directory_first() -> Iterator[None]:
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _installed(path: Path) -> bool:
    """Part of an installation, which the cluster's nodes have too."""
    ours = Path(__file__).parent
    if str(path) in ("built-in", "frozen"):
        return True
    roots = [ours, *(Path(p) for p in {*sysconfig.get_paths().values()})]
    return any(path.resolve().is_relative_to(root.resolve()) for root in roots if root != Path(sys.prefix))


def pack(config: RunConfig, folder: Path) -> None:
    """Write what travels: the resolved config, and the code of `python` scorers, without what lies beside it."""
    write_atomically(folder / "config.yaml", config_file.dump(config))
    for path in modules(config):
        for source in [path] if path.is_file() else _code(path):
            target = folder / source.relative_to(path.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def _code(package: Path) -> Iterator[Path]:
    """Python files of a package: no links, nothing hidden, no folder without code."""
    for root, folders, files in os.walk(package, followlinks=False):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        yield from (p for f in files if f.endswith(".py") and not (p := Path(root, f)).is_symlink())


def client(address: str) -> Any:
    """Of the cluster's job server.

    Raises:
        ConfigError: nobody answers there, it wants another token, or there is none that only this user can write.
    """
    from dprlhf_ray.actors import token
    from dprlhf_ray.actors.cluster import ray  # first: sets Ray's environment, which its job client reads

    for chatty in ("ray.dashboard.modules", "ray._private.runtime_env"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    job_submission = importlib.import_module(f"{ray.__name__}.job_submission")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address {address}: write the dashboard's address, with http://; it is not Ray's own port")
    if holds_secret(address):
        raise ConfigError("--address: a secret in the URL would be shown and logged: leave it out")
    past_proxies()
    if travels_open(address):
        print(
            f"dprlhf: --address {address}: the cluster's token travels unencrypted, for whoever is on the way: use "
            "https, or an SSH tunnel to 127.0.0.1",
            file=sys.stderr,
            flush=True,
        )
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        if os.environ.get(variable, address) != address:
            raise ConfigError(f"--address: {variable} is set and would win over it: unset it")
    token.prepare(address)
    try:
        return job_submission.JobSubmissionClient(address)
    except Exception as e:  # ConnectionError, RuntimeError with the server's answer, ValueError of a bad address
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ConfigError(
            f"--address {address}: no job server there ({reason[:160]}); it is the dashboard's address, e.g. "
            "http://127.0.0.1:8265, and needs the cluster's token (RAY_AUTH_TOKEN_PATH)"
        ) from None


def jobs_of(server: Any, name: str) -> list[Any]:
    """All jobs of a run, oldest first."""
    found = [j for j in server.list_jobs() if (j.metadata or {}).get(RUN_KEY) == name and j.submission_id]
    return sorted(found, key=lambda j: j.start_time or 0)


def active(server: Any, name: str) -> Any | None:
    """The job of a run that is pending or runs."""
    return next((j for j in jobs_of(server, name) if not j.status.is_terminal()), None)


def submit(server: Any, config: RunConfig, output: Path, variables: dict[str, str]) -> str:
    """Start a run as a job, or continue it: what is in its folder stays spent. Returns the job's id, which no other job
    of this run has: of two that are submitted at once, Ray refuses one.

    Raises:
        ConfigError: a module of a scorer is not here.
    """
    used = {j.submission_id for j in jobs_of(server, config.name)}
    number = 1 + max((int(m[1]) for i in used if (m := re.search(r"-(\d+)$", i))), default=0)
    with tempfile.TemporaryDirectory(prefix="dprlhf-") as folder:
        pack(config, Path(folder))
        command = ["dprlhf", "run", "config.yaml", "--output", str(output), "--resume"]
        return str(
            server.submit_job(
                entrypoint=shlex.join(command),
                submission_id=f"dprlhf-{config.name}-{number}",
                runtime_env={"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1", **variables}},
                metadata={RUN_KEY: config.name, "output": str(output)},
            )
        )


def follow(server: Any, job: str, show: Callable[[str], None]) -> Ended:
    """Print a job's output until it ends; a connection that is lost is made again.

    Raises:
        DprlhfError: it does not come back.
    """
    import aiohttp  # here: every command would pay for it

    shown: list[int] = [0]  # characters; a broken connection must not forget them
    lost: float | None = None
    while True:
        try:
            asyncio.run(_tail(server, job, shown, show))
            info = server.get_job_info(job)
            lost = None
            if info.status.is_terminal():
                code = 130 if info.status == "STOPPED" else info.driver_exit_code
                return Ended(str(info.status), (0 if info.status == "SUCCEEDED" else 1) if code is None else int(code))
        except (OSError, RuntimeError, aiohttp.ClientError) as e:  # requests' errors are OSErrors
            lost = lost or time.monotonic()
            if time.monotonic() - lost > _PATIENCE:
                raise DprlhfError(f"job {job}: the job server is gone; the job may go on ({place_of(e)})") from None
        time.sleep(0.5)


async def _tail(server: Any, job: str, shown: list[int], show: Callable[[str], None]) -> None:
    """Print what comes after the first `shown[0]` characters, which grows with it."""
    seen = 0
    async for part in server.tail_job_logs(job):
        new = part[max(0, shown[0] - seen) :]
        seen += len(part)
        shown[0] = max(seen, shown[0])
        if new:
            show(new)


def stop(server: Any, name: str) -> str | None:
    """Ask the active job of a run to end, and wait until it has; returns its id (None: there is none).

    Raises:
        DprlhfError: it is still ending.
    """
    job = active(server, name)
    if job is None:
        return None
    server.stop_job(job.submission_id)
    deadline = time.monotonic() + _PATIENCE
    while not server.get_job_status(job.submission_id).is_terminal():
        if time.monotonic() > deadline:
            raise DprlhfError(f"job {job.submission_id} was asked to stop, and is still ending")
        time.sleep(0.2)
    return str(job.submission_id)
