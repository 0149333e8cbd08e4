"""How `pertoken validate` prints: scores, the worst rows, rows without an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pertoken.report._fact_table import right, table_of

if TYPE_CHECKING:
    from pertoken.report.validate import Score, Scored, Unanswered, Validation

WIDTH = 100
QUANTITIES = {
    "tokens_per_s": "output tokens per second per GPU",
    "ttft_s": "time to first token",
    "tpot_s": "time per output token",
    "power_w": "power of one GPU",
    "joules_per_output_token": "J per output token, GPU boundary",
    "training_tokens_per_s": "trained tokens per second per GPU",
    "mfu_fraction": "model FLOPs utilisation",
}
SHORT = {
    "tokens_per_s": "tokens/s",
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "power_w": "power",
    "joules_per_output_token": "J/output token",
    "training_tokens_per_s": "trained tok/s",
    "mfu_fraction": "MFU",
}
"""The same where columns are narrow."""


def validation_table(v: Validation) -> RenderableType:
    """The tables of a validation for a rich console of `WIDTH` columns."""
    head = f"{v.path}: {v.answered} of {v.rows} rows scored, {len(v.unanswered)} without an answer"
    parts: list[RenderableType] = [Text(head, style="bold")]
    parts += [Text(f"assumed in {n} rows: {text}") for text, n in v.assumed.items()]
    if v.overall:
        parts += [
            Text("\nAll rows (error of predicted over measured; cover: share within the 80 % interval)")
        ]
        parts += [_score_table(v.overall, whole=True)]
        parts += [Text("By GPU, engine and precision"), _score_table(v.groups, whole=False)]
        parts += [Text("Worst rows"), _worst_table(v.worst)]
    if v.unanswered:
        parts += [Text("Without an answer"), _unanswered_table(v.unanswered)]
    return Group(*parts)


def _percent(value: float, signed: bool = False) -> str:
    return f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %"


def _score_table(scores: Sequence[Score], *, whole: bool) -> RenderableType:
    names = ["quantity"] if whole else ["quantity", "GPU", "engine", "format"]
    table = table_of(*names, *right("rows", "mean", "median", "p90", "bias", "cover"))
    for s in scores:
        label = QUANTITIES[s.quantity] if whole else SHORT[s.quantity]
        own = [label] if whole else [label, s.gpu, s.engine, s.precision]
        figures = (_percent(s.mean), _percent(s.median), _percent(s.p90), _percent(s.bias, signed=True))
        table.add_row(*own, str(s.rows), *figures, f"{100 * s.coverage:.0f} %")
    return table


def _worst_table(worst: Sequence[Scored]) -> RenderableType:
    table = table_of(
        "line", "what", "GPU, engine, model", "setting", *right("measured", "predicted", "error")
    )
    for s in worst:
        where = f"{s.gpu} {s.engine} {s.precision} {s.model.split('/')[-1]}"
        figures = (f"{s.measured:.4g}", f"{s.predicted:.4g}", f"{100 * s.error:+.0f} %")
        table.add_row(str(s.line), SHORT[s.quantity], where, s.setting, *figures)
    return table


def _unanswered_table(unanswered: Sequence[Unanswered]) -> RenderableType:
    """One line per reason with its rows' count and first lines."""
    by_reason: dict[str, list[Unanswered]] = {}
    for u in unanswered:
        by_reason.setdefault(u.reason, []).append(u)
    table = table_of(*right("rows"), "lines", "why")
    for reason, members in sorted(by_reason.items(), key=lambda kv: -len(kv[1])):
        lines = ", ".join(str(u.line) for u in members[:4]) + (" …" if len(members) > 4 else "")
        table.add_row(str(len(members)), lines, reason)
    return table
