"use strict";
let data, shown;
const $ = id => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Data and Plotly stand in the page as base64 of their gzip.
async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

// The browser computes light-dark() only for real properties, so a probe element turns it into a colour.
const probe = document.body.appendChild(make("i", {hidden: true}));
function colour(css, opacity = 1) {
  probe.style.color = css;
  return getComputedStyle(probe).color.replace("rgb(", "rgba(").replace(")", `, ${opacity})`);
}
const place = algo => data.algos.indexOf(algo);
const lineColour = algo => `light-dark(${data.colours[place(algo) % data.colours.length].join(", ")})`;
const dash = algo => data.dashes[Math.floor(place(algo) / data.colours.length) % data.dashes.length];

// One filter for the whole page: what is shown of the tasks and of the algorithms.
function chips(kind) {
  const names = data[kind];
  if (names.length < 2) return;
  const chip = name => {
    const button = make("button", {type: "button", title: "Click to hide or show, double-click to show it alone"}, name);
    if (kind === "algos") {
      const swatch = make("span", {className: "swatch " + dash(name)});
      swatch.style.color = lineColour(name);
      button.prepend(swatch);
    }
    button.dataset.name = name;
    button.onclick = () => {
      if (!shown[kind].delete(name)) shown[kind].add(name);
      update();
    };
    button.ondblclick = () => {
      shown[kind] = new Set([name]);
      update();
    };
    return button;
  };
  const set = (label, chosen) => {
    const button = make("button", {type: "button", className: "plain"}, label);
    button.onclick = () => {
      shown[kind] = new Set(chosen);
      update();
    };
    return button;
  };
  $(kind).append(...names.map(chip), set("all", names), set("none", []));
}

function update() {
  for (const kind of ["tasks", "algos"]) {
    for (const chip of all("[data-name]", $(kind))) chip.ariaPressed = shown[kind].has(chip.dataset.name);
  }
  const baseline = $("baseline").value;
  for (const element of all("[data-task], [data-algo]")) {
    const {task, algo, baseline: other} = element.dataset;
    element.hidden = (task !== undefined && !shown.tasks.has(task)) || (algo !== undefined && !shown.algos.has(algo)) ||
      (other !== undefined && other !== baseline);
  }
  draw();
  fill();
}

// Tables sort within each body by a click on a header: up, down, and back to the profile's order.
function sort(button) {
  const header = button.closest("th"), table = header.closest("table"), column = header.cellIndex;
  const next = {none: "ascending", ascending: "descending", descending: "none"}[header.ariaSort];
  for (const other of all("thead th", table)) other.ariaSort = "none";
  header.ariaSort = next;
  const direction = next === "descending" ? -1 : 1;
  const key = row => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
  };
  const text = row => row.cells[column].textContent;
  for (const body of table.tBodies) {
    const rows = all("tr:not(.task)", body);
    rows.forEach((row, place) => row.dataset.place ??= place);
    rows.sort((a, b) => {
      const [first, second] = [key(a), key(b)], ordered = a.dataset.place - b.dataset.place;
      if (next === "none") return ordered;
      if (isNaN(first) && isNaN(second)) return direction * text(a).localeCompare(text(b), "en") || ordered;
      if (isNaN(first) || isNaN(second)) return isNaN(first) - isNaN(second); // without a number: last
      return direction * (first - second) || ordered;
    });
    body.append(...rows);
  }
}

function plot(element, title, traces, x, y) {
  const side = {gridcolor: colour("var(--line)"), zeroline: false, automargin: true, ticks: "outside", ticklen: 4,
    tickcolor: "rgba(0,0,0,0)"};
  const label = text => ({text, font: {size: 11}, standoff: 6});
  Plotly.react(element, traces, {
    title: {text: title, font: {size: 13}, x: 0.03, xanchor: "left", y: 0.95},
    xaxis: {...side, title: label(x)}, yaxis: {...side, title: label(y)}, margin: {t: title ? 40 : 16, r: 14, b: 52, l: 52},
    hovermode: "closest", showlegend: false,
    hoverlabel: {bgcolor: colour("var(--panel)"), bordercolor: colour("var(--line)"), namelength: -1,
      font: {color: colour("var(--ink)")}},
    font: {color: colour("var(--ink)"), size: 11, family: getComputedStyle(document.body).fontFamily},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)"
  }, {responsive: true, displayModeBar: false});
}

