"""The `dprlhf` command: parse, call one function, print. Heavy libraries are imported inside the commands."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dprlhf_ray import __version__
from dprlhf_ray import config as cfg
from dprlhf_ray.errors import ConfigError, DprlhfError, Interrupted
from dprlhf_ray.run_dir import check_run_dir

app = typer.Typer(
    help="Reinforcement learning from human feedback on private data, with a differential-privacy guarantee.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ledger_app = typer.Typer(help="What was spent, and whether the ledger is whole.", no_args_is_help=True)
data_app = typer.Typer(help="The embedded model and data.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
app.add_typer(data_app, name="data")

Config = Annotated[Path, typer.Argument(help="YAML config, e.g. configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override one key: --set stages.0.privacy.epsilon=4")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="run directory (default: runs/<name>)")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue after an interruption; spent steps stay spent")
    ] = False,
) -> None:
    """Run the configured stages with progress, an epsilon meter and ETA.

    Exit codes: 0 done, 1 a failure that no setting explains, 2 bad config or input, 3 budget exhausted, 4 ledger
    damaged or fenced, 130 interrupted.
    """
    parsed = cfg.load(config, overrides)
    folder = output or Path("runs") / parsed.name
    from dprlhf_ray.data.preflight import preflight

    check_run_dir(folder, parsed, resume)
    preflight(parsed, folder)  # before the heavy imports of the pipeline
    if not parsed.learner.use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would say so on standard output
    from dprlhf_ray import pipeline

    try:
        result = pipeline.run(parsed, folder, resume)
    except KeyboardInterrupt:
        again = "".join(f" --set {shlex.quote(item)}" for item in overrides or [])
        raise Interrupted(
            f"interrupted; continue with: dprlhf run {config}{again} --output {folder} --resume"
        ) from None
    typer.echo(
        f"\nNext: open {result.run_dir / 'report.html'}; dprlhf certificate {folder}; dprlhf ledger show {folder};\n"
        f"      dprlhf generate {folder / 'models' / parsed.stages[-1].name / 'merged'} --prompt 'The film'; "
        "your own data: README.md"
    )


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML config; or give the four numbers below")] = None,
    overrides: Overrides = None,
    epsilon: Annotated[float | None, typer.Option(help="target epsilon")] = None,
    delta: Annotated[float | None, typer.Option(help="delta")] = None,
    sampling_rate: Annotated[float | None, typer.Option(help="q in (0, 1]")] = None,
    steps: Annotated[int | None, typer.Option(help="T, number of draws")] = None,
    updates_per_draw: Annotated[int, typer.Option(help="K, updates on one draw")] = 1,
    adjacency: Annotated[str, typer.Option(help="zero_out, add_remove or replace_one")] = "zero_out",
    as_json: Json = False,
) -> None:
    """Noise multiplier for a target epsilon, and the expected signal and cost per step, before anything runs."""
    from dprlhf_ray.privacy import accounting

    if config is not None:
        _print_plan(_plan_config(cfg.load(config, overrides)), as_json)
        return
    missing = [
        n
        for n, v in (("--epsilon", epsilon), ("--delta", delta), ("--sampling-rate", sampling_rate), ("--steps", steps))
        if v is None
    ]
    if missing or epsilon is None or delta is None or sampling_rate is None or steps is None:
        raise ConfigError(f"plan: give a config, or also {', '.join(missing)}")
    step = _step(0.0, sampling_rate, steps, updates_per_draw, adjacency)
    sigma = accounting.calibrate(step, epsilon, delta, allow_large_delta=True)
    report = accounting.epsilon(replace(step, noise_multiplier=sigma), delta, allow_large_delta=True)
    _print_plan([{"noise_multiplier": sigma, "pld": report.pld, "rdp": report.rdp, "delta": delta}], as_json)


@app.command()
def epsilon(
    noise_multiplier: Annotated[float, typer.Option(help="sigma, relative to the clip norm")],
    sampling_rate: Annotated[float, typer.Option(help="q in (0, 1]")],
    steps: Annotated[int, typer.Option(help="T, number of draws")],
    delta: Annotated[float, typer.Option(help="delta")],
    updates_per_draw: Annotated[int, typer.Option(help="K, updates on one draw")] = 1,
    adjacency: Annotated[str, typer.Option(help="zero_out, add_remove or replace_one")] = "zero_out",
) -> None:
    """Epsilon of T Poisson-subsampled Gaussian draws, by PLD and RDP, as JSON."""
    from dprlhf_ray.privacy import accounting

    step = _step(noise_multiplier, sampling_rate, steps, updates_per_draw, adjacency)
    report = accounting.epsilon(step, delta, allow_large_delta=True)
    typer.echo(json.dumps({"pld": report.pld, "rdp": report.rdp}))


@ledger_app.command("show")
def ledger_show(
    where: Annotated[str, typer.Argument(help="run directory, ledger file or database URL")],
    as_json: Json = False,
) -> None:
    """What was declared and spent, by stage."""
    from dprlhf_ray.privacy import accounting
    from dprlhf_ray.privacy.ledger import Ledger

    view = Ledger.read(_ledger(where))
    rows = []
    for s in view.schedules.values():
        spent = None if s.step.noise_multiplier == 0 else accounting.spent(s.step, s.spent, s.delta)
        rows.append({"stage": s.stage, "data_set": s.dataset, "attempts": s.spent, "planned": s.step.steps,
                     "epsilon_spent": spent, "epsilon_target": s.epsilon, "delta": s.delta})  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"head": view.head, "epoch": view.epoch, "entries": len(view.entries), "stages": rows}))
        return
    for r in rows:
        meter = (
            "no guarantee (clip only)"
            if r["epsilon_spent"] is None
            else f"epsilon {r['epsilon_spent']:.3f} of {r['epsilon_target']:g}"
        )
        typer.echo(
            f"{r['stage']} on {r['data_set']}: {r['attempts']} of {r['planned']} draws, {meter}, delta {r['delta']:g}"
        )
    typer.echo(f"{len(view.entries)} entries, epoch {view.epoch}, head {view.head}")


@ledger_app.command("verify")
def ledger_verify(where: Annotated[str, typer.Argument(help="run directory, ledger file or database URL")]) -> None:
    """Check the whole hash chain; exit code 4 when it is damaged."""
    from dprlhf_ray.privacy.ledger import Ledger

    view = Ledger.read(_ledger(where))
    typer.echo(f"whole: {len(view.entries)} entries, head {view.head}")


@app.command()
def certificate(run_dir: Annotated[Path, typer.Argument(help="run directory")], as_json: Json = False) -> None:
    """Print a run's privacy statement."""
    path = run_dir / ("certificate.json" if as_json else "certificate.md")
    if not path.is_file():
        raise ConfigError(f"{run_dir}: no certificate; it is written when a run ends")
    typer.echo(path.read_text(encoding="utf-8"))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="run directory")]) -> None:
    """Write report.html again from what the run released, and print its path."""
    from dprlhf_ray.observability.report import write_report

    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: not a run directory (no config.yaml)")
    typer.echo(str(write_report(run_dir)))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help='model folder, hub name or "embedded"')],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option()] = 24,
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 1.0,
) -> None:
    """Try a model: print its continuation of a prompt."""
    from dprlhf_ray.models.embedded import resolve_model

    path = resolve_model(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    lm: Any = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer(prompt, return_tensors="pt")
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    )
    out = lm.generate(**ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling)
    typer.echo(tokenizer.decode(out[0], skip_special_tokens=True))


