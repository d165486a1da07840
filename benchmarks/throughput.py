"""Measure speed beside references, in turns: ``python benchmarks/throughput.py``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table as ConsoleTable

if TYPE_CHECKING:
    from benchmarks.performance.measurement import Measurement


def throughput(
    only: str | None = None,
    family: Literal["gpt2", "llama"] = "gpt2",
    peers: bool = False,
    rounds: int = 3,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    page: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure, and print a table.

    Args:
        only: Names of figures, or prefixes of names, separated by commas; by default all.
        family: The language model of sampling, updates and iterations; with "llama" only these are measured.
        peers: Measure iterations beside TRL's trainers, each in a virtual environment that is made in the cache,
            instead of a plain loop.
        rounds: Runs of each figure and its reference, after one that does not count; the median is taken.
        json_file: File for the figures, JSON.
        page: File for the table, Markdown.

    Returns:
        The figures.

    Raises:
        ValueError: `rounds` is below 1, `only` names no figure, or `peers` is given with another family than "gpt2".
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if peers and family != "gpt2":
        raise ValueError(f"peers must be False with family={family!r}: they train a GPT-2")
    from benchmarks.comparison.results import write_text
    from benchmarks.performance import environments, processes, training
    from benchmarks.performance.measurement import measure
    from benchmarks.report.table import Table

    wanted = tuple(name.strip() for name in (only or "").split(","))
    kinds: dict[tuple[str, ...], Callable[[], Iterator[Measurement]]] = {
        ("sample",): lambda: training.sampling(family),
        ("update",): lambda: training.updates(family),
        ("iteration",): lambda: training.iterations(peers, rounds, family),
    }
    if family == "gpt2":
        kinds = {
            ("env", "cartpole"): environments.environments,
            **kinds,
            ("mfu",): training.utilisation,
            ("peak_memory",): processes.memory,
            ("process",): processes.processes,
            ("cold_start",): environments.starting,
        }
    console, figures = Console(width=None if sys.stdout.isatty() else 200), []
    for names, kind in kinds.items():
        if any(name.startswith(want) or want.startswith(name) for name in names for want in wanted):
            for measurement in kind():
                if family != "gpt2":
                    measurement = measurement._replace(settings=f"{family}, {measurement.settings}")
                if measurement.name.startswith(wanted):
                    with console.status(measurement.name):
                        figures.append(measure(measurement, rounds))
    if not figures:
        raise ValueError(f"only must name some of the figures, got {only!r}")
    rows = [_row(figure) for figure in figures]
    table = ConsoleTable()
    for column in rows[0]:
        table.add_column(column, no_wrap=column != "settings")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    if json_file is not None:
        write_text(json_file, json.dumps(figures, indent=2) + "\n")
    if page is not None:
        write_text(page, f"# Throughput\n\n{Table.of('Figures', _conditions(rounds), rows).markdown()}\n")
    return figures


def _row(figure: dict[str, Any]) -> dict[str, str]:
    """A figure as the cells of a table, by column."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return {
        "figure": figure["name"],
        "reference": figure["reference"] or "-",
        "ratio": number(figure["ratio"], ".2f"),
        "ours": number(figure["value"], ",.4g"),
        "its value": number(figure["reference_value"], ",.4g"),
        "unit": figure["unit"],
        "settings": figure["settings"],
    }


def _conditions(rounds: int) -> str:
    """How and on what the figures were measured."""
    import torch
    import transformers

    from benchmarks.performance.training import best_dtype

    return (
        f"Medians of {rounds} runs of each after one that does not count, ours and the reference in turns, by "
        f"`python benchmarks/throughput.py {shlex.join(sys.argv[1:])}` on {os.cpu_count()} processors "
        f"({torch.backends.cpu.get_cpu_capability()}; bfloat16 {'is' if best_dtype() == 'bfloat16' else 'is not'} "
        f"fast), {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}. A ratio above 1 says that ours is that many times as fast, or as small."
    )


def main() -> None:
    """Read the command line; a wrong argument ends in one line, not in a traceback."""
    from textgym.process import keep_freed_memory

    keep_freed_memory()
    try:
        tyro.cli(throughput)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
