"use strict";
let data, shown;
const $ = id => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The data stand in the page as base64 of their gzip.
async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

const place = algo => data.algos.indexOf(algo);
const colour = algo => `light-dark(${data.colours[place(algo) % data.colours.length].join(", ")})`;
const dash = algo => data.dashes[Math.floor(place(algo) / data.colours.length) % data.dashes.length];

function swatch(algo) {
  const sample = make("span", {className: "swatch " + dash(algo)});
  sample.style.color = colour(algo);
  return sample;
}

// One filter for the whole page: what is shown of the tasks and of the algorithms.
function chips(kind) {
  const names = data[kind];
  if (names.length < 2) return;
  const chip = name => {
    const button = make("button", {type: "button", title: "Click to hide or show, double-click to show it alone"}, name);
    if (kind === "algos") button.prepend(swatch(name));
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

// Charts are SVG with the page's own colours, so that they follow its light and dark.
function svg(tag, attributes = {}, style = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  Object.assign(element.style, style);
  element.append(...children);
  return element;
}

// Round numbers from low to high, about as many as asked for.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step + 0); // never -0
  return found;
}

const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});
const DASHES = {solid: "none", dash: "7 4", dot: "2 3"};

// Lines with their bands over x, levels across the chart, and a legend of both; `without` are rows with neither.
function chart(figure, {title, lines, levels = [], without = [], from = 0, x, y}) {
  const width = Math.max(figure.clientWidth, 200), height = 260, box = {left: 56, right: 16, top: 10, bottom: 44};
  const known = values => (values ?? []).filter(value => value !== null);
  const ys = [...lines.flatMap(line => [line.value, line.low, line.high].flatMap(known)), ...levels.map(level => level.value)];
  const xs = lines.flatMap(line => line.x);
  let [low, high] = [Math.min(...ys), Math.max(...ys)], right = Math.max(...xs, from);
  if (!ys.length || !xs.length) [low, high, right] = [0, 1, from + 1];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.1;
  [low, high] = [low - margin, high + margin];
  if (right === from) right = from + 1;
  const atX = value => box.left + (value - from) / (right - from) * (width - box.left - box.right);
  const atY = value => height - box.bottom - (value - low) / (high - low) * (height - box.top - box.bottom);

  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${title} ${y} against ${x}`});
  for (const value of ticks(low, high, 7)) {
    picture.append(svg("line", {class: "grid", x1: box.left, x2: width - box.right, y1: atY(value), y2: atY(value)}),
      svg("text", {x: box.left - 8, y: atY(value) + 4, "text-anchor": "end"}, {}, compact.format(value)));
  }
  for (const value of ticks(from, right, width / 70)) {
    picture.append(svg("text", {x: atX(value), y: height - box.bottom + 18, "text-anchor": "middle"}, {}, compact.format(value)));
  }
  picture.append(svg("text", {class: "label", x: (box.left + width - box.right) / 2, y: height - 6, "text-anchor": "middle"}, {}, x),
    svg("text", {class: "label", transform: `translate(12 ${(height - box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, {}, y));

  const path = points => points.map(([a, b], i) => `${i ? "L" : "M"}${atX(a).toFixed(1)} ${atY(b).toFixed(1)}`).join("");
  for (const {name, value} of levels) {
    picture.append(svg("line", {class: "level", x1: box.left, x2: width - box.right, y1: atY(value), y2: atY(value)},
      {stroke: colour(name), strokeDasharray: DASHES[dash(name)]}));
  }
  const near = []; // what a pointer can show
  for (const {name, label = name, value, low, high, thin, ...line} of lines) {
    const there = value.map((_, i) => i).filter(i => value[i] !== null);
    const points = column => there.map(i => [line.x[i], column[i]]);
    if (low && there.length && low[there[0]] !== null) {
      picture.append(svg("path", {class: "band", d: path([...points(high), ...points(low).reverse()]) + "Z"}, {fill: colour(name)}));
    }
    const drawn = svg("path", {class: thin ? "thin" : "line", d: path(points(value))},
      {stroke: colour(name), strokeDasharray: DASHES[dash(name)]});
    drawn.dataset.line = label;
    picture.append(drawn);
    if (!thin && there.length <= 20) {
      picture.append(...points(value).map(([a, b]) => svg("circle", {cx: atX(a), cy: atY(b), r: 2.5}, {fill: colour(name)})));
    }
    for (const i of there) {
      const interval = low && low[i] !== null && !thin ? ` [${low[i]}, ${high[i]}]` : "";
      near.push({x: atX(line.x[i]), y: atY(value[i]), text: `${label}: ${value[i]}${interval} at ${compact.format(line.x[i])}`});
    }
  }

  const told = make("output", {className: "told", hidden: true});
  const dot = svg("circle", {class: "dot", r: 5, visibility: "hidden"});
  picture.append(dot);
  const show = event => {
    const {left, top, width: shown} = picture.getBoundingClientRect(), scale = width / shown;
    const [px, py] = [(event.clientX - left) * scale, (event.clientY - top) * scale];
    const distance = point => Math.hypot(point.x - px, point.y - py);
    const best = near.reduce((a, b) => a && distance(a) <= distance(b) ? a : b, undefined);
    if (!best) return;
    told.hidden = false;
    told.textContent = best.text;
    dot.setAttribute("cx", best.x);
    dot.setAttribute("cy", best.y);
    dot.setAttribute("visibility", "visible");
  };
  picture.onpointermove = picture.onpointerdown = show;
  picture.onpointerleave = () => {
    told.hidden = true;
    dot.setAttribute("visibility", "hidden");
  };

  const named = [...levels.map(level => [level.name, level.label]), ...lines.filter(line => !line.thin).map(line => [line.name, line.label ?? line.name])];
  figure.replaceChildren(
    ...(title ? [make("h4", {}, title)] : []),
    make("p", {className: "legend"}, ...named.map(([name, label]) => make("span", {}, swatch(name), label))),
    ...(without.length ? [make("p", {className: "without"}, `no curve here: ${without.join(", ")}`)] : []),
    picture, told);
}

function draw() {
  const curve = $("curve").value, axis = $("axis").value;
  for (const panel of all(".panels > figure")) {
    if (panel.hidden) continue;
    const task = panel.dataset.task, level = data.levels[task];
    // Rows that were not evaluated are drawn by the rewards of their training.
    const lines = data.lines.filter(line => line.task === task && shown.algos.has(line.algo) && Math.max(...line.x[axis]) > 0)
      .map(line => ({line, of: line.y[curve] || curve !== "eval/reward" ? curve : "reward"}))
      .filter(({line, of}) => line.y[of]);
    const label = ({line, of}) => of === curve ? line.algo : `${line.algo} (training)`;
    const seeds = $("seeds")?.checked ? lines.flatMap(({line, of}) => line.seeds.filter(seed => seed.y[of]).map(seed => (
      {name: line.algo, label: `${line.algo}, seed ${seed.seed}`, x: seed.x[axis], value: seed.y[of], thin: true}))) : [];
    const levels = level && curve === "eval/reward" && shown.algos.has(level.algo) ?
      [{name: level.algo, label: level.algo + (level.validated ? "" : " (test)"), value: level.reward}] : [];
    const drawn = new Set([...lines.map(({line}) => line.algo), ...levels.map(({name}) => name)]);
    chart(panel, {title: task, levels, x: data.axes[axis], y: data.curves[curve],
      lines: [...seeds, ...lines.map(each => ({name: each.line.algo, label: label(each), x: each.line.x[axis], ...each.line.y[each.of]}))],
      without: data.ran[task].filter(algo => shown.algos.has(algo) && !drawn.has(algo))});
  }
  if (data.profiles) {
    const {thresholds, algos} = data.profiles;
    const lines = Object.keys(algos).filter(algo => shown.algos.has(algo)).map(algo => ({name: algo, x: thresholds, ...algos[algo]}));
    chart($("profile").querySelector("figure"), {title: "", lines, from: thresholds[0], x: "normalised test reward", y: "share of runs above"});
  }
}

// Sample texts: the prompts of one task, each with the texts of one seed, all algorithms side by side. The first is open.
function options(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map(value => make("option", {value}, String(value))));
  if (values.map(String).includes(before)) select.value = before;
  select.parentElement.hidden = values.length < 2;
}

