"""The page of a report: one HTML file that needs no network."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.comparison.results import Record, Runs
from benchmarks.report import tables
from benchmarks.report.analysis import BASELINES, Analysis
from benchmarks.report.curves import AXES, COLOURS, CURVES, DASHES, POINTS, Level, Line, level
from benchmarks.report.intervals import Interval
from benchmarks.report.table import Cell, Table

# Columns that the page has no need to show: a heading and a choice say what they hold.
NAMED_ELSEWHERE = ("task", "baseline")
AUTHORS = ("prompt", "policy", "guide", "reference", "user")
SETTINGS = ("hyperparameters", "fingerprints", "versions")  # what runs with the same details have in common
OUTCOMES = ("seed", "final_reward", "best_reward", "reward_parts", "metrics", "seconds")
TEMPLATES = Path(__file__).with_name("templates")


def render(analysis: Analysis, lines: Sequence[Line], title: str) -> str:
    """Return the page about runs and their learning curves, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"html_table": html_table, "dumps": json.dumps, "zip": zip}
    runs = analysis.runs
    levels = {task: found for task in runs.tasks if (found := level(runs, task))}
    return environment.get_template("page.html").render(
        title=title,
        style=_asset("style.css"),
        script=_asset("script.js"),
        facts=_facts(runs),
        summary=summary(analysis),
        rows=_descriptions(runs),
        tasks=_tasks(runs),
        **{name: made(analysis) for name, made in tables.TABLES.items() if name != "comparisons"},
        comparisons=tables.comparisons(analysis, runs.algos),
        probabilities=analysis.improvement,
        runs=runs,
        baseline=next((algo for algo in reversed(BASELINES) if algo in runs.algos), None),
        points=POINTS,
        averaged=any(len(record["history"]) > POINTS for record in runs.records),
        levels=levels,
        trained_only=any(
            np.isfinite(line.y["reward"]).any() and not np.isfinite(line.y["eval/reward"]).any() for line in lines
        ),
        curves=CURVES,
        axes=AXES,
        panels=[task for task in runs.tasks if any(line.task == task for line in lines)],
        authors=AUTHORS,
        details=[detail for group in runs.groups() for detail in _details(*group)],
        data=_packed(
            json.dumps(_data(analysis, lines, levels), allow_nan=False, separators=(",", ":"), ensure_ascii=False)
        ),
    )


def _packed(text: str) -> str:
    """A text for the page's script, which unpacks it: a third of its size, and nothing that HTML could read."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _asset(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _facts(runs: Runs) -> dict[str, str]:
    """What the head of the page says about all runs."""
    first, hours = runs.records[0], runs.training_hours
    prompts = {record["task"]: len(record["evaluation"]["rewards"]) for record in reversed(runs.records)}
    return {
        "profile": first["profile"],
        "source": first["source"],
        "base model": first["base"] or "trained from scratch on the task's text",
        "runs": str(len(runs.records)),
        "test prompts": ", ".join(f"{prompts[task]} {task}" for task in runs.tasks),
        "training": f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes",
        "finished": max(record["finished"] for record in runs.records)[:16].replace("T", " "),
    }


def summary(analysis: Analysis) -> list[str]:
    """What was compared, and for each task who has the highest test reward."""
    runs = analysis.runs
    seeds = sorted({len(group) for _, _, group in runs.groups()})
    counted = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    sentences = [
        f"{len(runs.algos)} row{'s are' if len(runs.algos) > 1 else ' is'} compared on {tables.listed(runs.tasks)} "
        f"with {counted} training seed{'s' * (seeds[-1] > 1)}, by the rewards of the same test prompts."
    ]
    for task in runs.tasks:
        rows = [algo for algo in runs.algos if runs.of(task, algo)]
        best = max(rows, key=lambda algo: analysis.reward(task, algo).value)
        alike = [
            algo
            for algo in rows
            if (found := analysis.differences.get((task, best, algo))) and not found.reward.low > 0
        ]
        told = f"; {tables.listed(alike)} cannot be told apart from it there" if alike else ""
        sentences.append(
            f"On {task}, {best} has the highest test reward, {analysis.reward(task, best):.3f}{told}."
            if len(rows) > 1
            else f"On {task}, {best} alone was run, with a test reward of {analysis.reward(task, best):.3f}."
        )
    return sentences


def _descriptions(runs: Runs) -> dict[str, str]:
    """What the algorithm of each row is: the first line of its class's docstring, where it is one of `agents`."""
    from agents import ALGORITHMS

    described = {}
    for record in runs.records:
        name = record["hyperparameters"]["algorithm"]
        algorithm = ALGORITHMS.get(name)
        described[record["algo"]] = ((algorithm and algorithm.__doc__) or name).strip().splitlines()[0]
    return {algo: described[algo] for algo in runs.algos}


def _tasks(runs: Runs) -> dict[str, str]:
    """What each task asks for and what its reward pays, of those whose records say it."""
    found = {}
    for record in runs.records:
        if record.get("about"):
            reward = record["hyperparameters"]["env"].get("reward")
            found[record["task"]] = record["about"] + (f" Here reward={json.dumps(reward)}." if reward else "")
    return {task: found[task] for task in runs.tasks if task in found}


