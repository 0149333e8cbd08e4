// Draws each figure from its own .vl.json twin; expressions are interpreted, so that no eval is needed.
for (const place of document.querySelectorAll("[data-spec]")) {
  const ink = getComputedStyle(document.body).color;
  fetch(place.dataset.spec)
    .then((answer) => (answer.ok ? answer.json() : answer.json().then((a) => Promise.reject(new Error(a.detail)))))
    .then((spec) =>
      vegaEmbed(place, spec, {
        ast: true, renderer: "svg", actions: false, defaultStyle: false, tooltip: false,
        config: {
          background: "transparent", view: { stroke: null },
          axis: { labelColor: ink, titleColor: ink }, legend: { labelColor: ink, titleColor: ink },
        },
      }),
    )
    .catch((error) => { place.textContent = error.message; });
}
