"""What each of Grafana's dashboards shows: panels as data, each a list of PromQL queries over `GET /metrics`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pertoken.units import JOULES_PER_KWH, MILLISECONDS_PER_SECOND, SECONDS_PER_HOUR, TOKENS_PER_MTOK

Kind = Literal["stat", "timeseries", "bargauge", "table"]
_USD, _KWH, _SHARE, _COUNT, _JOULE = "currencyUSD", "kwatth", "percentunit", "short", "joule"


@dataclass(frozen=True)
class Query:
    """PromQL, with Grafana's variables in it, and what its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One figure of a dashboard."""

    title: str
    queries: tuple[Query, ...]
    unit: str
    kind: Kind = "timeseries"
    width: int = 12
    about: str = ""
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """Panels under a title; `variable` is the label its viewer chooses values of, and the family that has it."""

    name: str
    title: str
    about: str
    panels: tuple[Panel, ...]
    variable: tuple[str, str] | None = None
    many: bool = True
    """Whether several values may be chosen at once."""


def _of(family: str, *labels: str) -> str:
    """A family of the service and the window that the viewer chose."""
    return _at(family, 'window="$window"', *labels)


def _at(family: str, *labels: str) -> str:
    chosen = ",".join(['instance=~"$instance"', *labels])
    return f"pertoken_{family}{{{chosen}}}"


def _priced(expr: str) -> str:
    """Nothing while hours of the window lack a price: the service then tells no USD per token, and nor do we."""
    return f"{expr} and on () {_of('cost_per_mtok_usd')}"


def _kwh(expr: str) -> str:
    return f"{expr} / {JOULES_PER_KWH}"


def _gpu_hours(expr: str) -> str:
    return f"{expr} / {SECONDS_PER_HOUR}"


def _one(expr: str, legend: str = "") -> tuple[Query, ...]:
    return (Query(expr, legend),)


_TOTAL, _OUTPUT, _INPUT = (f'metric="usd_per_mtok_{end}"' for end in ("total", "output", "input"))
_WITH_IDLE = 'metric="usd_per_mtok_output_with_idle"'
_HOUR, _ENERGY_SPEND, _SERVED = 'window="1h"', 'category="energy"', 'meter!="training_tokens"'
_J_TOTAL = 'metric="joule_per_token_total"'
_MEASURED = "Of the pools whose energy was measured: an API's tokens are in none of it."

_OVERVIEW = Dashboard(
    "overview",
    "PerToken: overview",
    "What a token costs, where the money goes, and whether the figures can be trusted.",
    (
        Panel("USD per M tokens, all in", _one(_of("cost_per_mtok_usd", _TOTAL)), _USD, "stat", 4),
        Panel(
            "USD per M output tokens, with idle", _one(_of("cost_per_mtok_usd", _WITH_IDLE)), _USD, "stat", 4,
            "Compare this one with an API's price.",
        ),
        Panel("Spend", _one(f"sum({_of('spend_usd')})"), _USD, "stat", 4),
        Panel("Tokens", _one(f"sum({_of('tokens')})"), _COUNT, "stat", 4),
        Panel("Energy per token", _one(_of("energy_per_token_joules", _J_TOTAL)), _JOULE, "stat", 4, _MEASURED),
        Panel("GPU hours used", _one(_of("utilisation_ratio")), _SHARE, "stat", 4),
        Panel(
            "USD per M tokens",
            tuple(
                Query(_of("cost_per_mtok_usd", metric), legend)
                for metric, legend in ((_TOTAL, "all in"), (_OUTPUT, "output"), (_INPUT, "input"))
            ),
            _USD,
        ),
        Panel("Spend by category", _one(_of("spend_usd"), "{{category}}"), _USD, stacked=True),
        Panel("Spend by pool", _one(f"sum by (pool) ({_of('pool_spend_usd')})", "{{pool}}"), _USD, stacked=True),
        Panel("Tokens by kind", _one(_of("tokens"), "{{meter}}"), _COUNT, stacked=True),
        Panel(
            "GPU hours by phase", _one(_gpu_hours(_of("gpu_held_seconds")), "{{phase}}"), _COUNT, stacked=True,
            about="Idle is what was held, paid for and used by nobody.",
        ),
        Panel(
            "USD per M tokens by model", _one(f"sort_desc({_of('model_cost_per_mtok_usd', _TOTAL)})", "{{model}}"),
            _USD, "bargauge",
        ),
        Panel("Tokens per second in the newest closed hour", _one(
            f"sum({_at('tokens', _HOUR)}) / {SECONDS_PER_HOUR}"), _COUNT, "stat", 6),
        Panel("Sources", _one(_at("sources"), "{{state}}"), _COUNT, "stat", 6),
        Panel("Journal takes records", _one(_at("journal_writable")), "bool_yes_no", "stat", 4),
        Panel("Closing is late by", _one(_at("closing_late_seconds")), "s", "stat", 4),
        Panel(
            "Closed until", _one(f"{_at('closed_until_timestamp_seconds')} * {MILLISECONDS_PER_SECOND}"),
            "dateTimeFromNow", "stat", 4,
        ),
        Panel("Age of sources", _one(_at("source_age_seconds"), "{{kind}} {{source}}"), "s", "bargauge"),
        Panel(
            "Hours without a price", _one(f"sum({_at('unpriced_seconds')}) / {SECONDS_PER_HOUR} or vector(0)"),
            _COUNT, "stat",
        ),
    ),
)  # fmt: skip