def html_table(table: Table) -> dict[str, Any]:
    """A table as the template wants it: its columns without task and baseline, and its rows grouped by task."""
    grouped = "task" in table.columns[:1]
    groups = itertools.groupby(table.rows, key=lambda row: row[0] if grouped else None)
    return {
        "note": table.note,
        "columns": [column for column in table.columns if column not in NAMED_ELSEWHERE],
        "groups": [(task, list(_html_rows(table, list(rows)))) for task, rows in groups],
    }


def _html_rows(table: Table, rows: Sequence[Sequence[Cell]]) -> Iterator[dict[str, Any]]:
    """Rows of a table; those that are shown together share the scales of their bars.

    Yields:
        The algorithm and the baseline, by which the page filters; and of the other cells the text, the number to sort
        by and the bar.
    """
    places = {column: place for place, column in enumerate(table.columns)}
    baseline = places.get("baseline")
    shown_together: dict[Cell | None, list[Sequence[Cell]]] = {}
    for row in rows:
        shown_together.setdefault(None if baseline is None else row[baseline], []).append(row)
    for group in shown_together.values():
        scales = {column: _scale([row[places[column]] for row in group], mark) for column, mark in table.bars.items()}
        for row in group:
            texts = table.texts(row)
            cells = []
            for column, cell, text in list(zip(table.columns, row, texts, strict=True))[table.names :]:
                bar = _bar(cell, scales[column], table.bars[column]) if column in scales else None
                cells.append((text, _leading_number(text), bar))
            yield {
                "algo": texts[places["algorithm"]],
                "baseline": None if baseline is None else texts[baseline],
                "cells": cells,
            }


def _leading_number(text: str) -> str | None:
    """The number that a cell starts with, by which its column is sorted."""
    found = re.match(r"[+-]?[\d,]*\.?\d+", text)
    return found[0].replace(",", "") if found else None


def _scale(cells: Sequence[Cell], mark: float | None) -> tuple[float, float]:
    """The least and the greatest value to be drawn in a column."""
    values = [value for cell in cells if isinstance(cell, Interval) for value in cell if np.isfinite(value)]
    values += [] if mark is None else [mark]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _bar(cell: Cell, scale: tuple[float, float], mark: float | None) -> dict[str, str]:
    """Where an interval and a mark are drawn, in percent of the cell's width; empty where nothing is."""
    least, most = scale
    if not isinstance(cell, Interval) or most <= least:
        return {}
    value, low, high = cell if np.isfinite(cell.low) else (cell.value,) * 3
    places = {"value": value, "low": low, "high": high} | ({} if mark is None else {"mark": mark})
    return {name: f"{100 * (place - least) / (most - least):.1f}%" for name, place in places.items()}


def _details(task: str, algo: str, group: list[Record]) -> Iterator[dict[str, Any]]:
    """All settings and outcomes of a row's runs; runs with the same settings stand together."""
    for _, records in itertools.groupby(group, key=lambda record: [record[key] for key in SETTINGS]):
        alike = list(records)
        runs = [
            {key: record[key] for key in OUTCOMES}
            | {"evaluation": {key: part for key, part in record["evaluation"].items() if not isinstance(part, list)}}
            for record in alike
        ]
        parts = {key: alike[0][key] for key in SETTINGS} | {"runs": runs}
        yield {"task": task, "algo": algo, "seeds": [record["seed"] for record in alike], "parts": parts}


def _data(analysis: Analysis, lines: Sequence[Line], levels: Mapping[str, Level]) -> dict[str, Any]:
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
        "ran": {task: [algo for algo in runs.algos if runs.of(task, algo)] for task in runs.tasks},
        "lines": [_line(line) for line in lines],
        "levels": {task: found._asdict() | {"reward": _short(found.reward)} for task, found in levels.items()},
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
    """Performance profiles between the lowest and the highest score; None from one seed."""
    scores = [analysis.normalised(task, algo) for algo in analysis.aggregate for task in analysis.scales]
    if not scores or not analysis.runs.several_seeds:
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
    """The same test prompts with the completions of every row and seed."""
    prompts: dict[int, dict[str, Any]] = {}
    for record in (record for algo in runs.algos for record in runs.of(task, algo)):
        for sample in record["samples"]:
            prompt = {key: sample[key] for key in ("sample_id", "prompt")} | {"texts": []}
            text = {key: record[key] for key in ("algo", "seed")} | {key: sample[key] for key in ("reward", "segments")}
            prompts.setdefault(sample["sample_id"], prompt)["texts"].append(text)
    return list(prompts.values())


def _columns(points: Sequence[Interval | None]) -> Mapping[str, list[float | None]]:
    return {
        end: [None if point is None else _short(getattr(point, end)) for point in points] for end in Interval._fields
    }


def _short(value: float, digits: int = 4) -> float | None:
    """A number rounded to a few significant digits; None for NaN, which JSON lacks."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None
