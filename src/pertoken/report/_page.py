"""One self-contained page from blocks: text, tables and Vega-Lite figures; no network, light and dark, printable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

PALETTE = ("#3b6fb6", "#d1793b", "#4f9d69", "#b65a7a", "#8a7a3b", "#5a8fa8", "#8f6fb0", "#7d7d7d")
"""Colours of figures, in order; told apart in light and dark and by the common colour blindnesses."""

CATEGORY_COLOURS = {"compute": PALETTE[0], "energy": PALETTE[1], "infrastructure": PALETTE[2]}
PHASE_COLOURS = {
    "input": PALETTE[0],
    "output": PALETTE[5],
    "training": PALETTE[2],
    "idle": PALETTE[7],
    "waste": PALETTE[3],
}

UTC_AXES: dict[str, dict[str, Any]] = {
    step: {
        "type": "temporal",
        "title": f"{step} (UTC)",
        "scale": {"type": "utc"},
        "axis": {"labelExpr": label, "labelOverlap": True},
    }
    for step, label in {
        "hour": "utcFormat(datum.value, utchours(datum.value) + utcminutes(datum.value) ? '%H:%M' : '%b %d')",
        "day": "utcFormat(datum.value, '%b %d')",
        "month": "utcFormat(datum.value, '%b %Y')",
    }.items()
}
"""What lies under a figure over time, by its step: hours of 24, with the date at midnight."""


@dataclass(frozen=True)
class Text:
    """A heading (empty: none) and paragraphs."""

    heading: str
    paragraphs: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Rows under column heads; cells are text, those of `numeric` columns are set right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """A Vega-Lite specification with the sentence that says what it shows."""

    caption: str
    spec: Mapping[str, Any]


Block = Text | Table | Figure


def html_page(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML document that needs nothing else.

    All text is escaped; the JavaScript comes from vl-convert's wheel and is included only where there is a figure.
    """
    import jinja2
    from markupsafe import Markup

    entries: list[dict[str, Any]] = []
    for block in blocks:
        entry = {"kind": type(block).__name__, **{k: getattr(block, k) for k in block.__dataclass_fields__}}
        if isinstance(block, Figure):
            entry["json"] = Markup(_inside_script(json.dumps(block.spec)))
        entries.append(entry)
    figures = any(isinstance(block, Figure) for block in blocks)
    template = resources.files("pertoken.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        subtitle=subtitle,
        blocks=entries,
        figures=figures,
        bundle=Markup(_inside_script(_bundle())) if figures else "",
        palette=Markup(json.dumps(PALETTE)),
    )


def write_png(spec: Mapping[str, Any], path: Path) -> None:
    """A Vega-Lite figure as PNG at twice its size."""
    path.write_bytes(png(spec))


def png(spec: Mapping[str, Any]) -> bytes:
    """A Vega-Lite figure as PNG at twice its size; one as wide as its page is 640 px wide."""
    import vl_convert

    config = {"background": "white", "view": {"stroke": None}, "range": {"category": list(PALETTE)}}
    sized = {**spec, "width": 640} if spec.get("width") == "container" else dict(spec)
    picture: bytes = vl_convert.vegalite_to_png(sized, scale=2, config=config)
    return picture


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: what was there stays until the new text is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@cache
def _bundle() -> str:
    import vl_convert

    # The snippet is the wheel's own default; its type stub asks for it.
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def _inside_script(text: str) -> str:
    # "</script" and "<!--" would end or confuse the element; in JSON and JavaScript strings the escape is equal.
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
