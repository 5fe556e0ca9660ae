"""The `dprlhf` command: parse, call one function, print. Heavy libraries are imported inside the commands."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dprlhf_ray import __version__, cli_job, cli_ledger, config_file, submission
from dprlhf_ray.config import RunConfig
from dprlhf_ray.errors import ConfigError, DprlhfError, Interrupted, place_of
from dprlhf_ray.run_dir import check_run_dir

if TYPE_CHECKING:
    from dprlhf_ray.sweep.cells import Cell

app = typer.Typer(
    help="Reinforcement learning from human feedback on private data, with a differential-privacy guarantee.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="The embedded model and data.", no_args_is_help=True)
app.add_typer(cli_ledger.app, name="ledger")
app.add_typer(data_app, name="data")
for command in (cli_job.submit, cli_job.stop, cli_job.scale):
    app.command()(command)

Config = Annotated[Path, typer.Argument(help="YAML config, e.g. configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override one key: --set stages.0.privacy.epsilon=4")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
Updates = Annotated[int, typer.Option(help="K, updates on one draw")]
Adjacency = Annotated[str, typer.Option(help="zero_out, add_remove or replace_one")]
Unit = Annotated[str, typer.Option(help="record or user")]
RecordsPerUser = Annotated[
    int | None, typer.Option(help="unit user: records are sampled, and a user owns at most this many")
]
MaxBatch = Annotated[int | None, typer.Option(help="cap on a draw; needs --population")]
Population = Annotated[int | None, typer.Option(help="N, number of records")]
_GUARANTEES = {"dp": "dp", "none": "none (clip only)", "public": "public data: costs nothing"}
_Number = TypeVar("_Number", int, float)
Tries = Annotated[
    float | None, typer.Option(help="also epsilon of the best of a Poisson number of tries with this mean, by RDP")
]


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
    parsed = config_file.load(config, overrides)
    if submission.IN_JOB in os.environ:
        submission.check_paths(config_file.tree(config, overrides), output)
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
def sweep(
    config: Config,
    epsilon: Annotated[str, typer.Option(help="targets of every private stage, e.g. 1,2,4,8")] = "",
    controls: Annotated[str, typer.Option(help="of clip_only, public_only, non_private")] = "",
    seeds: Annotated[str, typer.Option(help="public randomness only; noise and draws are always fresh")] = "0",
    public_data: Annotated[
        str | None, typer.Option(help="public_only: the public data set that private stages run on instead")
    ] = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="folder of the sweep (default: sweeps/<name>)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep finished runs, continue the others")] = False,
) -> None:
    """What privacy costs: one run per budget or control and seed, and a table of what each gained on public records.

    A run that fails is in the table, and does not end the others; the exit code is then 1. Every run is certified by
    itself; the sweep is not charged for, and says what its runs cost together.
    """
    from dprlhf_ray.sweep import runner, table
    from dprlhf_ray.sweep.cells import cells

    parsed = config_file.load(config, overrides)
    folder = output or Path("sweeps") / parsed.name
    names = [c for c in controls.split(",") if c]
    found = cells(parsed, _numbers("--epsilon", epsilon, float), names, _numbers("--seeds", seeds, int), public_data)
    waiting = runner.prepare(folder, found, resume)
    failed: dict[str, int] = {}
    minutes: dict[str, float] = {}

    def ended(outcome: runner.Outcome) -> None:
        if outcome.exit_code:
            failed[outcome.cell.folder] = outcome.exit_code
        minutes[outcome.cell.folder] = outcome.minutes
        done, code = len(minutes), outcome.exit_code
        how = f"failed with exit code {code}" if code else "done"
        typer.echo(f"{outcome.cell.folder}  {how} after {outcome.minutes:.1f} min ({done} of {len(waiting)} runs)")
        table.write(folder, parsed, found, failed)

    try:
        runner.run_cells(folder, waiting, runner.side_by_side(parsed), typer.echo, ended)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; continue with the same command and --resume") from None
    _print_sweep(table.write(folder, parsed, found, failed), found, minutes)
    typer.echo(f"\nNext: open {folder / 'sweep.html'}")
    if failed:
        raise DprlhfError(f"{len(failed)} of {len(found)} runs failed; their lines above say why; again: --resume")


@app.command()
def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML config; or give the four numbers below")] = None,
    overrides: Overrides = None,
    epsilon: Annotated[float | None, typer.Option(help="target epsilon")] = None,
    delta: Annotated[float | None, typer.Option(help="delta")] = None,
    sampling_rate: Annotated[float | None, typer.Option(help="q in (0, 1]")] = None,
    steps: Annotated[int | None, typer.Option(help="T, number of draws")] = None,
    updates_per_draw: Updates = 1,
    adjacency: Adjacency = "zero_out",
    unit: Unit = "record",
    records_per_user: RecordsPerUser = None,
    max_batch: MaxBatch = None,
    population: Population = None,
    tries: Tries = None,
    as_json: Json = False,
) -> None:
    """Noise multiplier for a target epsilon, and the expected signal and cost per step, before anything runs."""
    from dprlhf_ray.privacy import accounting

    if config is not None:
        numbers = {"--epsilon": epsilon, "--delta": delta, "--sampling-rate": sampling_rate, "--steps": steps}
        if given := [name for name, value in numbers.items() if value is not None]:
            raise ConfigError(
                f"plan: {given[0]} goes with the four numbers; with a config: --set stages.0.privacy.epsilon=4"
            )
        _print_plan(_plan_config(config_file.load(config, overrides)), as_json)
        return
    missing = [
        n
        for n, v in (("--epsilon", epsilon), ("--delta", delta), ("--sampling-rate", sampling_rate), ("--steps", steps))
        if v is None
    ]
    if missing or epsilon is None or delta is None or sampling_rate is None or steps is None:
        raise ConfigError(f"plan: give a config, or also {', '.join(missing)}")
    step = _step(0.0, sampling_rate, steps, updates_per_draw, adjacency, unit, records_per_user, max_batch, population)
    sigma = accounting.calibrate(step, epsilon, delta, allow_large_delta=True)
    figures = _figures(replace(step, noise_multiplier=sigma), delta, tries)
    _print_plan([{"noise_multiplier": sigma, **figures, "delta": delta}], as_json)


@app.command()
def epsilon(
    noise_multiplier: Annotated[float, typer.Option(help="sigma, relative to the clip norm")],
    sampling_rate: Annotated[float, typer.Option(help="q in (0, 1]")],
    steps: Annotated[int, typer.Option(help="T, number of draws")],
    delta: Annotated[float, typer.Option(help="delta")],
    updates_per_draw: Updates = 1,
    adjacency: Adjacency = "zero_out",
    unit: Unit = "record",
    records_per_user: RecordsPerUser = None,
    max_batch: MaxBatch = None,
    population: Population = None,
    tries: Tries = None,
) -> None:
    """Epsilon of T subsampled Gaussian draws, by PLD and RDP, as JSON."""
    step = _step(
        noise_multiplier, sampling_rate, steps, updates_per_draw, adjacency, unit, records_per_user, max_batch,
        population,
    )  # fmt: skip
    typer.echo(json.dumps(_figures(step, delta, tries)))


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

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    lm: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, use_safetensors=True)
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


def _numbers(option: str, text: str, kind: type[_Number]) -> list[_Number]:
    """Of a list with commas."""
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is no list of numbers; write it as 0,1,2") from None


def _print_sweep(found: dict[str, Any], cells: list[Cell], minutes: dict[str, float]) -> None:
    """The cells in the terminal, in short, with the minutes of the runs just made; the files have the intervals."""
    from rich.console import Console
    from rich.table import Table

    from dprlhf_ray.sweep.table import HEADINGS, formatted

    shown = Table(box=None, title=f"Sweep {found['name']}", pad_edge=False, padding=(0, 1, 0, 0))
    columns = ("cell", "certified ε", "before → after", "difference", "of non_private", "runs")
    for heading in (*columns, "min/run"):  # fits 80 columns: two of them take what is left
        shown.add_column(heading, overflow="fold", no_wrap=heading not in ("certified ε", "runs"))
    for row in formatted(found["cells"]):
        by_heading = dict(zip(HEADINGS, row, strict=True))
        own = [minutes[c.folder] for c in cells if c.name == row[0] and c.folder in minutes]
        shown.add_row(*(by_heading[h] for h in columns), f"{sum(own) / len(own):.1f}" if own else "kept")
    Console(highlight=False).print(shown)
    for statement in found["statements"]:
        typer.echo(statement)


def _step(
    sigma: float, q: float, steps: int, updates: int, adjacency: str, unit: str, records_per_user: int | None,
    max_batch: int | None, population: int | None,
) -> Any:  # fmt: skip
    from dprlhf_ray.privacy.mechanism import DPStep

    if max_batch is not None and population is None:
        raise ConfigError("--max-batch: how often it cuts depends on the number of records; add --population")
    return DPStep(
        unit=unit, adjacency=adjacency, population=population or 1_000_000_000, sampling_rate=q, noise_multiplier=sigma,
        clip_norm=1.0, updates_per_draw=updates, steps=steps, metric_noise_multiplier=None, max_batch=max_batch,
        records_per_user=records_per_user,
    )  # fmt: skip


def _figures(step: Any, delta: float, tries: float | None) -> dict[str, float | None]:
    from dprlhf_ray.privacy import accounting

    report = accounting.epsilon(step, delta, allow_large_delta=True)
    found = {"pld": report.pld, "rdp": report.rdp}
    return (
        found
        if tries is None
        else found | {"selected": accounting.selected_epsilon(step, delta, tries, allow_large_delta=True)}
    )


def _plan_config(config: RunConfig) -> list[dict[str, Any]]:
    from dprlhf_ray.data.preflight import expected_population, preflight
    from dprlhf_ray.privacy.planning import composed, expectations, plan_stage, trainable_numbers

    facts = preflight(config)
    rows: list[dict[str, Any]] = []
    plans = []
    for stage in config.stages:
        if stage.data not in facts.populations:
            raise ConfigError(
                f"plan: the size of data.{stage.data}.source is not known: {config.data[stage.data].source} is no file "
                "here, so it is taken for the name of a hub data set (a file has its suffix, such as .jsonl): "
                "use plan --epsilon --delta --sampling-rate --steps"
            )
        size = expected_population(config, stage, facts.populations)
        found = plan_stage(stage, size, dataset=config.dataset_of(stage.data))
        plans.append(found)
        row: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "data_set": found.dataset}
        row |= {"guarantee": _GUARANTEES[found.guarantee], "sampled": found.step.sampled, **found.step.parameters()}
        row |= {"records_per_draw": stage.privacy.records_per_draw if found.step.sampled == "user" else None}
        row |= {"delta": None if found.public else found.delta, "target": found.target}
        row |= (
            {"pld": None, "rdp": None}
            if found.epsilon is None
            else {"pld": found.epsilon.pld, "rdp": found.epsilon.rdp, "certified": found.certified}
        )
        m = facts.model
        d = None if m is None else trainable_numbers(config.adapter_of(stage), m.parameters, m.linears)
        rows.append(row | expectations(stage, found, d))
    for name, together in composed(config, plans).items():
        known = together.bound
        row = {"data_set": name, "epsilon_about": None if known is None else known.epsilon, "delta": together.delta}
        rows.append(row | {"why": together.reason} | _against_budget(config, plans, name))
    return rows


def _against_budget(config: RunConfig, plans: list[Any], name: str) -> dict[str, Any]:
    """A data set's budget, and what the ledger will compare with it: its stages composed sequentially."""
    from dprlhf_ray.privacy.composition import Part, sequential

    budget = config.budgets().get(name)
    if budget is None:
        return {}
    mine = [p for p in plans if p.dataset == name and not p.public]
    gates = [{} if p.filter is None else {"alpha": p.filter.alpha, "rho_budget": p.filter.rho_budget} for p in mine]
    bound = sequential([Part(p.stage, p.step, None, **gate) for p, gate in zip(mine, gates, strict=True)], budget.delta)
    return {"budget": budget.epsilon, "budget_delta": budget.delta, "counted_against_budget": bound and bound.epsilon}


def _print_plan(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for i, row in enumerate(rows):
        shown = {k: v for k, v in row.items() if v is not None}
        width = max(len(k) for k in shown)
        if i:
            typer.echo()
        for key, value in shown.items():
            typer.echo(f"{key:<{width}}  {value:.6g}" if isinstance(value, float) else f"{key:<{width}}  {value}")


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
            if e.format_message():  # a bare command has shown its help
                typer.echo(f"dprlhf: {e.format_message()}", err=True)
            sys.exit(e.exit_code)
        typer.echo("".join(traceback.format_tb(e.__traceback__)), err=True)
        reason = f" ({e.strerror})" if isinstance(e, OSError) and e.strerror else ""
        typer.echo(f"dprlhf: {place_of(e)}{reason}; its text is not shown, for it may quote a record", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
