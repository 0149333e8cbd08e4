"""One self-contained page from blocks: text, tables and Vega-Lite figures; no network, light and dark, printable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2733; --paper: #ffffff; --rule: #d5dce3; --soft: #5b6875; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ee; --paper: #14191f; --rule: #36414c; --soft: #a3b0bc; --band: #1c232b; } }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding: .3rem 0; } th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule);
  text-align: left; vertical-align: top; } th { background: var(--band); } td { white-space: nowrap; } td.long { white-space: normal; } .n { text-align: right; }
figure { margin: 1rem 0; } figure > div { width: 100%; overflow-x: auto; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<main>
{% for block in blocks %}
{% if block.kind == "Text" %}
{% if block.heading %}<h2>{{ block.heading }}</h2>{% endif %}
{% for paragraph in block.paragraphs %}<p>{{ paragraph }}</p>{% endfor %}
{% elif block.kind == "Table" %}
<div class="wide" tabindex="0"><table><caption>{{ block.caption }}</caption>
<thead><tr>{% for cell in block.head %}
<th scope="col"{% if loop.index0 in block.numeric %} class="n"{% endif %}>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in block.rows %}
<tr>{% for cell in row %}<td{% if loop.index0 in block.numeric %} class="n"{% elif cell|length > 40 %} class="long"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% else %}
<figure><figcaption>{{ block.caption }}</figcaption>
<div class="figure" id="figure{{ loop.index }}" role="img" aria-label="{{ block.caption }}"></div>
<script type="application/json" data-for="figure{{ loop.index }}">{{ block.json }}</script></figure>
{% endif %}
{% endfor %}
</main>
{% if figures %}
<script>(() => { {{ bundle }} })();</script>
<script>
(() => {
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  const rule = getComputedStyle(document.documentElement).getPropertyValue("--rule").trim();
  const config = { background: "transparent", view: { stroke: null },
    axis: { labelColor: ink, titleColor: ink, gridColor: rule, domainColor: rule, tickColor: rule },
    legend: { labelColor: ink, titleColor: ink }, title: { color: ink }, header: { labelColor: ink, titleColor: ink },
    text: { color: ink }, range: { category: {{ palette }} } };
  for (const source of document.querySelectorAll("script[data-for]"))
    vegaEmbed("#" + source.dataset.for, JSON.parse(source.textContent), { actions: false, renderer: "svg", config });
}
dark.addEventListener("change", draw);
draw();
})();
</script>
{% endif %}
</body>
</html>
"""


def html_page(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML document that needs nothing else.

    All text is escaped; the JavaScript comes from vl-convert's wheel and is included only where there is a figure.
    """
    import jinja2
    import vl_convert
    from markupsafe import Markup

    entries: list[dict[str, Any]] = []
    for block in blocks:
        entry = {"kind": type(block).__name__, **{k: getattr(block, k) for k in block.__dataclass_fields__}}
        if isinstance(block, Figure):
            entry["json"] = Markup(_inside_script(json.dumps(block.spec)))
        entries.append(entry)
    figures = any(isinstance(block, Figure) for block in blocks)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        title=title,
        subtitle=subtitle,
        blocks=entries,
        figures=figures,
        bundle=Markup(_inside_script(vl_convert.javascript_bundle())) if figures else "",
        palette=Markup(json.dumps(PALETTE)),
    )


def write_png(spec: Mapping[str, Any], path: Path) -> None:
    """A Vega-Lite figure as PNG at twice its size."""
    import vl_convert

    config = {"background": "white", "view": {"stroke": None}, "range": {"category": list(PALETTE)}}
    path.write_bytes(vl_convert.vegalite_to_png(dict(spec), scale=2, config=config))


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: what was there stays until the new text is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _inside_script(text: str) -> str:
    # "</script" and "<!--" would end or confuse the element; in JSON and JavaScript strings the escape is equal.
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
