"""Verbs about what tokens do cost: the service, its books, budgets and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pertoken.cli._terminal import (
    CsvFile,
    DataFolder,
    FleetFile,
    HtmlFile,
    Json,
    app,
    check_writable,
    fraction_of,
    moment_of,
    progress_bar,
    show,
    write_file,
)

token = typer.Typer(help="Tokens that may send to and ask of a service.", no_args_is_help=True)
app.add_typer(token, name="token")


@app.command()
def serve(
    fleet: Annotated[Path, typer.Option(help="Fleet file (YAML).", show_default=False)],
    data: DataFolder,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback tokens are asked for.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8700,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    require_tokens: Annotated[
        bool, typer.Option("--require-tokens", help="Ask for tokens on loopback too.")
    ] = False,
    allow_host: Annotated[list[str], typer.Option(help="Further name it is called by without tokens.")] = [],  # noqa: B006
    keep_days: Annotated[int, typer.Option(min=2, max=3660, help="Days whose records are kept.")] = 400,
) -> None:
    """Meter and ledger of what happens: scrape, take what is sent, close every hour, answer."""
    from pertoken.web.serve import Bind
    from pertoken.web.serve import serve as run

    run(fleet, data, Bind(host, port, tls_cert, tls_key, require_tokens, keep_days, tuple(allow_host)))


@app.command()
def close(
    data: DataFolder,
    start: Annotated[
        str, typer.Option("--from", help="First hour, such as 2026-11-24T00:00Z.", show_default=False)
    ],
    end: Annotated[str, typer.Option("--to", help="Hour after the last.", show_default=False)],
    fleet: FleetFile = None,
    as_json: Json = False,
) -> None:
    """Turn hours into costs again, at the rates in force at each."""
    from pertoken.report._written import counted
    from pertoken.web.serve import close as run

    found = run(data, fleet, moment_of(start, "--from"), moment_of(end, "--to"))
    lines = [
        f"{counted(found['hours'], 'hour')} closed",
        *(f"open: {h}: {why}" for h, why in found["unpriced"].items()),
    ]
    if found["unmetered"]:
        lines.insert(
            1, f"{counted(found['unmetered'], 'hour')} left out: nothing was metered before the others"
        )
    show(found if as_json else "\n".join(lines), as_json)
    if found["unpriced"]:
        raise typer.Exit(1)


@app.command()
def doctor(
    data: DataFolder,
    fleet: FleetFile = None,
    hours: Annotated[int, typer.Option(min=1, max=8784, help="Hours to look at.")] = 24,
    as_json: Json = False,
) -> None:
    """What is wrong with the books: silent sources, unpriced usage, sums that disagree, the journal's state."""
    from pertoken.report.doctor import told
    from pertoken.web.serve import diagnose

    found = diagnose(data, fleet, hours)
    show(found if as_json else told(found), as_json)
    if any(one["severity"] == "wrong" for one in found["complaints"]):
        raise typer.Exit(1)


@app.command()
def budget(
    data: DataFolder,
    fleet: FleetFile = None,
    tenant: Annotated[str, typer.Option(help="Budgets of this tenant alone.")] = "",
    as_json: Json = False,
) -> None:
    """Budgets: spent, burn rate, forecast with its interval, when they run out; exit code 1 where a hard one has."""
    from pertoken.report._budget_text import told
    from pertoken.web.charged import budgets

    found = budgets(data, fleet, tenant)
    show(found if as_json else told(found, tenant), as_json)
    if any(one["hard"] and one["spent_fraction"] >= 1 for one in found):
        raise typer.Exit(1)


@app.command()
def statement(
    data: DataFolder,
    month: Annotated[str, typer.Option(help="Such as 2026-11.", show_default=False)],
    tenant: Annotated[str, typer.Option(help="Whose, line by line; empty: all tenants, and their sum.")] = "",
    fleet: FleetFile = None,
    spread_idle: Annotated[
        bool | None,
        typer.Option(help="With or without its part of idle; empty: as the fleet says.", show_default=False),
    ] = None,
    as_json: Json = False,
    html: HtmlFile = None,
    csv: CsvFile = None,
) -> None:
    """What a tenant is charged for a month; without one, all tenants and what is nobody's: together the ledger."""
    from pertoken.web.charged import statement as run

    check_writable(html, csv)
    found = run(data, fleet, tenant, month, spread_idle)
    write_file(html, found.to_html)
    write_file(csv, found.to_csv)
    show(found.to_dict() if as_json else found, as_json)


