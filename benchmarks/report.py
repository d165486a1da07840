"""From `results.jsonl` to tables, curves and a page: ``python -m benchmarks.report runs/NAME``."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np

from benchmarks import tables
from benchmarks.analysis import BASELINES, Analysis
from benchmarks.curves import AXES, COLOURS, CURVES, DASHES, POINTS, Line, as_csv, draw, lines
from benchmarks.results import Record, Runs, write_text
from benchmarks.statistics import Interval

AUTHORS = ("prompt", "policy", "guide", "reference", "user")
SUMMARY = "summary.json"
PICTURE = "curves.png"
SETTINGS = ("hyperparameters", "fingerprints", "versions")  # what makes a run what it is
PAGE = Path(__file__).with_name("page")


class ReportFiles(NamedTuple):
    """What `write_report` wrote."""

    table: str
    """The Markdown of `table.md`."""
    page: Path
    """The path of `report.html`."""


def write_report(folder: str | Path) -> ReportFiles:
    """Write a benchmark folder's `table.md`, `summary.json`, `learning_curves.csv` and `report.html` from its results.

    Where matplotlib is installed and a run has learning curves, `curves.png` too.

    Raises:
        ValueError: The folder holds no finished run.
    """
    folder = Path(folder)
    runs = Runs.read(folder)
    analysis = Analysis(runs)
    shown = [tables.results(analysis), tables.aggregate(analysis), tables.improvement(analysis)]
    shown += [tables.comparisons(analysis), tables.metrics(analysis), tables.costs(analysis)]
    table = "\n\n".join(part.markdown() for part in shown if part.rows or part.title == "Across tasks") + "\n"
    write_text(folder / "table.md", table)
    write_text(folder / SUMMARY, json.dumps(analysis.summary(), indent=2, allow_nan=False) + "\n")
    write_text(folder / "learning_curves.csv", as_csv(runs))
    page = folder / "report.html"
    drawn = lines(runs)
    write_text(page, _page(analysis, drawn, folder.resolve().name))
    if drawn and find_spec("matplotlib"):
        draw(drawn, runs.algos, folder / PICTURE)
    return ReportFiles(table, page)


def _page(analysis: Analysis, drawn: list[Line], name: str) -> str:
    from plotly.offline import get_plotlyjs

    runs = analysis.runs
    first = runs.records[0]
    hours = runs.training_hours
    facts = {
        "profile": first["profile"],
        "source": first["source"],
        "base model": first["base"] or "trained from scratch on the task's text",
        "runs": str(len(runs.records)),
        "test prompts": ", ".join(f"{_prompts(runs, task)} {task}" for task in runs.tasks),
        "training": f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes",
        "finished": max(record["finished"] for record in runs.records)[:16].replace("T", " "),
    }
    baselines = [algo for algo in BASELINES if algo in runs.algos][-1:]
    return Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(name),
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        facts="".join(f"<div><dt>{key}</dt><dd>{html.escape(value)}</dd></div>" for key, value in facts.items()),
        results=tables.results(analysis).html(),
        across=tables.aggregate(analysis).html(),
        improvement=_matrix(analysis),
        baselines=_options({algo: algo for algo in runs.algos}, *baselines),
        comparisons=tables.comparisons(analysis, runs.algos).html(),
        points=str(POINTS),
        curves=_options(CURVES),
        axes=_options(AXES),
        panels="".join(
            f'<div data-task="{html.escape(task)}"></div>'
            for task in runs.tasks
            if any(line.task == task for line in drawn)
        ),
        legend="".join(f"<span class={author}>{author}</span> " for author in AUTHORS),
        rollouts="".join(_rollouts(*group) for group in runs.groups()),
        metrics=tables.metrics(analysis).html(),
        costs=tables.costs(analysis).html(),
        details="".join(_details(*group) for group in runs.groups()),
        data=_script_json(_data(analysis, drawn)),
        plotly=get_plotlyjs(),
        script=(PAGE / "script.js").read_text(encoding="utf-8"),
    )


def _options(labels: Mapping[str, str], selected: str | None = None) -> str:
    return "".join(
        f'<option value="{html.escape(key)}"{" selected" if key == selected else ""}>{html.escape(label)}</option>'
        for key, label in labels.items()
    )


def _matrix(analysis: Analysis) -> str:
    """The probability of improvement between every two rows, as a table of coloured cells."""
    table = tables.improvement(analysis)
    if not table.rows:
        return ""
    algos = table.columns[1:]

    def cell(first: str, second: str, text: str) -> str:
        column = f'data-algo="{html.escape(second)}"'
        found = analysis.improvement.get((first, second))
        if found is None:
            return f"<td {column}></td>"
        hue, share = "better" if found.value > 0.5 else "worse", abs(found.value - 0.5) * 90
        title = html.escape(f"P({first} above {second}) = {found:.2f}")
        return (
            f'<td {column} data-value="{found.value:.4f}"{" class=sure" if text.endswith("*") else ""} '
            f'title="{title}" style="--hue:var(--{hue});--share:{share:.0f}%">{found.value:.2f}</td>'
        )

    head = "".join(
        f'<th scope=col aria-sort=none data-algo="{html.escape(algo)}"><button>{html.escape(algo)}</button></th>'
        for algo in algos
    )
    body = "".join(
        f'<tr data-algo="{html.escape(first)}"><th scope=row class=name>{html.escape(first)}</th>'
        + "".join(cell(first, second, str(text)) for second, text in zip(algos, texts, strict=True))
        + "</tr>\n"
        for first, *texts in table.rows
        if isinstance(first, str)
    )
    return (
        f"<h3>{table.title}</h3><figure class=matrix><figcaption>{html.escape(table.note.replace('* marks', 'Bold'))}"
        "</figcaption><div class=scroll tabindex=0><table><thead><tr>"
        f"<th scope=col class=name aria-sort=none><button>algorithm</button></th>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div></figure>"
    )


def _rollouts(task: str, algo: str, group: list[Record]) -> str:
    """Training episodes of which the policy wrote only a part: two of the first seed."""
    return "".join(
        f'<article data-task="{html.escape(task)}" data-algo="{html.escape(algo)}">'
        f"<h4>{html.escape(f'{task}, {algo}, {_opening(rollout)}')} <b>{rollout['reward']:.3f}</b></h4>"
        f"<p><span class=prompt>{html.escape(rollout['prompt'])}</span>{_segments(rollout['segments'])}</p></article>"
        for rollout in group[0]["rollouts"][:2]
    )


def _opening(rollout: Mapping[str, Any]) -> str:
    return f"restart after {rollout['prefix_length']} tokens" if rollout["prefix_length"] else "handed off"


def _segments(segments: Iterable[tuple[str, str]]) -> str:
    """Stretches of text by author; an author that is not known is shown as the policy's."""
    return "".join(
        f"<span class={author if author in AUTHORS else 'policy'}>{html.escape(text)}</span>"
        for author, text in segments
    )


