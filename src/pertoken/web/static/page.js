// Draws every figure of the page from the specification inside it, and again when light turns to dark.
// Expressions are interpreted (ast), so that no eval is needed. Other scripts call pertoken.draw(place, spec).
const pertoken = {
  specs: new Map(),
  draw(place, spec) {
    this.specs.set(place, spec);
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
    // What a screen reader says: Vega writes the description over the place's label.
    const label = place.getAttribute("aria-label");
    return vegaEmbed(place, label ? { description: label, ...spec } : spec, {
      ast: true, renderer: "svg", actions: false, defaultStyle: false, tooltip: false,
      config: {
        background: "transparent", view: { stroke: null },
        axis: { labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line },
        legend: { labelColor: ink, titleColor: ink }, header: { labelColor: ink, titleColor: ink },
        title: { color: ink }, text: { color: ink },
      },
    }).catch((error) => { place.textContent = error.message; });
  },
};
for (const source of document.querySelectorAll(".figure > script[type='application/json']"))
  pertoken.draw(source.parentElement, JSON.parse(source.textContent));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [place, spec] of pertoken.specs) pertoken.draw(place, spec);
});
