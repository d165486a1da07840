"""The page of a report: its layout, its colours (light and dark) and the script that draws the curves.

Nothing on it is fetched: the content security policy forbids every request, so a page that needed one would show it.
"""

from string import Template

PAGE = Template("""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>$title: textgym benchmark</title>
<style>
:root {
  color-scheme: light dark;
  --paper: light-dark(#fcfcfa, #16181c);
  --panel: light-dark(#ffffff, #1d2026);
  --ink: light-dark(#1c1f24, #e4e6ea);
  --quiet: light-dark(#5f6670, #9aa2ad);
  --line: light-dark(#dfe1e4, #343942);
  --policy: light-dark(#dcebff, #163a63);
  --guide: light-dark(#ffe3b3, #5f4208);
  --reference: light-dark(#e8ddff, #40306b);
  --user: light-dark(#d5f0dc, #1b4a2b);
  --algo-0: light-dark(#6b7280, #a3abb8);
  --algo-1: light-dark(#1f6fd1, #6db1ff);
  --algo-2: light-dark(#c2560a, #ffa45c);
  --algo-3: light-dark(#0f8a5f, #4fd1a1);
  --algo-4: light-dark(#a3308f, #f08ede);
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 1160px; margin: 0 auto; padding: 3rem 1.5rem 6rem }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 1.25rem }
h2 { font-size: 1.3rem; margin: 3.5rem 0 .5rem; letter-spacing: -.01em }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace }
h4 { font-size: .85rem; margin: 0 0 .35rem; color: var(--quiet); font-weight: 600 }
h4 b { color: var(--ink); font-variant-numeric: tabular-nums; margin-left: .4rem }
p { max-width: 75ch }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 0 }
dt { font-size: .75rem; color: var(--quiet); text-transform: uppercase; letter-spacing: .06em }
dd { margin: 0 }
figure { margin: 0; overflow-x: auto }
figcaption { color: var(--quiet); font-size: .9rem; margin-bottom: .75rem; max-width: 75ch }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100% }
th { font-weight: 600; color: var(--quiet); vertical-align: bottom }
th, td { text-align: right; white-space: nowrap }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line) }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
th:first-child, td:first-child { padding-left: 0 }
tbody td:nth-child(2) { font-weight: 600 }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: .75rem }
.curves > div { height: 240px; background: var(--panel); border: 1px solid var(--line); border-radius: 8px }
#algos b { margin-left: 1.25rem; font-size: .9rem }
#algos b { display: inline-block }
#algos b::before { content: ""; display: inline-block; width: 1.6em; margin-right: .5em; vertical-align: middle;
  border-top: 3px solid currentColor }
#algos .dash::before { border-top-style: dashed }
#algos .dot::before { border-top-style: dotted }
#algos .dashdot::before { border-top-style: double }
label { font-size: .9rem; color: var(--quiet) }
select { font: inherit; padding: .2rem .4rem; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px }
article { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem;
  margin: .75rem 0 }
article p { margin: 0; max-width: none; overflow-wrap: anywhere; white-space: pre-wrap; font-size: .925rem }
.asked { border-bottom: 1px solid var(--line); padding-bottom: .75rem; margin-bottom: .75rem }
.asked small { display: block; color: var(--quiet) }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 1.25rem }
.prompt { color: var(--quiet) }
.policy, .guide, .reference, .user { border-radius: 3px; padding: .08em 0; box-decoration-break: clone;
  -webkit-box-decoration-break: clone }
.policy { background: var(--policy) }
.guide { background: var(--guide); border-bottom: 2px dotted currentColor }
.reference { background: var(--reference); border-bottom: 2px dashed currentColor }
.user { background: var(--user); border-bottom: 2px solid currentColor }
.legend span { padding: .1em .5em; margin-right: .25rem; font-size: .85rem }
details { border-bottom: 1px solid var(--line) }
summary { cursor: pointer; padding: .55rem 0; font-size: .925rem }
.parts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem; padding-bottom: 1rem }
pre { margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  font: .78rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow: auto; max-height: 22rem }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<dl>$facts</dl>

<h2>Results</h2>
$summary

<h2>Paired comparisons</h2>
$comparisons

<h2>Metrics</h2>
$metrics

<h2>Learning curves</h2>
<p><label>against <select id=axis>$axes</select></label> <span id=algos></span></p>
$curves

<h2>Test samples</h2>
<p>The same prompts under every row of the table, with the reward of each text. Language models wrote these, after
prompts that real people may have written: they can be wrong and unpleasant.</p>
<p class=legend>$legend</p>
$samples

<h2>Training episodes with a guide</h2>
<p>The guide, or a reference, began the text and the policy went on from there; or the policy began it and the guide
finished it. The reward is of the whole text.</p>
$rollouts

<h2>What made each run</h2>
$details
</main>
<script id=data type=application/json>$data</script>
<script>$plotly</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const axis = document.getElementById("axis"), algos = document.getElementById("algos");
// The browser computes light-dark() only for real properties, so a probe element turns a variable into a colour.
const probe = document.body.appendChild(document.createElement("i"));
function colour(name) {
  probe.style.color = "var(--" + name + ")";
  return getComputedStyle(probe).color;
}
// Five colours a reader can tell apart; where there are more rows, the next five are dashed, and so on.
const dashes = ["solid", "dash", "dot", "dashdot"];
const dash = i => dashes[Math.floor(i / 5) % dashes.length];
function draw() {
  const colours = data.algos.map((_, i) => colour("algo-" + i % 5));
  algos.replaceChildren(...data.algos.map((algo, i) => {
    const name = document.createElement("b");
    name.textContent = algo;
    name.style.color = colours[i];
    name.className = dash(i);
    return name;
  }));
  const row = run => data.algos.indexOf(run.algo);
  const side = {gridcolor: colour("line"), zeroline: false, automargin: true};
  for (const panel of document.querySelectorAll("[data-curve]")) {
    const curve = panel.dataset.curve;
    // A run without this curve would still stretch the axis.
    const drawn = data.runs.filter(run => run.task === panel.dataset.task && run.columns[curve].some(y => y !== null));
    const traces = drawn.map(run => ({
      x: run.columns[axis.value], y: run.columns[curve], name: run.algo + " " + run.seed, mode: "lines",
      connectgaps: true, line: {color: colours[row(run)], width: 2, dash: dash(row(run))}, hovertemplate: "%{y:.4g}"
    }));
    Plotly.react(panel, traces, {
      title: {text: data.curves[curve], font: {size: 13}, x: 0.04, xanchor: "left", y: 0.94},
      xaxis: {...side, title: {text: data.axes[axis.value], font: {size: 11}}}, yaxis: side,
      margin: {t: 40, r: 12, b: 40, l: 40}, hovermode: "x unified", showlegend: false,
      hoverlabel: {bgcolor: colour("panel"), bordercolor: colour("line")},
      font: {color: colour("ink"), size: 11, family: getComputedStyle(document.body).fontFamily},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)"
    }, {responsive: true, displayModeBar: false});
  }
}
axis.addEventListener("change", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
</script>
</body>
</html>
""")