@app.command()
def report(
    data: DataFolder,
    book: Annotated[list[str], typer.Option(help="Two books: actual and plan:NAME.", show_default=False)],
    by: Annotated[str, typer.Option(help="pool, model, tenant, or several with commas.")] = "pool,model",
    plan: Annotated[
        Path | None, typer.Option(help="Ledger file that holds the plan, if not --data's.")
    ] = None,
    start: Annotated[str, typer.Option("--from", help="First hour; default: what both books have.")] = "",
    end: Annotated[str, typer.Option("--to", help="Hour after the last.")] = "",
    as_json: Json = False,
) -> None:
    """Forecast against actual: the difference in USD, split into price, volume, efficiency and mix."""
    from pertoken.web.serve import report as run

    first, last = (
        moment_of(text, option) if text else None for text, option in ((start, "--from"), (end, "--to"))
    )
    found = run(data, book, by.split(","), first, last, plan)
    show(found.to_dict() if as_json else found, as_json)


@app.command()
def reconcile(
    data: DataFolder,
    bill: Annotated[Path, typer.Option(help="CSV with pool, usd and perhaps component.", show_default=False)],
    start: Annotated[str, typer.Option("--from", help="First hour of the bill.", show_default=False)],
    end: Annotated[str, typer.Option("--to", help="Hour after its last.", show_default=False)],
    tolerance: Annotated[str, typer.Option(help="Share a line may differ by.")] = "1%",
    as_json: Json = False,
) -> None:
    """Does what happened add up to the bill?"""
    from pertoken.web.serve import reconcile as run

    share = abs(fraction_of(tolerance, "--tolerance"))
    found = run(data, bill, moment_of(start, "--from"), moment_of(end, "--to"), share)
    show(found.to_dict() if as_json else found, as_json)
    if not found.agrees:
        raise typer.Exit(1)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A usage file or a training log.", show_default=False)],
    data: DataFolder,
    format_name: Annotated[
        str,
        typer.Option(
            "--format", help="litellm, openai, langfuse, opencost, pertoken, training.", show_default=False
        ),
    ],
    fleet: FleetFile = None,
    pool: Annotated[str, typer.Option(help="Pool of rows that name none.")] = "",
    name: Annotated[str, typer.Option(help="Source's name in the books; empty: the format's.")] = "",
    model: Annotated[str, typer.Option(help="Of a training run.")] = "",
    tenant: Annotated[str, typer.Option(help="Of a training run.")] = "",
    gpus: Annotated[float, typer.Option(help="Of a training run whose log has none.", min=0)] = 0.0,
    sequence_tokens: Annotated[float, typer.Option(help="Tokens of a sample (Megatron-LM).", min=0)] = 0.0,
    as_json: Json = False,
) -> None:
    """Files of usage and training logs into the journal; a row that was already there counts once."""
    from pertoken.report._written import counted
    from pertoken.report.imports import FileOf
    from pertoken.web.serve import import_file as run

    what = FileOf(format_name, pool, name, model, tenant, gpus, sequence_tokens)
    with progress_bar("importing") as progress:
        found = run(data, fleet, file, what, progress)
    taken, refused = counted(found["records"], "record"), counted(found["refused"], "row")
    text = f"{taken} taken, {found['duplicates']:,} already there, {refused} refused"
    show(found if as_json else "\n".join([text, *found["why"]]), as_json)
    if found["refused"]:
        raise typer.Exit(1)


@app.command()
def grafana(
    out: Annotated[Path, typer.Option(help="Folder the files go to.")] = Path("grafana"),
) -> None:
    """Grafana's dashboards and Prometheus' alert rules over `GET /metrics` of a service."""
    from pertoken.report.grafana import write

    def run(folder: Path) -> None:
        show("\n".join(str(path) for path in write(folder)), False)

    check_writable(out / "pertoken-alerts.yaml")
    write_file(out, run)


@token.command("add")
def token_add(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    data: DataFolder,
    scope: Annotated[list[str], typer.Option(help="read, write or admin; may be given again.")],
    tenant: Annotated[str, typer.Option(help="See and write this tenant's rows alone.")] = "",
) -> None:
    """Make a token; it is printed this once."""
    from pertoken.web.tokens import Tokens

    show(Tokens(data).add(name, tuple(scope), tenant), False)


@token.command("list")
def token_list(data: DataFolder) -> None:
    """Names, scopes and tenants."""
    from pertoken.web.tokens import Tokens

    rows = [f"{t.name}\t{','.join(t.scopes)}\t{t.tenant or '(all)'}\t{t.created}" for t in Tokens(data).all()]
    show("\n".join(rows), False)


@token.command("remove")
def token_remove(name: Annotated[str, typer.Argument(help="Its name.")], data: DataFolder) -> None:
    """Forget a token: it opens nothing from now on."""
    from pertoken.web.tokens import Tokens

    Tokens(data).remove(name)