def _details(task: str, algo: str, group: list[Record]) -> str:
    """Everything that made a row's runs what they are: once for seeds that have it in common."""
    blocks = []
    for _, records in itertools.groupby(group, key=lambda record: [record[key] for key in SETTINGS]):
        alike = list(records)
        parts = {key: alike[0][key] for key in SETTINGS}
        parts["runs"] = [
            {key: record[key] for key in ("seed", "final_reward", "best_reward", "reward_parts", "metrics", "seconds")}
            | {"evaluation": {key: part for key, part in record["evaluation"].items() if not isinstance(part, list)}}
            for record in alike
        ]
        body = "".join(
            f"<section><h4>{key.replace('_', ' ')}</h4>"
            f"<pre>{html.escape(json.dumps(value, indent=1, ensure_ascii=False))}</pre></section>"
            for key, value in parts.items()
        )
        seeds = f"seed{'s' if len(alike) > 1 else ''} {', '.join(str(record['seed']) for record in alike)}"
        blocks.append(
            f'<details data-task="{html.escape(task)}" data-algo="{html.escape(algo)}">'
            f"<summary>{html.escape(f'{task} {algo}, {seeds}')}</summary><div class=parts>{body}</div></details>"
        )
    return "".join(blocks)


def _data(analysis: Analysis, drawn: list[Line]) -> dict[str, Any]:
    """What the page's script draws and shows."""
    runs = analysis.runs
    return {
        "tasks": runs.tasks,
        "algos": runs.algos,
        "axes": AXES,
        "curves": CURVES,
        "colours": COLOURS,
        "dashes": DASHES,
        "authors": AUTHORS,
        "lines": [_line(line) for line in drawn],
        "profiles": _profiles(analysis),
        "samples": {task: _samples(runs, task) for task in runs.tasks},
    }


def _line(line: Line) -> dict[str, Any]:
    curves = [curve for curve, values in line.y.items() if np.isfinite(values).any()]
    return {
        "task": line.task,
        "algo": line.algo,
        "x": {axis: [_short(x, 6) for x in values.mean(0)] for axis, values in line.x.items()},
        "y": {curve: _columns(line.over_seeds(curve)) for curve in curves},
        "seeds": [
            {
                "seed": seed,
                "x": {axis: [_short(x, 6) for x in values[row]] for axis, values in line.x.items()},
                "y": {curve: [_short(y) for y in line.y[curve][row]] for curve in curves},
            }
            for row, seed in enumerate(line.seeds)
        ],
    }


def _profiles(analysis: Analysis) -> dict[str, Any] | None:
    """Performance profiles between the lowest and the highest score."""
    scores = [analysis.normalised(task, algo) for algo in analysis.aggregate for task in analysis.scales]
    if not scores:
        return None
    low, high = np.concatenate(scores).min(), np.concatenate(scores).max()
    margin = 0.02 * (high - low) or 0.1
    thresholds = np.linspace(low - margin, high + margin, 101).tolist()
    profiles = analysis.profiles(thresholds)
    return {
        "thresholds": [_short(threshold) for threshold in thresholds],
        "algos": {algo: _columns(profile) for algo, profile in profiles.items()},
    }


def _samples(runs: Runs, task: str) -> list[dict[str, Any]]:
    """The same test prompts under every row and seed."""
    prompts: dict[int, dict[str, Any]] = {}
    for record in (record for algo in runs.algos for record in runs.of(task, algo)):
        for sample in record["samples"]:
            prompt = {key: sample[key] for key in ("sample_id", "prompt")} | {"texts": []}
            text = {key: record[key] for key in ("algo", "seed")} | {key: sample[key] for key in ("reward", "segments")}
            prompts.setdefault(sample["sample_id"], prompt)["texts"].append(text)
    return list(prompts.values())


def _columns(points: Sequence[Interval | None]) -> dict[str, list[float | None]]:
    return {
        end: [None if point is None else _short(getattr(point, end)) for point in points] for end in Interval._fields
    }


def _short(value: float, digits: int = 4) -> float | None:
    """A number in few characters; None for NaN, which JSON lacks."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def _script_json(value: Any) -> str:
    """JSON inside a script element: no character in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _prompts(runs: Runs, task: str) -> int:
    return next(len(record["evaluation"]["rewards"]) for record in runs.records if record["task"] == task)


if __name__ == "__main__":
    import tyro

    written = tyro.cli(write_report, config=(tyro.conf.PositionalRequiredArgs,))
    print(written.table)
    print(written.page)
