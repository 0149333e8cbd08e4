"""`plan` on a terminal of 100 columns: what it costs, who pays, when what runs."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pertoken.report._compare_notes import tokens
from pertoken.report._compare_table import WIDTH, usd
from pertoken.tables import Floats
from pertoken.units import HOURS_PER_DAY

if TYPE_CHECKING:
    from pertoken.plan._duals import ShadowPrices
    from pertoken.plan._robust import Robust
    from pertoken.plan.schedule import Plan
    from pertoken.report.plan import Planned

_FEW_JOBS = 2
"""Training runs that are told one by one."""
_SHADES = " ░▒▓█"


def as_text(planned: Planned) -> str:
    """The tables as plain text, no line longer than 100 columns."""
    console = Console(width=WIDTH, file=io.StringIO(), force_terminal=False)
    console.print(render(planned))
    out = console.file
    assert isinstance(out, io.StringIO)
    return out.getvalue()


def render(planned: Planned) -> RenderableType:
    """The tables for a rich console."""
    f, horizon = planned.found, planned.scenario.horizon
    days = f"{horizon.days} day{'s' if horizon.days > 1 else ''}"
    from pertoken.report.plan import objective_text

    parts: list[RenderableType] = [
        Text(
            f"{planned.scenario.name}: {days} from {horizon.start} ({horizon.timezone}), USD",
            style="bold",
        ),
        Text(f"{objective_text(f.objective_name)}; {proof(f)}"),
        Text(f"cost {usd(planned.cost_usd)} USD over the horizon, {usd(planned.usd_per_month)} USD a month"),
        *(Text(line) for line in answers(planned)),
        _components(planned),
        _workloads(planned),
        _days(planned),
    ]
    if planned.alternatives:
        parts.append(_alternatives(planned))
    if planned.robust is not None:
        parts.append(_regrets(planned))
    if planned.prices is not None:
        parts.append(_prices(planned))
    if planned.frontier:
        parts.append(_frontier(planned))
    parts += [Text(f"note: {note}") for note in f.notes]
    return Group(*parts)


def answers(planned: Planned) -> list[str]:
    """What an objective other than cost found, when training is done, energy and gas: a line each."""
    from pertoken.plan.schedule import completion_hours

    f, found = planned.found, []
    if f.objective_name == "tokens":
        found.append(f"{f.scale:.4g} × the tokens asked for: {tokens(sum(planned.tokens.values()))} in all")
    if f.objective_name == "time":
        found.append(f"all training done {f.objective:g} h after the start")
    elif done := completion_hours(f):
        found.append(
            "training done after " + ", ".join(f"{hours} h ({name})" for name, hours in done.items())
        )
    if planned.kwh:
        gas = "gas unknown" if planned.kgco2e is None else f"{planned.kgco2e:,.4g} kgCO2e"
        found.append(f"{planned.kwh:,.4g} kWh at the meter, {gas}")
    return found


def proof(f: Plan) -> str:
    """How good the plan is proven to be, in words."""
    reached = "no bound is known" if f.gap is None else f"proven within {f.gap:.2%} of the best possible"
    ended = {"optimal": "", "time limit": "; stopped by the time limit", "stopped": "; stopped by hand"}
    return f"{reached} in {f.elapsed_s:.1f} s ({f.method}){ended.get(f.status, '')}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for n, name in enumerate(columns):
        table.add_column(name, justify="left" if n == 0 else "right", overflow="fold")
    return table


def _components(planned: Planned) -> Table:
    table = _table("Where it goes", "component", "USD", "share")
    for name, value in sorted(planned.by_component.items(), key=lambda item: -item[1]):
        table.add_row(name, usd(value), f"{value / planned.cost_usd:.1%}" if planned.cost_usd else "")
    return table


def _workloads(planned: Planned) -> Table:
    table = _table(
        "By workload (with idle and overheads of the pools and sites it uses)",
        "workload", "tokens", "own USD", "USD", "USD per M",
    )  # fmt: skip
    for w in planned.workloads:
        table.add_row(w.name, tokens(w.tokens), usd(w.own_usd), usd(w.with_idle_usd), usd(w.usd_per_mtok))
    return table


def _days(planned: Planned) -> Table:
    """The mean day by local hour: how much of its greatest use each thing has."""
    zone = planned.scenario.horizon.timezone
    table = _table(f"Mean day, local hours 0 to 23 ({zone})", "runs", "most", "by hour")
    for name, series in busiest(planned.found):
        day = mean_day(series, planned.found, zone)
        top = float(series.max())
        line = "".join(_SHADES[min(4, int(np.ceil(4 * v / top - 1e-9)))] for v in day)
        table.add_row(name, f"{top:,.1f}", f"|{line}|")
    return table


def busiest(f: Plan) -> list[tuple[str, Floats]]:
    """What runs: whole units by name, else machines by pool, and each API's requests, shape (T,) each."""
    i, s = f.instance, f.schedule
    found = [(n, s.units[k]) for k, n in enumerate(i.unit_names) if i.unit_whole[k] and s.units[k].any()]
    for p, name in enumerate(i.pool_names):
        mine = i.flow_pool == p
        if i.machine_gpus[p] <= 0:
            series = (s.load[mine] * i.flow_per_hour[mine][:, None]).sum(axis=0)
            label = f"{name} (requests)"
        elif i.unit_whole[i.unit_pool == p].all():
            continue
        else:
            series, label = s.machines[p], f"{name} (machines)"
        if series.max(initial=0.0) > 1e-6:
            found.append((label, series))
    return found


