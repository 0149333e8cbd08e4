"""The page of `GET /metrics`: its families, and its text as Prometheus and OpenMetrics have it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

SCOPES = ("", "pool", "model", "tenant")
"""Whose figures have families of their own: of all, by pool, by model, by tenant."""

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@dataclass(frozen=True)
class Family:
    """A metric family. `unit` ends its name, as Prometheus has it; empty: it has none."""

    name: str
    about: str
    unit: str = ""
    counter: bool = False


_FIGURES = (
    ("spend_usd", "usd", "cost of the window's hours that are priced, by category"),
    ("tokens", "", "tokens by meter; the meters do not overlap"),
    ("requests", "", "requests that finished"),
    ("gpu_held_seconds", "seconds", "time GPUs were held, by phase; idle is one"),
    ("energy_joules", "joules", "energy at the utility meter"),
    ("server_energy_joules", "joules", "energy at the servers' plugs, before PUE"),
    ("gpu_energy_joules", "joules", "energy at the GPU boards"),
    ("emissions_grams", "grams", "CO2e of the energy, at the grid's intensity"),
    (
        "cost_per_mtok_usd",
        "usd",
        "USD per million tokens, by the metric's name; absent while hours are unpriced",
    ),
    (
        "energy_per_token_joules",
        "joules",
        "J per token, by the metric's name, of the pools whose energy was measured in the window alone",
    ),
    ("utilisation_ratio", "ratio", "GPU hours used over GPU hours held"),
    ("slo_attainment_ratio", "ratio", "requests that met the SLO over requests that finished"),
)
_PLANS = (
    ("plan_spend_usd", "usd", "what a plan said the hours would cost that the window shares with it"),
    ("plan_actual_spend_usd", "usd", "what these hours did cost"),
    ("plan_variance_usd", "usd", "actual less plan, by driver; by pool, as `pertoken report` has it"),
    ("plan_tokens", "", "tokens a plan has in these hours"),
    ("plan_actual_tokens", "", "tokens there were in these hours"),
)
_BUDGETS = (
    Family(
        "pertoken_budget_info",
        "1, with what a budget is of: its tenant, period, what it counts, whether it is hard",
    ),
    Family("pertoken_budget_limit_usd", "amount of a budget in USD", "usd"),
    Family("pertoken_budget_limit_tokens", "amount of a budget in tokens", "tokens"),
    Family("pertoken_budget_spent_usd", "spent in its period, the hour so far included", "usd"),
    Family("pertoken_budget_spent_tokens", "spent in its period, the hour so far included", "tokens"),
    Family(
        "pertoken_budget_forecast_usd",
        "what the period will end at: expected, low and high of an 80 % interval",
        "usd",
    ),
    Family(
        "pertoken_budget_forecast_tokens",
        "what the period will end at: expected, low and high of an 80 % interval",
        "tokens",
    ),
    Family("pertoken_budget_spent_ratio", "spent over the amount", "ratio"),
    Family("pertoken_budget_forecast_ratio", "forecast over the amount: expected, low and high", "ratio"),
    Family(
        "pertoken_budget_burn_ratio",
        "pace of the newest closed hours over the pace that lasts to the period's end",
        "ratio",
    ),
    Family(
        "pertoken_budget_runs_out_timestamp_seconds",
        "when it is or was used up; absent where it lasts",
        "seconds",
    ),
    Family("pertoken_budget_period_end_timestamp_seconds", "when its period ends", "seconds"),
)
_HEALTH = (
    Family("pertoken_budgets_watched", "1 where the budgets could be looked at the last time, else 0"),
    Family("pertoken_alerts_failing", "1 where the newest try to tell a channel failed, else 0"),
    Family("pertoken_source_silent", "1 where a source has told nothing for 5 minutes, else 0"),
    Family("pertoken_source_age_seconds", "time since a source last told something", "seconds"),
    Family("pertoken_source_failing", "1 where the newest scrape of a source failed, else 0"),
    Family("pertoken_sources", "sources, by state: telling or silent"),
    Family("pertoken_journal_writable", "1 where the journal takes what is sent, else 0"),
    Family("pertoken_journal_damaged_bytes", "bytes found damaged when the journal was opened", "bytes"),
    Family("pertoken_closing_failed", "1 where the newest close failed, else 0"),
    Family("pertoken_closing_late_seconds", "length of the hours over for 15 minutes and not closed", "seconds"),
    Family("pertoken_unpriced_seconds", "length of the 30d window's hours with usage no rate prices", "seconds"),
    Family("pertoken_refused_batches", "batches refused since the start, by reason", counter=True),
    Family(
        "pertoken_unknown_samples", "samples of instances the fleet file does not name, since the start", counter=True
    ),
)  # fmt: skip
_ALL = (
    Family("pertoken_build_info", "1, with the version"),
    Family(
        "pertoken_closed_until_timestamp_seconds", "the first hour not in the windows, POSIX time", "seconds"
    ),
    Family("pertoken_figures_age_seconds", "how long ago the ledger was asked", "seconds"),
)
FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        *_ALL,
        *(
            Family(f"pertoken_{scope}{'_' if scope else ''}{name}", f"{about}{f', by {scope}' * bool(scope)}", unit)
            for scope in SCOPES
            for name, unit, about in _FIGURES
        ),
        *(Family(f"pertoken_{name}", about, unit) for name, unit, about in _PLANS),
        *_BUDGETS,
        *_HEALTH,
    )
}  # fmt: skip
"""Every family of the page, in its order."""

Labels = tuple[tuple[str, str], ...]


class Page:
    """Samples by family; what is put twice under the same labels is added up."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[Labels, float]] = defaultdict(dict)

    def put(self, name: str, value: float, **labels: str) -> None:
        """One sample of a family of `FAMILIES`, its name without ``pertoken_``."""
        found = self._samples[FAMILIES[f"pertoken_{name}"].name]
        key = tuple(labels.items())
        found[key] = found.get(key, 0.0) + value

    def merge(self, other: Page) -> None:
        """Take over another page's samples."""
        for name, samples in other._samples.items():
            self._samples[name] |= samples

    def text(self, openmetrics: bool) -> str:
        """The exposition: Prometheus text 0.0.4, or OpenMetrics 1.0."""
        lines: list[str] = []
        for name, family in FAMILIES.items():
            samples = self._samples.get(name)
            if not samples:
                continue
            shown = f"{name}_total" if family.counter else name
            head = name if openmetrics else shown
            lines += [
                f"# HELP {head} {family.about}",
                f"# TYPE {head} {'counter' if family.counter else 'gauge'}",
            ]
            if openmetrics and family.unit:
                lines.append(f"# UNIT {head} {family.unit}")
            lines += [f"{shown}{_shown(labels)} {value!r}" for labels, value in samples.items()]
        if openmetrics:
            lines.append("# EOF")
        return "\n".join(lines) + "\n"


def _shown(labels: Labels) -> str:
    def escaped(text: str) -> str:
        return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    return "{" + ",".join(f'{k}="{escaped(v)}"' for k, v in labels) + "}" if labels else ""


def wants_openmetrics(accept: str) -> bool:
    """Whether an Accept header prefers OpenMetrics to the plain text format.

    >>> wants_openmetrics("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
    True
    >>> wants_openmetrics("text/plain, application/openmetrics-text;q=0.1")
    False
    """
    weights: dict[str, float] = {}
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        weights[kind] = max(weight, weights.get(kind, 0.0))
    other = max(weights.get(kind, 0.0) for kind in ("text/plain", "text/*"))
    return weights.get("application/openmetrics-text", 0.0) > other