@data_app.command("prepare")
def data_prepare(name: Annotated[str, typer.Argument(help="embedded: the model and the reviews")] = "embedded") -> None:
    """Fetch and convert the embedded model and data into the cache."""
    if name != "embedded":
        raise ConfigError(f"data prepare {name}: only 'embedded' can be prepared")
    from dprlhf_ray.data.embedded import prepare_reviews
    from dprlhf_ray.models.embedded import embedded_model_path

    typer.echo(f"model: {embedded_model_path()}\ndata: {prepare_reviews()}")


@app.command()
def doctor() -> None:
    """What this machine has and lacks."""
    from dprlhf_ray.observability.doctor import findings

    for line in findings():
        typer.echo(line)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _step(sigma: float, q: float, steps: int, k: int, adjacency: str) -> Any:
    from dprlhf_ray.privacy.mechanism import DPStep

    return DPStep("record", adjacency, 1_000_000_000, q, sigma, 1.0, k, steps, None)


def _plan_config(config: cfg.RunConfig) -> list[dict[str, Any]]:
    from dprlhf_ray.data.preflight import preflight
    from dprlhf_ray.privacy.planning import expectations, plan_stage, trainable_numbers

    facts = preflight(config)
    rows = []
    for stage in config.stages:
        if stage.data not in facts.populations:
            raise ConfigError(
                f"plan: the size of data set {stage.data!r} is not known (a hub data set): "
                "use plan --epsilon --delta --sampling-rate --steps"
            )
        found = plan_stage(stage, facts.populations[stage.data])
        row: dict[str, Any] = {"stage": stage.name, **found.step.parameters(), "delta": found.delta}
        row |= (
            {"pld": None, "rdp": None}
            if found.epsilon is None
            else {"pld": found.epsilon.pld, "rdp": found.epsilon.rdp}
        )
        m = facts.model
        d = None if m is None else trainable_numbers(config.model.adapter, m.parameters, m.linears)
        rows.append(row | expectations(stage, found, d))
    return rows


def _print_plan(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        width = max(len(k) for k in row)
        for key, value in row.items():
            typer.echo(f"{key:<{width}}  {value:.6g}" if isinstance(value, float) else f"{key:<{width}}  {value}")


def _ledger(where: str) -> str:
    path = Path(where)
    return str(path / "ledger.db") if path.is_dir() else where


def main() -> None:
    """Entry point: one line and an exit code for every error that has one."""
    try:
        app(standalone_mode=False)
    except DprlhfError as e:
        typer.echo(f"dprlhf: {getattr(e, 'cause', e)}", err=True)  # cause: without Ray's traceback
        sys.exit(e.exit_code)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        typer.echo("dprlhf: interrupted", err=True)
        sys.exit(130)
    except Exception as e:
        if hasattr(e, "exit_code") and hasattr(e, "format_message"):  # click's usage errors
            typer.echo(f"dprlhf: {e.format_message()}", err=True)
            sys.exit(e.exit_code)
        raise


if __name__ == "__main__":
    main()
