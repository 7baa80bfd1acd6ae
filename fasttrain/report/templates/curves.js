"use strict";
// Curves of several runs over each other, drawn into SVG from the data in the page.
(() => {
  const data = JSON.parse(document.getElementById("curves-data").textContent);
  const [box, legend, choices] = ["chart", "legend", "choices"].map((id) => document.getElementById(id));
  const [metric, at, atStep] = ["metric", "at", "at-step"].map((id) => document.getElementById(id));
  const FIRST = 8, FEW = 40, MARGIN = { left: 62, right: 12, top: 10, bottom: 44 };
  const COLOURS = data.dashes.length;
  const chosen = new Set();

  function element(name, attributes = {}, text) {
    const svg = ["svg", "path", "line", "circle", "text", "g"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // As fasttrain.figures.style: beyond eight, dashes meet other colours.
  const colour = (i) => `var(--line-${i % COLOURS})`;
  const dash = (i) => data.dashes[(i + Math.floor(i / COLOURS)) % COLOURS];
  const shown = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString());
  const steps = (value) => Math.round(value).toLocaleString("en");
  const finite = (values) => values.filter((value) => value !== null);

  function ticks(low, high, count) {
    const rough = (high - low) / count, size = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * size).find((each) => each >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  }

  function ends(values) {
    return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  }

  function range(values, percent) {
    if (!values.length) return [0, 1];
    let [low, high] = ends(values);
    if (percent) [low, high] = [Math.min(low, 0), Math.max(high, 1)];
    if (low === high) [low, high] = [low - Math.abs(low) * 0.1 - 1e-9, high + Math.abs(high) * 0.1 + 1e-9];
    const air = (high - low) * 0.04;
    return [percent ? low : low - air, high + air];
  }

  function path(xs, ys, x, y) {
    let drawn = "", pen = "M";
    for (let i = 0; i < xs.length; i++) {
      if (ys[i] === null) { pen = "M"; continue; }
      drawn += `${pen}${x(xs[i]).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
      pen = "L";
    }
    return drawn;
  }

  function selected() {
    const { key } = data.metrics[metric.selectedIndex];
    return [...chosen].sort((a, b) => a - b)
      .map((i) => ({ i, name: data.runs[i].name, series: data.runs[i].series[key] })).filter((one) => one.series);
  }

  const last = (series) => finite(series.s || series.y).at(-1);

  function draw() {
    const { label, smooth } = data.metrics[metric.selectedIndex], runs = selected();
    const width = Math.max(280, box.clientWidth), height = Math.max(240, Math.min(440, width * 0.5));
    const low = Math.min(...runs.map((run) => run.series.x[0])), high = Math.max(...runs.map((run) => run.series.x.at(-1)));
    const [left, right] = runs.length ? (low === high ? [low - 1, high + 1] : [low, high]) : [0, 1];
    const [bottom, top] = range(runs.flatMap((run) => finite(run.series.y)), label.endsWith("(%)"));
    const x = (value) => MARGIN.left + ((value - left) / (right - left)) * (width - MARGIN.left - MARGIN.right);
    const y = (value) => height - MARGIN.bottom - ((value - bottom) / (top - bottom)) * (height - MARGIN.top - MARGIN.bottom);
    const said = runs.map((run) => `${run.name} ${shown(last(run.series))}`).join("; ");
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": `${label} against the step, of ${runs.length} runs. Last values: ${said || "none"}` });
    for (const value of ticks(bottom, top, 5)) {
      svg.append(element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      svg.append(element("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, shown(value)));
    }
    for (const value of ticks(left, right, width < 500 ? 3 : 7)) {
      const anchor = x(value) > width - 30 ? "end" : "middle";
      svg.append(element("line", { class: "grid", x1: x(value), x2: x(value), y1: MARGIN.top, y2: height - MARGIN.bottom }));
      svg.append(element("text", { x: x(value), y: height - MARGIN.bottom + 16, "text-anchor": anchor }, steps(value)));
    }
    svg.append(element("text", { class: "axis", x: (MARGIN.left + width) / 2, y: height - 6, "text-anchor": "middle" }, "step"));
    svg.append(element("text", { class: "axis", "text-anchor": "middle",
      transform: `translate(13 ${(height - MARGIN.bottom) / 2}) rotate(-90)` }, label));
    for (const { i, series } of runs) drawRun(svg, i, series, smooth, x, y, height - MARGIN.bottom);
    svg.append(element("line", { id: "reading", y1: MARGIN.top, y2: height - MARGIN.bottom }));
    box.replaceChildren(svg);
    svg.addEventListener("pointermove", (event) => {
      const share = (event.clientX - svg.getBoundingClientRect().left - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
      at.value = Math.round(1000 * Math.min(1, Math.max(0, share)));
      read(left, right, x);
    });
    at.oninput = () => read(left, right, x);
    table(runs, label, smooth);
    read(left, right, x);
  }

  function drawRun(svg, i, series, smooth, x, y, floor) {
    const line = { class: "curve", stroke: colour(i), "data-run": i };
    if (smooth) svg.append(element("path", { ...line, class: "raw", d: path(series.x, series.y, x, y) }));
    svg.append(element("path", { ...line, "stroke-dasharray": dash(i), d: path(series.x, series.s || series.y, x, y) }));
    series.x.forEach((step, j) => {
      if (series.y[j] === null)
        svg.append(element("text", { class: "lost", x: x(step), y: floor - 2, "text-anchor": "middle", fill: colour(i) }, "×"));
      else if (series.x.length < FEW)
        svg.append(element("circle", { cx: x(step), cy: y((series.s || series.y)[j] ?? series.y[j]), r: 2.5, fill: colour(i) }));
    });
  }

  function table(runs, label, smooth) {
    const heads = ["run", "at the step", smooth ? "last (mean)" : "last", "lowest", "highest"];
    const head = element("tr");
    head.append(...heads.map((text, i) => element("th", { scope: "col", class: i ? "number" : "" }, text)));
    const rows = runs.map(({ i, name, series }) => {
      const row = element("tr"), named = element("th", { scope: "row" });
      const swatch = element("svg", { width: 34, height: 10, "aria-hidden": "true" });
      swatch.append(element("line", { x1: 0, x2: 34, y1: 5, y2: 5, stroke: colour(i), "stroke-width": 2.5, "stroke-dasharray": dash(i) }));
      named.append(swatch, ` ${name}`);
      const values = finite(series.y);
      const extremes = values.length ? ends(values) : [null, null];
      row.append(named, ...[null, last(series), ...extremes].map((value) => element("td", { class: "number" }, shown(value))));
      return row;
    });
    const [top, body] = [element("thead"), element("tbody")];
    top.append(head);
    body.append(...rows);
    legend.replaceChildren(element("caption", {}, label), top, body);
  }

  function read(left, right, x) {
    const step = left + ((right - left) * at.value) / 1000, line = document.getElementById("reading");
    line.setAttribute("x1", x(step));
    line.setAttribute("x2", x(step));
    atStep.textContent = steps(step);
    const rows = legend.tBodies[0].rows;
    selected().forEach(({ series }, number) => {
      const near = series.x.reduce((best, each, j) => (Math.abs(each - step) < Math.abs(series.x[best] - step) ? j : best), 0);
      rows[number].cells[1].textContent = shown((series.s || series.y)[near]);
    });
  }

  function choose(numbers) {
    chosen.clear();
    numbers.forEach((number) => chosen.add(number));
    for (const input of choices.querySelectorAll("input")) input.checked = chosen.has(Number(input.value));
    draw();
  }

  metric.append(...data.metrics.map(({ key, label }) => element("option", { value: key }, label)));
  choices.append(...data.runs.map(({ name }, i) => {
    const line = element("label"), input = element("input", { type: "checkbox", value: i, autocomplete: "off" });
    line.append(input, ` ${name}`);
    return line;
  }));
  choices.addEventListener("change", (event) => {
    if (event.target.checked) chosen.add(Number(event.target.value));
    else chosen.delete(Number(event.target.value));
    draw();
  });
  metric.addEventListener("change", draw);
  document.getElementById("first-runs").addEventListener("click", () => choose([...data.runs.keys()].slice(0, FIRST)));
  document.getElementById("no-runs").addEventListener("click", () => choose([]));
  new ResizeObserver(() => box.firstChild && Math.abs(box.clientWidth - box.firstChild.width.baseVal.value) > 1 && draw()).observe(box);
  choose([...data.runs.keys()].slice(0, FIRST));
})();
