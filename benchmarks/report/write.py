"""Write tables, curves and a page from `results.jsonl`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.comparison.results import Runs, write_text
from benchmarks.report import page
from benchmarks.report.analysis import Analysis
from benchmarks.report.curves import as_csv, draw, lines
from benchmarks.report.tables import TABLES

SUMMARY = "summary.json"
PICTURE = "curves.png"


class ReportFiles(NamedTuple):
    """What `write_report` wrote: the Markdown of `table.md`, and the path of `report.html`."""

    table: str
    page: Path


def write_report(folder: str | Path) -> ReportFiles:
    """Write a benchmark folder's `table.md`, `summary.json`, `learning_curves.csv` and `report.html` from its results.

    Where matplotlib is installed and a run has learning curves, `curves.png` too.

    Raises:
        ValueError: The folder holds no finished run.
    """
    folder = Path(folder)
    runs = Runs.read(folder)
    analysis = Analysis(runs)
    shown = [made(analysis) for made in TABLES.values()]
    table = "\n\n".join(part.markdown() for part in shown if part.rows or part.title == "Across tasks") + "\n"
    write_text(folder / "table.md", table)
    write_text(folder / SUMMARY, json.dumps(analysis.summary(), indent=2, allow_nan=False) + "\n")
    write_text(folder / "learning_curves.csv", as_csv(runs))
    drawn = lines(runs)
    html = folder / "report.html"
    write_text(html, page.render(analysis, drawn, folder.resolve().name))
    if drawn and find_spec("matplotlib"):
        draw(drawn, runs.algos, folder / PICTURE)
    return ReportFiles(table, html)
