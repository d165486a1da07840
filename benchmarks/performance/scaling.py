"""Speed by the size of the work: ``python -m benchmarks.performance.scaling`` measures and draws (extra "plots")."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.comparison.results import write_text
from benchmarks.performance import workload
from benchmarks.performance.measurement import Measurement, measure
from benchmarks.performance.training import best_dtype
from benchmarks.report.plots import figure, save
from textgym.packages import require

# One of these is varied, the others are those of the workload's minibatch.
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"rows": rows} for rows in (7, 28, 112, 448)],
    "new tokens": [{"new": new} for new in (16, 48, 96, 192)],
    "vocabulary": [{"vocab_size": size} for size in (1024, 4096, 16384, 50257)],
    "parameters": [
        {"n_embd": 128, "n_layer": 4, "n_head": 2},
        {"n_embd": 256, "n_layer": 4, "n_head": 4},
        {"n_embd": 512, "n_layer": 8, "n_head": 8},
        {"n_embd": 768, "n_layer": 16, "n_head": 12},
    ],
}
KINDS = {"sample": "sampling", "step": "gradient step"}


def measurements(rows: int = workload.MINIBATCH, new: int = workload.NEW, **size: Any) -> Iterator[Measurement]:
    """Sampling and a gradient step, in tokens a second, each in float32 and at best settings."""
    ids = workload.texts(rows, vocabulary=size.get("vocab_size", workload.VOCABULARY))
    model, seeds = workload.language_model(**size), itertools.count()

    def plain_sample() -> float:
        return workload.written(workload.generate(model, torch.from_numpy(ids), new=new)[:, workload.PROMPT :])

    for best in (False, True):
        settings = f"{best_dtype()}, compiled" if best else "float32"
        writer = workload.policy(best, new=new, **size)

        def ours(writer: Any = writer) -> float:
            return workload.sample(writer, ids, new, next(seeds))

        suffix = "_best" if best else ""
        yield Measurement(f"sample{suffix}", "tokens/s", ours, plain_sample, "generate float32", settings)
        step, plain_step = (
            workload.gradient_step(best, rows, new, **size),
            workload.plain_gradient_step(rows, new, **size),
        )
        yield Measurement(f"step{suffix}", "tokens/s", step, plain_step, "full logits float32", settings)


def figures_of(rounds: int, sweeps: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Figures as `measure` returns them, with "sweep" and "x", the varied size."""
    for sweep in sweeps:
        for point in SWEEPS[sweep]:
            x = (
                workload.language_model(**point).num_parameters()
                if sweep == "parameters"
                else next(iter(point.values()))
            )
            for measurement in measurements(**point):
                yield {"sweep": sweep, "x": x, **measure(measurement, rounds)}


def draw(figures: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens a second against each size, of what `figures_of` yields, as PNG.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    picture = figure(12, 6)
    axes = picture.subplots(len(KINDS), len(SWEEPS), sharey="row")
    for row, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for axis, sweep in zip(row, SWEEPS, strict=True):
            lines = {
                name: [entry for entry in figures if (entry["sweep"], entry["name"]) == (sweep, name)]
                for name in (kind, f"{kind}_best")
            }
            for number, entries in enumerate(lines.values()):
                label = f"textgym, {entries[0]['settings']}"
                axis.plot(*_points(entries, "value"), "o-", color=f"C{number}", label=label, markersize=4)
            plain = lines[kind]
            axis.plot(*_points(plain, "reference_value"), "s--", color="0.5", label="plain, float32", markersize=4)
            axis.set(xscale="log", yscale="log", xlabel=sweep)
            sizes = [entry["x"] for entry in plain]
            axis.set_xticks(sizes, [f"{x / 1e6:.3g}M" if x >= 1e6 else f"{x:,}" for x in sizes])
            axis.minorticks_off()
            axis.grid(alpha=0.3, which="both")
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{title}, tokens/s")
    picture.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    save(picture, path)


def _points(entries: list[dict[str, Any]], value: str) -> tuple[list[float], list[float]]:
    return [entry["x"] for entry in entries], [entry[value] for entry in entries]


def main(rounds: int = 3, sweep: str | None = None, out: Path = Path("docs/scaling.png")) -> None:
    """Measure sampling and gradient steps over texts, new tokens, vocabulary and parameters, and draw them.

    Args:
        rounds: Runs of each, after one that does not count; the median is taken.
        sweep: Measure only this one ("texts", "new tokens", "vocabulary" or "parameters"), and draw the others with the
            figures that are there.
        out: The picture; the figures go beside it, as JSON.

    Raises:
        ValueError: `sweep` is none of these.
    """
    if sweep is not None and sweep not in SWEEPS:
        raise ValueError(f"sweep must be one of {[*SWEEPS]}, got {sweep!r}")
    require("plots", "drawing", "matplotlib")  # now, not after the measurements
    path = out.with_suffix(".json")
    figures = [] if sweep is None else [entry for entry in json.loads(path.read_text()) if entry["sweep"] != sweep]
    for entry in figures_of(rounds, [*SWEEPS] if sweep is None else [sweep]):
        figures.append(entry)
        print(f"{entry['sweep']} {entry['x']}, {entry['name']}: {entry['ratio']:.2f} times as fast", flush=True)
    write_text(path, json.dumps(figures, indent=2) + "\n")
    draw(figures, out)
    print(out)


if __name__ == "__main__":
    from textgym.process import keep_freed_memory

    keep_freed_memory()
    tyro.cli(main)
