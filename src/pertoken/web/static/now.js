// The live figures: server-sent events of /live put into the tiles, and one of them drawn as a line.
{
  const status = document.getElementById("live"), problem = document.getElementById("problem");
  const quiet = document.getElementById("quiet");
  const line = document.getElementById("line"), choice = document.getElementById("line-of");
  const plain = status.textContent, MOST = 150, LONGEST_S = 60;
  let points = [], source = null, wait_s = 1, timer = 0;

  const put = (attribute, figures) => {
    for (const place of document.querySelectorAll(`[${attribute}]`)) {
      const text = figures[place.getAttribute(attribute)];
      if (text !== undefined && place.textContent !== text) place.textContent = text;
    }
  };
  const four = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  const draw = () => {
    const of = choice.value, known = points.filter((p) => typeof p[of] === "number");
    const values = known.map((p) => p[of]), high = Math.max(...values), low = Math.min(...values);
    document.getElementById("line-low").textContent = known.length ? four(low) : "–";
    document.getElementById("line-high").textContent = known.length ? four(high) : "–";
    const last = points.length ? points[points.length - 1].at : 0, span = 300;
    line.firstElementChild.setAttribute("d", known.map((p, i) => {
      const x = 600 * (1 - (last - p.at) / span), y = high > 0 ? 116 - 112 * (p[of] / high) : 116;
      return `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    }).join(""));
  };
  const say = (text) => { if (status.textContent !== text) status.textContent = text; };

  const leave = () => {
    clearTimeout(timer);
    if (source) source.close();
    source = null;
  };
  const look = () => {
    leave();
    source = new EventSource(status.dataset.source);
    source.addEventListener("past", (event) => { points = JSON.parse(event.data); draw(); });
    source.addEventListener("now", (event) => {
      const told = JSON.parse(event.data);
      wait_s = 1;
      say(plain);
      problem.hidden = !told.problem;
      problem.textContent = told.problem || "";
      if (!told.now) return;
      quiet.hidden = !told.quiet;
      put("data-now", told.now);
      put("data-hour", told.hour);
      points.push(told.point);
      points = points.slice(-MOST);
      draw();
    });
    source.onerror = () => {
      leave();
      // Streams end every quarter of an hour, which is no trouble: the first time is not worth a word.
      if (wait_s > 1) say(`No live figures just now: asked again in ${Math.round(wait_s)} s.`);
      timer = setTimeout(look, 1000 * wait_s * (0.75 + Math.random() / 2));
      wait_s = Math.min(LONGEST_S, 2 * wait_s);
    };
  };
  choice.addEventListener("change", draw);
  // A page in the background needs no figures.
  document.addEventListener("visibilitychange", () => { if (document.hidden) leave(); else look(); });
  addEventListener("pagehide", leave);
  look();
}
