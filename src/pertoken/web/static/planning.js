// The form of Compare and Plan: rows that can be added, names and prices offered, the text written as fields change.
// And the progress of a run. Without this script the form works: its buttons do the same.
{
  const form = document.getElementById("scenario");
  const rows = document.getElementById("rows");
  let known = { offers: {}, apis: [], zones: [] };

  const options = (list, values) => list.replaceChildren(...values.map(([value, label]) => {
    const option = document.createElement("option");
    option.value = value;
    if (label) option.label = label;
    return option;
  }));

  // What a row asks for depends on how it is bought.
  function fit(row) {
    const n = row.dataset.row, at = (name) => row.querySelector(`[name="${name}-${n}"]`);
    const term = at("term").value, api = term === "api";
    for (const name of ["gpu", "count", "usd", "have"]) at(name).closest("label").hidden = api && !at(name).value.trim() || api && name === "have";
    at("have").closest("label").hidden = !["owned", "reserved"].includes(term);
    at("api").closest("label").hidden = !api && !at("api").value.trim();
    const offers = (known.offers[at("gpu").value.trim()] || {})[term] || [];
    options(row.querySelector("datalist"), offers.map(([usd, who]) => [String(usd), `${usd} USD: ${who}`]));
    const unit = at("usd").closest("label").querySelector("small");
    unit.textContent = { owned: "USD per GPU", api: "" }[term] ?? (term ? "USD per GPU hour" : unit.textContent);
  }

  function addRow() {
    const last = rows.lastElementChild, n = Number(last.dataset.row) + 1;
    const made = last.cloneNode(true);
    made.dataset.row = n;
    made.querySelector("legend").textContent = n;
    for (const part of made.querySelectorAll("[id], [for], [name], [list]"))
      for (const key of ["id", "for", "name", "list"])
        if (/-\d+$/.test(part.getAttribute(key) || "")) part.setAttribute(key, part.getAttribute(key).replace(/\d+$/, n));
    for (const input of made.querySelectorAll("input")) {
      if (input.type === "checkbox") input.checked = false; else input.value = "";
      input.removeAttribute("aria-invalid");
    }
    made.querySelector("select").value = "";
    rows.append(made);
    fit(made);
    made.querySelector("select").focus();
    more();
  }

  function more() {
    const add = document.getElementById("add-row");
    add.hidden = Number(rows.lastElementChild.dataset.row) >= Number(add.dataset.most);
  }

  function fitTariff() {
    const chosen = document.getElementById("tariff").value !== "";
    for (const name of ["usd_per_kwh", "usd_per_kw"]) document.getElementById(name).disabled = chosen;
  }

  // The text follows the fields until somebody changes it by hand; then the buttons decide.
  let asked = 0, byHand = Boolean(form) && !document.getElementById("written").value;
  async function write() {
    if (byHand) return;
    const turn = ++asked;
    const body = new URLSearchParams(new FormData(form));
    body.set("do", "write");
    const answer = await fetch(form.action, { method: "POST", body, headers: { Accept: "application/json" } });
    if (!answer.ok || turn !== asked || byHand) return;
    const told = await answer.json(), problem = document.getElementById("problem");
    problem.hidden = !told.problem;
    problem.textContent = told.problem;
    for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
    const at = told.at && document.getElementById(told.at);
    if (at) { at.setAttribute("aria-invalid", "true"); at.setAttribute("aria-describedby", "problem"); }
    if (told.problem) return;
    document.getElementById("text").value = told.text;
    document.getElementById("written").value = told.written;
  }

  if (form && rows) {
    document.getElementById("add-row").addEventListener("click", addRow);
    for (const row of rows.children) fit(row);
    more();
    fitTariff();
    form.addEventListener("change", (event) => {
      if (event.target.id === "text") return;
      const row = event.target.closest(".row");
      if (row) fit(row);
      fitTariff();
      write();
    });
    document.getElementById("text").addEventListener("input", () => { byHand = true; });
    fetch("/planning.json").then((answer) => answer.ok ? answer.json() : known).then((found) => {
      known = found;
      options(document.getElementById("zones"), found.zones.map((name) => [name]));
      options(document.getElementById("apis"), found.apis.map((name) => [name]));
      for (const row of rows.children) fit(row);
    });
  }

  // --- a run ---
  const section = document.getElementById("progress");
  const points = [];
  let shown = 0, first = Boolean(document.querySelector(".tiles"));

  function tell(state, place, steps) {
    const text = document.getElementById("progress-text"), bar = section.querySelector("progress"), last = steps.at(-1);
    for (const step of steps)
      for (const [what, value] of [["best plan", step.best], ["bound", step.bound]])
        if (typeof value === "number") points.push({ seconds: step.elapsed_s, what, value });
    if (place) text.textContent = `${place} to go before it`;
    if (!last) return;
    if (typeof last.share === "number") bar.value = last.share;
    const parts = [last.step];
    if (typeof last.best === "number") parts.push(`best ${last.best.toLocaleString("en", { maximumFractionDigits: 2 })}`);
    if (typeof last.gap_fraction === "number") parts.push(`within ${(100 * last.gap_fraction).toFixed(2)} % of the best possible`);
    if (typeof last.elapsed_s === "number") parts.push(`${last.elapsed_s.toFixed(1)} s`);
    text.textContent = parts.join(", ");
    const figure = document.getElementById("gap");
    if (!figure || points.length < 2) return;
    figure.hidden = false;
    pertoken.draw(figure.querySelector(".figure"), {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", height: 140,
      data: { values: points }, mark: { type: "line", interpolate: "step-after", point: true },
      encoding: {
        x: { field: "seconds", type: "quantitative", title: "seconds" },
        y: { field: "value", type: "quantitative", title: "objective", scale: { zero: false } },
        color: { field: "what", type: "nominal", title: null },
      },
    });
  }

  async function follow() {
    try {
      const answer = await fetch(`${section.dataset.run}?after=${shown}`);
      if (answer.status === 404) { location.reload(); return; }
      if (answer.ok) {
        const found = await answer.json();
        shown += found.steps.length;
        tell(found.state, found.place, found.steps);
        const fresh = found.steps.some((step) => step.first) && !first;
        if (fresh || !["waiting", "running"].includes(found.state)) { location.reload(); return; }
      }
    } catch { /* the service is away for a moment: ask again */ }
    setTimeout(follow, 500);
  }
  if (section) follow();
}