def _by(label: str, *, more: tuple[Panel, ...] = ()) -> Dashboard:
    """A dashboard of one dimension, whose values its viewer chooses."""
    chosen, legend = f'{label}=~"${label}"', f"{{{{{label}}}}}"

    def of(family: str, *labels: str) -> str:
        return _of(f"{label}_{family}", chosen, *labels)

    return Dashboard(
        label,
        f"PerToken: by {label}",
        f"What each {label} costs; those past the twenty costliest are (other).",
        (
            Panel("Spend", _one(f"sum({of('spend_usd')})"), _USD, "stat", 6),
            Panel("Tokens", _one(f"sum({of('tokens')})"), _COUNT, "stat", 6),
            Panel(
                "USD per M tokens",
                _one(_priced(f"sum({of('spend_usd')}) / sum({of('tokens', _SERVED)}) * {TOKENS_PER_MTOK}")),
                _USD,
                "stat",
                6,
                "All cost of those chosen over all their tokens served.",
            ),
            Panel("Energy", _one(_kwh(f"sum({of('energy_joules')})")), _KWH, "stat", 6),
            Panel(f"Spend by {label}", _one(f"sum by ({label}) ({of('spend_usd')})", legend), _USD, stacked=True),
            Panel(
                "Spend by category", _one(f"sum by (category) ({of('spend_usd')})", "{{category}}"), _USD, stacked=True
            ),
            Panel("USD per M tokens, all in", _one(of("cost_per_mtok_usd", _TOTAL), legend), _USD),
            Panel("USD per M output tokens, idle not included", _one(of("cost_per_mtok_usd", _OUTPUT), legend), _USD),
            Panel("USD per M input tokens, idle not included", _one(of("cost_per_mtok_usd", _INPUT), legend), _USD),
            Panel(f"Tokens by {label}", _one(f"sum by ({label}) ({of('tokens')})", legend), _COUNT, stacked=True),
            Panel("Tokens by kind", _one(f"sum by (meter) ({of('tokens')})", "{{meter}}"), _COUNT, stacked=True),
            Panel("Energy per token", _one(of("energy_per_token_joules", _J_TOTAL), legend), _JOULE, about=_MEASURED),
            Panel(
                "GPU hours by phase",
                _one(_gpu_hours(f"sum by (phase) ({of('gpu_held_seconds')})"), "{{phase}}"), _COUNT, stacked=True,
            ),
            Panel(
                "Ranking by spend", _one(f"sort_desc(sum by ({label}) ({of('spend_usd')}))", legend), _USD, "bargauge"
            ),
        ),
        (label, f"pertoken_{label}_spend_usd"),
    )  # fmt: skip


_ENERGY = Dashboard(
    "energy",
    "PerToken: energy",
    "Energy at the meter, the plug and the board, per token and in USD.",
    (
        Panel("Energy at the utility meter", _one(_kwh(_of("energy_joules"))), _KWH, "stat", 4),
        Panel(
            "Mean power in the newest closed hour",
            _one(f"{_at('energy_joules', _HOUR)} / {SECONDS_PER_HOUR}"), "watt", "stat", 4,
        ),
        Panel("Energy per token", _one(_of("energy_per_token_joules", _J_TOTAL)), _JOULE, "stat", 4, _MEASURED),
        Panel(
            "PUE, of what is measured at the plug",
            _one(f"{_of('energy_joules')} / {_of('server_energy_joules')}"), _COUNT, "stat", 4,
            "Energy at the utility meter over energy at the servers' plugs.",
        ),
        Panel("Cost of energy", _one(f"sum({_of('spend_usd', _ENERGY_SPEND)})"), _USD, "stat", 4),
        Panel(
            "USD per kWh",
            _one(_priced(f"sum({_of('spend_usd', _ENERGY_SPEND)}) / sum({_kwh(_of('energy_joules'))})")),
            _USD, "stat", 4, "Energy and demand charges over all energy; where power is in the rent it costs 0.",
        ),
        Panel(
            "Energy by where it is measured",
            (
                Query(_kwh(_of("energy_joules")), "utility meter"),
                Query(_kwh(_of("server_energy_joules")), "servers' plugs"),
                Query(_kwh(_of("gpu_energy_joules")), "GPU boards"),
            ),
            _KWH,
        ),
        Panel("Energy by pool", _one(_kwh(_of("pool_energy_joules")), "{{pool}}"), _KWH, stacked=True),
        Panel("J per token", _one(_of("energy_per_token_joules"), "{{metric}}"), _JOULE, about=_MEASURED),
        Panel(
            "J per token by model", _one(_of("model_energy_per_token_joules", _J_TOTAL), "{{model}}"), _JOULE,
            about=_MEASURED,
        ),
        Panel(
            "Tokens of pools whose energy nobody measured",
            _one(
                f"sum by (pool) ({_of('pool_tokens')}) "
                f"unless on (pool) sum by (pool) ({_of('pool_energy_joules')})",
                "{{pool}}",
            ),
            _COUNT, stacked=True, about="They are in no J per token; an API's never can be.",
        ),
        Panel("Energy by tenant", _one(_kwh(_of("tenant_energy_joules")), "{{tenant}}"), _KWH, stacked=True),
        Panel(
            "Energy's share of spend",
            _one(_priced(f"sum({_of('spend_usd', _ENERGY_SPEND)}) / sum({_of('spend_usd')})")), _SHARE,
        ),
    ),
)  # fmt: skip