function fill() {
  options($("task"), data.tasks.filter(task => data.samples[task].length && shown.tasks.has(task)));
  const samples = data.samples[$("task").value] ?? [];
  options($("seed"), [...new Set(samples.flatMap(sample => sample.texts.map(text => text.seed)))].sort((a, b) => a - b));
  const open = new Set(all("#prompts details").filter(element => element.open).map(element => element.dataset.prompt));
  $("prompts").replaceChildren(...samples.map((sample, place) => {
    const texts = sample.texts.filter(text => String(text.seed) === $("seed").value && shown.algos.has(text.algo));
    if ($("by-reward").checked) texts.sort((a, b) => b.reward - a.reward);
    const prompt = make("details", {},
      make("summary", {}, make("span", {className: "prompt"}, sample.prompt)),
      make("div", {className: "answers"}, ...texts.map(text => make("article", {},
        make("h4", {}, text.algo, " ", make("b", {}, text.reward.toFixed(3))),
        make("p", {}, ...text.segments.map(([author, written]) =>
          make("span", {className: data.authors.includes(author) ? author : "policy"}, written)))))));
    prompt.dataset.prompt = `${$("task").value} ${sample.sample_id}`;
    prompt.open = place === 0 || open.has(prompt.dataset.prompt);
    return prompt;
  }));
}

async function start() {
  data = JSON.parse(await unpacked("data"));
  shown = {tasks: new Set(data.tasks), algos: new Set(data.algos)};
  // What no run has.
  if ($("profile")) $("profile").hidden = !data.profiles;
  $("curves").hidden = !data.lines.length;
  $("episodes").hidden = !document.querySelector("#episodes article");
  $("comparisons").hidden = !document.querySelector("#comparisons table");
  chips("tasks");
  chips("algos");
  for (const button of all("thead button")) button.onclick = () => sort(button);
  for (const id of ["curve", "axis", "seeds"]) $(id)?.addEventListener("change", draw);
  for (const id of ["task", "seed", "by-reward"]) $(id).addEventListener("change", fill);
  $("baseline").addEventListener("change", update);
  update();
  addEventListener("resize", draw);
  document.body.dataset.ready = "";
}
start();
