"""`dprlhf ledger`: what was declared and spent, whether the ledger is whole, and the two things done to it by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from dprlhf_ray import config_file
from dprlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from dprlhf_ray.privacy.chain import Schedule

app = typer.Typer(help="What was spent, and whether the ledger is whole.", no_args_is_help=True)

Where = Annotated[str, typer.Argument(help="run directory, ledger file or database URL")]
Key = Annotated[str | None, typer.Option(help="key file (default: the run's, or beside the ledger's file)")]
AnchorFile = Annotated[str | None, typer.Option("--anchor", help="anchor file (default: the run's, if it has one)")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


@app.command()
def show(where: Where, key: Key = None, anchor: AnchorFile = None, as_json: Json = False) -> None:
    """What was declared and spent, by stage, and the budgets of data sets."""
    from dprlhf_ray.privacy import budget
    from dprlhf_ray.privacy.ledger import Ledger

    url, key, anchor = _place(where, key, anchor)
    view = Ledger.read(url, key, anchor_file=anchor)
    rows = [_row(s, budget.meter(s)) for s in view.schedules.values()]
    totals = [
        {
            "data_set": name,
            **asdict(b),
            "epsilon_declared": budget.cost((s for s in view.schedules.values() if s.dataset == name), b.delta),
        }
        for name, b in view.budgets.items()
    ]
    if as_json:
        whole = {"head": view.head, "epoch": view.epoch, "entries": view.seq, "anchored": view.anchored}
        typer.echo(json.dumps(whole | {"stages": rows, "budgets": totals}))
        return
    for r in rows:
        typer.echo(_line(r))
    for t in totals:
        typer.echo(
            f"budget of {t['data_set']}: epsilon {t['epsilon_declared']:.3f} declared of {t['epsilon']:g}, "
            f"delta {t['delta']:g}"
        )
    typer.echo(f"{view.seq} entries, epoch {view.epoch}, head {view.head}{', anchored' if view.anchored else ''}")


@app.command()
def verify(where: Where, key: Key = None, anchor: AnchorFile = None) -> None:
    """Check the whole hash chain, with the anchor if there is one; exit code 4 when it is damaged."""
    from dprlhf_ray.privacy.ledger import Ledger

    url, key, anchor = _place(where, key, anchor)
    view = Ledger.read(url, key, anchor_file=anchor)
    adaptive = sum(s.alpha is not None for s in view.schedules.values())
    compared = "the anchor agrees" if anchor and view.anchored else "no anchor to compare with"
    typer.echo(
        f"whole: {view.seq} entries ({len(view.schedules)} stages, {adaptive} of them adaptive, {len(view.budgets)} "
        f"budgets), head {view.head}; {compared}"
    )


@app.command()
def budget(
    where: Where,
    data_set: Annotated[str, typer.Argument(help="declared name of the data set")],
    epsilon: Annotated[float, typer.Option(help="bound on everything declared on the data set")],
    delta: Annotated[float, typer.Option(help="delta of that bound")],
    raise_it: Annotated[bool, typer.Option("--raise", help="allow a larger budget than before; the ledger says so")]
    = False,
    key: Key = None,
    anchor: AnchorFile = None,
) -> None:  # fmt: skip
    """Set, lower or raise a data set's budget. It takes the ledger over: not while a run writes to it."""
    from dprlhf_ray.privacy.ledger import Ledger

    url, key, anchor = _place(where, key, anchor)
    Ledger.read(url, key, anchor_file=anchor)  # a typing error must not make a new ledger
    ledger = Ledger.open(url, key, anchor_file=anchor)
    try:
        ledger.set_budget(data_set, epsilon, delta, raise_it=raise_it)
    finally:
        ledger.close()
    typer.echo(f"budget of {data_set}: epsilon {epsilon:g} at delta {delta:g}")


@app.command()
def anchor(
    where: Where, file: Annotated[str, typer.Argument(help="where the anchor was lost")], key: Key = None
) -> None:
    """Make a lost anchor anew. Only when you know that this ledger is the newest one: nothing can check it."""
    from dprlhf_ray.privacy.ledger import Ledger

    url, key, _ = _place(where, key, None)
    view = Ledger.accept(url, key, file)
    typer.echo(f"{file}: accepts entry {view.seq}, head {view.head}")


def _row(s: Schedule, spent: float | None) -> dict[str, Any]:
    row = {"stage": s.stage, "data_set": s.dataset, "attempts": s.spent, "planned": s.step.steps,
           "accounting": "fixed_schedule" if s.alpha is None else "adaptive", "epsilon_spent": spent,
           "epsilon_target": s.epsilon, "delta": s.delta, "guarantee": s.guarantee}  # fmt: skip
    return row if s.alpha is None else row | {"alpha": s.alpha, "rho_spent": s.rho, "rho_budget": s.rho_budget}


def _line(r: dict[str, Any]) -> str:
    where = f"{r['stage']} on {r['data_set']}"
    draws = f"{r['attempts']} of {r['planned']} draws"
    if r["guarantee"] == "public":
        return f"{where}: {draws}, public: costs nothing"
    if r["accounting"] == "adaptive":
        draws = f"{r['attempts']} draws ({r['planned']} planned)"
    meter = "no guarantee (clip only)"
    if r["epsilon_spent"] is not None:
        meter = f"epsilon {r['epsilon_spent']:.3f} of {r['epsilon_target']:g}"
    if r["accounting"] == "adaptive":
        meter += f" (adaptive: rho {r['rho_spent']:.4g} of {r['rho_budget']:.4g} at order {r['alpha']:g})"
    return f"{where}: {draws}, {meter}, delta {r['delta']:g}"


def _place(where: str, key: str | None, anchor: str | None) -> tuple[str, str | None, str | None]:
    """Ledger, key and anchor of a run directory (as its config says), of a file or of a database."""
    folder = Path(where)
    if not folder.is_dir():
        return where, key, anchor
    written = folder / "config.yaml"
    if not written.is_file():
        return str(folder / "ledger.db"), key, anchor
    try:
        config = config_file.parse(yaml.safe_load(written.read_text(encoding="utf-8")), str(written))
    except yaml.YAMLError:
        raise ConfigError(f"{written}: is not valid YAML") from None
    return config.ledger or str(folder / "ledger.db"), key or config.ledger_key, anchor or config.ledger_anchor