def _plan(family: str, *labels: str) -> str:
    return _of(f"plan_{family}", 'book=~"$book"', *labels)


_PLAN = Dashboard(
    "plan",
    "PerToken: plan against actual",
    "A plan beside what happened, over the hours of the window that both have.",
    (
        Panel("Planned", _one(f"sum({_plan('spend_usd')})"), _USD, "stat", 6),
        Panel("Actual", _one(f"sum({_plan('actual_spend_usd')})"), _USD, "stat", 6),
        Panel("Actual less plan", _one(f"sum({_plan('variance_usd')})"), _USD, "stat", 6),
        Panel(
            "Actual less plan, share of plan", _one(f"sum({_plan('variance_usd')}) / sum({_plan('spend_usd')})"),
            _SHARE, "stat", 6,
        ),
        Panel(
            "Spend",
            (Query(_plan("spend_usd"), "planned"), Query(_plan("actual_spend_usd"), "actual")), _USD,
        ),
        Panel(
            "Why: price, volume, efficiency, mix", _one(_plan("variance_usd"), "{{driver}}"), _USD, stacked=True,
            about="The four add up to actual less plan, to the cent.",
        ),
        Panel("Why, now", _one(_plan("variance_usd"), "{{driver}}"), _USD, "bargauge"),
        Panel("Tokens", (Query(_plan("tokens"), "planned"), Query(_plan("actual_tokens"), "actual")), _COUNT),
        Panel(
            "USD per M tokens, all in",
            tuple(
                Query(f"{_plan(f'{which}spend_usd')} / {_plan(f'{which}tokens')} * {TOKENS_PER_MTOK}", legend)
                for which, legend in (("", "planned"), ("actual_", "actual"))
            ),
            _USD,
            about="Tokens here are served and trained ones together.",
        ),
    ),
    ("book", "pertoken_plan_spend_usd"),
    many=False,
)  # fmt: skip


def _budget(family: str, *labels: str) -> str:
    return _at(f"budget_{family}", 'budget=~"$budget"', *labels)


_EXPECTED = 'bound="expected"'
_BUDGETS = Dashboard(
    "budgets",
    "PerToken: budgets",
    "What is spent of each budget, how fast, and where its period will end.",
    (
        Panel("Spent, of the budget", _one(_budget("spent_ratio"), "{{budget}}"), _SHARE, "bargauge"),
        Panel("Forecast, of the budget", _one(_budget("forecast_ratio", _EXPECTED), "{{budget}}"), _SHARE, "bargauge"),
        Panel(
            "Spent through the period", (Query(_budget("spent_ratio"), "{{budget}}"),), _SHARE,
            about="At 1 a budget is used up.",
        ),
        Panel(
            "Where the period will end", _one(_budget("forecast_ratio"), "{{budget}} {{bound}}"), _SHARE,
            about="Expected, and the ends of an 80 % interval.",
        ),
        Panel(
            "Burn, last 24 h", _one(_budget("burn_ratio", 'window="24h"'), "{{budget}}"), "short",
            about="Pace of the newest 24 h over the one that lasts to the period's end: at 1 it lasts exactly.",
        ),
        Panel("Spent in USD", _one(_budget("spent_usd"), "{{budget}}"), _USD),
    ),
    ("budget", "pertoken_budget_spent_ratio"),
)  # fmt: skip

DASHBOARDS: tuple[Dashboard, ...] = (_OVERVIEW, _by("model"), _by("tenant"), _ENERGY, _PLAN, _BUDGETS)