// A line over seeds and its band. Plotly reads a little markup in names, so they are escaped.
const escaped = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
function traces(algo, x, {value, low, high}) {
  const there = value.map((_, i) => i).filter(i => value[i] !== null);
  const at = column => there.map(i => column[i]);
  const line = {color: colour(lineColour(algo)), width: 2, dash: dash(algo)};
  const middle = {x: at(x), y: at(value), name: escaped(algo), mode: there.length > 1 ? "lines" : "markers", line,
    marker: {color: line.color}, hovertemplate: "%{y:.4g} at %{x:.4g}"};
  if (!there.length || low[there[0]] === null) return [middle];
  const band = {x: [...at(x), ...at(x).reverse()], y: [...at(high), ...at(low).reverse()], mode: "lines",
    line: {width: 0}, fill: "toself", fillcolor: colour(lineColour(algo), 0.1), hoverinfo: "skip"};
  return [band, middle];
}

function draw() {
  const curve = $("curve").value, axis = $("axis").value;
  for (const panel of all(".panels > div")) {
    if (panel.hidden) continue;
    const lines = data.lines.filter(line => line.task === panel.dataset.task && shown.algos.has(line.algo) &&
      line.y[curve] && Math.max(...line.x[axis]) > 0);
    const seeds = $("seeds").checked ? lines.flatMap(line => line.seeds.filter(seed => seed.y[curve]).map(seed => ({
      x: seed.x[axis], y: seed.y[curve], name: escaped(`${line.algo}, seed ${seed.seed}`), mode: "lines", connectgaps: true,
      line: {color: colour(lineColour(line.algo), 0.4), width: 1, dash: dash(line.algo)},
      hovertemplate: "%{y:.4g} at %{x:.4g}"
    }))) : [];
    const middle = lines.flatMap(line => traces(line.algo, line.x[axis], line.y[curve]));
    plot(panel, escaped(panel.dataset.task), [...seeds, ...middle], data.axes[axis], data.curves[curve]);
  }
  if (data.profiles) {
    const {thresholds, algos} = data.profiles;
    const drawn = Object.keys(algos).filter(algo => shown.algos.has(algo));
    plot(document.querySelector("#profile .plot"), "", drawn.flatMap(algo => traces(algo, thresholds, algos[algo])),
      "normalised test reward", "share of runs above");
  }
}

// Sample texts: one prompt and seed of one task, all algorithms side by side.
function options(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map(value => make("option", {value}, String(value))));
  if (values.map(String).includes(before)) select.value = before;
}

function fill() {
  options($("task"), data.tasks.filter(task => data.samples[task] && shown.tasks.has(task)));
  const samples = data.samples[$("task").value] ?? [];
  options($("prompt"), samples.map(sample => sample.sample_id));
  const sample = samples.find(sample => String(sample.sample_id) === $("prompt").value) ?? {prompt: "", texts: []};
  options($("seed"), [...new Set(sample.texts.map(text => text.seed))].sort((a, b) => a - b));
  const texts = sample.texts.filter(text => String(text.seed) === $("seed").value && shown.algos.has(text.algo));
  if ($("by-reward").checked) texts.sort((a, b) => b.reward - a.reward);
  $("asked").textContent = sample.prompt;
  $("answers").replaceChildren(...texts.map(text => make("div", {},
    make("h4", {}, text.algo, " ", make("b", {}, text.reward.toFixed(3))),
    make("p", {}, ...text.segments.map(([author, written]) =>
      make("span", {className: data.authors.includes(author) ? author : "policy"}, written))))));
}

async function start() {
  const plotly = await unpacked("plotly");
  data = JSON.parse(await unpacked("data"));
  shown = {tasks: new Set(data.tasks), algos: new Set(data.algos)};
  document.head.appendChild(make("script", {textContent: plotly})).remove();
  // What no run has.
  $("profile").hidden = !data.profiles;
  $("curves").hidden = !data.lines.length;
  $("episodes").hidden = !document.querySelector("#episodes article");
  chips("tasks");
  chips("algos");
  for (const button of all("thead button")) button.onclick = () => sort(button);
  for (const id of ["curve", "axis", "seeds"]) $(id).addEventListener("change", draw);
  for (const id of ["task", "prompt", "seed", "by-reward"]) $(id).addEventListener("change", fill);
  $("baseline").addEventListener("change", update);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  update();
  document.body.dataset.ready = "";
}
start();
