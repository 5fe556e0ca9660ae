"""`dprlhf submit`, `dprlhf stop`, `dprlhf scale`: a run on a cluster, from outside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dprlhf_ray import config_file
from dprlhf_ray.errors import ConfigError, DprlhfError, Interrupted

Address = Annotated[str, typer.Option(help="the cluster's dashboard, e.g. http://127.0.0.1:8265")]


def submit(
    config: Annotated[Path, typer.Argument(help="YAML config, as for dprlhf run")],
    output: Annotated[Path, typer.Option(help="run directory: absolute, on storage that all nodes share")],
    address: Address = "http://127.0.0.1:8265",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override one key, as for dprlhf run")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="pass this environment variable on; whoever has the cluster's token can read it"),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-wait", help="print the job's output until it ends")] = True,
) -> None:
    """Run a config as a Ray job, and follow it; its exit code is this command's.

    The same command again continues a run that ended early: its run directory and its ledger. While a job of this name
    is active it is followed, not started twice. Only config and Python scorers travel; data are read where they lie.
    """
    from dprlhf_ray import submission

    parsed = config_file.load(config, overrides)
    submission.check_paths(config_file.tree(config, overrides), output)
    if parsed.ray.address not in (None, "auto"):
        raise ConfigError(f"ray.address: {parsed.ray.address}: a job uses its own cluster: leave it out, or set auto")
    missing = [name for name in env or [] if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: is not set here")
    server = submission.client(address)
    running = submission.active(server, parsed.name)
    if running is None:
        job = submission.submit(server, parsed, output, {name: os.environ[name] for name in env or []})
        typer.echo(f"job {job} of run {parsed.name}; stop it with: dprlhf stop {parsed.name} --address {address}")
    else:
        job = running.submission_id
        if (other := running.metadata.get("output")) != str(output):
            raise ConfigError(
                f"name: job {job} of another run called {parsed.name!r} is active, with --output {other}: name this "
                "one differently, or stop that one"
            )
        typer.echo(f"job {job} of run {parsed.name} is active: following it; this config was not looked at")
    if not follow:
        return
    try:
        ended = submission.follow(server, job, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        raise Interrupted(
            f"not followed any more; job {job} goes on. Stop it with: dprlhf stop {parsed.name} --address {address}"
        ) from None
    if ended.exit_code:
        failure = DprlhfError(f"job {job}: {ended.status.lower()}, exit code {ended.exit_code}")
        failure.exit_code = ended.exit_code
        raise failure
    typer.echo(f"job {job}: {ended.status.lower()}")


def stop(
    name: Annotated[str, typer.Argument(help="name of the run, as in its config")],
    address: Address = "http://127.0.0.1:8265",
) -> None:
    """Stop a submitted run. `dprlhf submit` with the same config continues it."""
    from dprlhf_ray import submission

    job = submission.stop(submission.client(address), name)
    if job is None:
        raise ConfigError(f"{name}: no job of this run is active at {address}")
    typer.echo(f"job {job} was stopped; dprlhf submit with the same config and --output continues the run")


def scale(
    run_dir: Annotated[Path, typer.Argument(help="run directory of a run that goes on")],
    rollouts: Annotated[int, typer.Option(help="replicas of the rollout fleet", min=1)],
    wait: Annotated[float, typer.Option(help="seconds to wait for the run's answer")] = 10.0,
) -> None:
    """Set the number of rollout replicas of a run, while it goes on; learners are not touched.

    Missing replicas ask Ray for their GPUs, so that an autoscaler adds nodes; those too many end after their work.
    """
    from dprlhf_ray.actors import control

    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: not a run directory (no config.yaml)")
    try:
        answer = control.ask_for(run_dir, rollouts, wait)
    except OSError as e:
        raise ConfigError(f"{run_dir}: cannot write there ({e.strerror})") from None
    if answer is None:
        raise DprlhfError(
            f"{run_dir}: nobody answered within {wait:g} s; the request is kept, and counts when an rl stage runs there"
        )
    typer.echo(
        f"{run_dir}: {answer['replicas']} replicas wanted, {answer['healthy']} serve, {answer['starting']} are starting"
    )