def mean_day(series: Floats, f: Plan, zone: str) -> Floats:
    """Mean by local hour of the day, shape (24,)."""
    from datetime import datetime

    seconds = f.instance.hours.astype("datetime64[s]").astype(np.int64)
    local = np.array([datetime.fromtimestamp(int(s), ZoneInfo(zone)).hour for s in seconds])
    total = np.bincount(local, weights=series, minlength=HOURS_PER_DAY)
    return np.asarray(total / np.maximum(np.bincount(local, minlength=HOURS_PER_DAY), 1), dtype=np.float64)


def _alternatives(planned: Planned) -> Table:
    table = _table("Against", "instead", "USD", "the plan saves")
    for a in planned.alternatives:
        if a.cost_usd is None:
            table.add_row(a.name, "–", a.why)
        else:
            saved, near = a.cost_usd - planned.cost_usd, within_gap(planned, a.cost_usd)
            share = f" ({saved / a.cost_usd:.1%})" if a.cost_usd and not near else ""
            table.add_row(a.name, usd(a.cost_usd), near or f"{usd(saved)}{share}")
    return table


def within_gap(planned: Planned, cost_usd: float) -> str:
    """Says that what a rival costs more or less is smaller than the plan's own gap; empty where it is not.

    So small a difference is the solver's, which may stop anywhere within the gap, and nothing the plan saves or loses.
    """
    f = planned.found
    saved = cost_usd - planned.cost_usd
    if f.objective_name != "cost" or f.gap is None:
        return ""
    if abs(saved) < _NOTHING_USD:
        return "nothing"
    return f"within the gap ({usd(saved)})" if abs(saved) <= f.gap * abs(planned.cost_usd) else ""


_NOTHING_USD = 0.005
"""Half a cent: what rounding in the ledger moves is no difference."""


def price_lines(prices: ShadowPrices) -> list[tuple[str, str, float]]:
    """(of what, one more of what, USD) of every shadow price: costs of tokens, savings of everything else."""
    found = []
    for name, by_hour in prices.usd_per_mtok.items():
        found.append((name, "M tokens, cheapest hour", float(by_hour.min())))
        found.append((name, "M tokens, mean hour", float(by_hour.mean())))
        found.append((name, "M tokens, dearest hour", float(by_hour.max())))
    found += [(name, "M tokens trained", usd) for name, usd in prices.usd_per_mtok_trained.items()]
    found += [(name, "GPU held, saves", usd) for name, usd in prices.usd_per_gpu.items()]
    found += [(name, "kW of power cap, saves", usd) for name, usd in prices.usd_per_kw.items()]
    found += [(name, "hour of deadline, saves", usd) for name, usd in prices.usd_per_deadline_hour.items()]
    return found


def _prices(planned: Planned) -> Table:
    made = _table("At the margin: one unit more", "of", "unit", "USD")
    assert planned.prices is not None
    for name, what, value in price_lines(planned.prices):
        made.add_row(name, what, f"{value:,.4g}")
    return made


def _frontier(planned: Planned) -> Table:
    made = _table(f"Least cost against {planned.against}", planned.against, "USD")
    for value, cost in planned.frontier:
        made.add_row(f"{value:g}", "cannot" if cost is None else f"{cost:,.2f}")
    return made


def _regrets(planned: Planned) -> Table:
    assert planned.robust is not None
    names = list(planned.robust.plans)
    made = _table(
        f"Regret in USD: the plan of a row, met by the future of a column (least worst: {planned.robust.choice})",
        "plan",
        *names,
    )
    for row in regret_rows(planned.robust):
        made.add_row(*row)
    return made


def regret_rows(robust: Robust) -> list[tuple[str, ...]]:
    """A plan's name and its regret in each future, in words where its machines cannot do it."""
    return [
        (name, *(usd(float(v)) if np.isfinite(v) else "cannot" for v in row))
        for name, row in zip(robust.plans, robust.regret_usd, strict=True)
    ]
