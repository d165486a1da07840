"""From `results.jsonl` to a table, learning curves and a page: ``python -m benchmarks.report runs/NAME``."""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.page import PAGE
from benchmarks.results import RESULTS, Record, read_results, write_text
from benchmarks.statistics import mean_interval, paired_difference

# What learning curves are drawn against, and what they show; keys of a run's history.
AXES = {
    "num_episodes": "episodes",
    "num_timesteps": "policy tokens",
    "num_guide_tokens": "guide tokens",
    "seconds": "seconds of training",
}
CURVES = {
    "eval/reward": "validation reward",
    "reward": "training reward",
    "kl": "KL to the start, nats a text",
    "entropy": "entropy, nats a token",
}
# Metrics that show what a reward was bought with; keys of a run's metrics.
FLUENCY = {"perplexity": "perplexity", "distinct_2": "distinct-2"}
# Rows that every other is compared with.
BASELINES = ("sl", "ppo")
AUTHORS = ("prompt", "policy", "guide", "reference", "user")


class ReportFiles(NamedTuple):
    """What `write_report` wrote."""

    table: str
    """The Markdown of `table.md`."""
    page: Path
    """The path of `report.html`."""


@dataclass(frozen=True)
class Table:
    """A table that reads the same in Markdown, in the terminal and on the page; two columns of names, then numbers."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Aligned Markdown, readable as it stands."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]

        def row(cells: Sequence[str]) -> str:
            padded = (
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return f"| {' | '.join(padded)} |"

        rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
        return "\n".join([f"**{self.title}.** {self.note}", "", row(self.columns), row(rule), *map(row, self.rows)])

    def html(self) -> str:
        """A figure with the table; every cell escaped."""
        head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in self.rows
        )
        return (
            f"<figure class=table><figcaption>{html.escape(self.note)}</figcaption>"
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></figure>"
        )


class Runs:
    """Finished runs by task and row, tasks in order of appearance and rows in the profile's order."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.tasks = list(dict.fromkeys(record["task"] for record in self.records))
        places = {record["algo"]: record["place"] for record in self.records}
        self.algos = sorted(places, key=places.__getitem__)

    def of(self, task: str, algo: str) -> list[Record]:
        """The runs of one row on one task, by seed."""
        runs = [record for record in self.records if (record["task"], record["algo"]) == (task, algo)]
        return sorted(runs, key=lambda record: record["seed"])

    def groups(self) -> list[tuple[str, str, list[Record]]]:
        """Every (task, row, runs) that has a run."""
        pairs = itertools.product(self.tasks, self.algos)
        return [(task, algo, runs) for task, algo in pairs if (runs := self.of(task, algo))]


def summary(runs: Runs) -> Table:
    """Mean test reward of every row, what it costs in fluency and diversity, and what it took.

    How far the seeds are apart, and who wrote the test texts, is shown where there is something to show.
    """
    several = any(len(group) > 1 for _, _, group in runs.groups())
    at_test = any(_hands_off(record) or record["hyperparameters"]["best_of"] > 1 for record in runs.records)
    rows = []
    for task, algo, group in runs.groups():
        interval = mean_interval(_rewards(group))
        means = [record["final_reward"] for record in group]
        rows.append(
            [
                task,
                algo,
                f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]",
                *([f"{min(means):.3f} to {max(means):.3f}"] if several else []),
                *(_number(_mean(record["metrics"].get(name) for record in group)) for name in FLUENCY),
                _number(_mean(record["history"][-1].get("kl") if record["history"] else None for record in group)),
                *(_at_test(group) if at_test else []),
                str(len(group)),
                f"{_mean(record['episodes'] for record in group):,.0f}",
                f"{_mean(record['policy_tokens'] for record in group):,.0f}",
                f"{_mean(record['guide_tokens'] for record in group):,.0f}",
                f"{_mean(record['seconds'] for record in group):,.0f}",
            ]
        )
    note = (
        "Test reward of the last checkpoint with a 95% bootstrap interval over prompts; perplexity is under the start "
        "model, KL is to the supervised policy in nats a text at the last iteration, seconds are of training."
    )
    if several:
        note += (
            " The range is that of the seeds' means. Rows that train nothing (sl, best-of) are one supervised policy "
            "with other random numbers at the test, so theirs holds no difference in training; nor does any row's hold "
            "that of the warm start, which all seeds share."
        )
    if at_test:
        note += (
            " Tokens at test are for one prompt, those of texts that were not kept counted. A best-of row keeps the "
            "text with the highest reward, by the very reward it is judged by. Rows that were handed off learned when "
            "to let the guide finish a text; they are tested with the guide, and what its tokens cost is taken from "
            "their test reward and shown as a part of it."
        )
    columns = [
        "task",
        "algorithm",
        "test reward",
        *(["over seeds"] if several else []),
        *FLUENCY.values(),
        "KL",
        *(["policy tokens at test", "guide tokens at test", "handed off"] if at_test else []),
        *("seeds", "episodes", "policy tokens", "guide tokens", "seconds"),
    ]
    return Table("Results", note, columns, rows)


def comparisons(runs: Runs) -> Table:
    """Every row against the baselines: paired difference in reward, and the ratio of fluency and diversity."""
    rows = []
    for task in runs.tasks:
        present = [algo for algo in runs.algos if runs.of(task, algo)]
        baselines = [algo for algo in BASELINES if algo in present] or present[:1]
        others = [algo for algo in present if algo not in baselines]
        for baseline, algo in [*itertools.combinations(baselines, 2), *itertools.product(baselines, others)]:
            first, second = runs.of(task, algo), runs.of(task, baseline)
            if first[0]["evaluation"]["sample_ids"] != second[0]["evaluation"]["sample_ids"]:
                continue
            interval = paired_difference(_rewards(first), _rewards(second))
            verdict = "not told apart"
            if interval.excludes_zero:
                verdict = "above" if interval.mean > 0 else "below"
            rows.append(
                [
                    task,
                    f"{algo} - {baseline}",
                    f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]",
                    verdict,
                    *(_ratio(first, second, metric) for metric in FLUENCY),
                ]
            )
    return Table(
        "Paired comparisons",
        f"Difference in test reward to {' and '.join(BASELINES)} (where neither ran, to the first row) on the same "
        "prompts, with a 95% paired bootstrap interval over prompts, each for itself; perplexity under the start model "
        "and distinct-2 as a ratio to the baseline's.",
        ["task", "difference", "test reward", "verdict", *(f"{label} ratio" for label in FLUENCY.values())],
        rows,
    )


def metrics(runs: Runs) -> Table:
    """Every part of the reward and every metric of the test texts, means over seeds."""
    names = dict.fromkeys(name for record in runs.records for name in _measured(record))
    rows = [
        [
            task,
            algo,
            *(_number(_mean(_measured(record).get(name) for record in group)) for name in names),
            f"{_mean(record['best_reward'] for record in group):.3f}",
        ]
        for task, algo, group in runs.groups()
    ]
    return Table(
        "Metrics",
        "Parts of the reward and metrics of the same test texts; last, the test reward of the checkpoint with the best "
        "validation reward.",
        ["task", "algorithm", *(name.replace("_", " ") for name in names), "best checkpoint"],
        rows,
    )


def learning_curves(runs: Runs) -> str:
    """Every iteration of every run as CSV, a row each: task, algo, seed and the scalars of its history."""
    scalars = dict.fromkeys(
        key
        for record in runs.records
        for entry in record["history"]
        for key, value in entry.items()
        if isinstance(value, int | float)
    )
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["task", "algo", "seed", *scalars], restval="", extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for record in runs.records:
        for entry in record["history"]:
            writer.writerow(entry | {key: record[key] for key in ("task", "algo", "seed")})
    return text.getvalue()


def write_report(folder: str | Path) -> ReportFiles:
    """Write `table.md`, `learning_curves.csv` and `report.html` from the results of a benchmark folder.

    Raises:
        ValueError: The folder holds no finished run.
    """
    folder = Path(folder)
    runs = Runs(read_results(folder))
    if not runs.records:
        raise ValueError(f"{folder / RESULTS} holds no finished run, so there is nothing to report")
    tables = (summary(runs), comparisons(runs), metrics(runs))
    table = "\n\n".join(part.markdown() for part in tables if part.rows) + "\n"
    write_text(folder / "table.md", table)
    write_text(folder / "learning_curves.csv", learning_curves(runs))
    page = folder / "report.html"
    write_text(page, _page(runs, folder.resolve().name))
    return ReportFiles(table, page)


def _page(runs: Runs, name: str) -> str:
    from plotly.offline import get_plotlyjs

    first = runs.records[0]
    facts = {
        "profile": first["profile"],
        "source": first["source"],
        "base model": first["base"] or "trained from scratch on the task's text",
        "runs": str(len(runs.records)),
        "test prompts": ", ".join(f"{_prompts(runs, task)} {task}" for task in runs.tasks),
        "computing": f"{sum(record['seconds'] for record in runs.records) / 60:.0f} minutes",
        "finished": max(record["finished"] for record in runs.records),
    }
    return PAGE.substitute(
        title=html.escape(name),
        facts="".join(f"<div><dt>{key}</dt><dd>{html.escape(value)}</dd></div>" for key, value in facts.items()),
        summary=summary(runs).html(),
        comparisons=comparisons(runs).html(),
        metrics=metrics(runs).html(),
        axes="".join(f"<option value={key}>{label}</option>" for key, label in AXES.items()),
        curves="".join(
            f"<h3>{html.escape(task)}</h3><div class=curves>"
            + "".join(f'<div data-task="{html.escape(task)}" data-curve={key}></div>' for key in CURVES)
            + "</div>"
            for task in runs.tasks
            if any(run["history"] for run in runs.records if run["task"] == task)
        ),
        legend="".join(f"<span class={author}>{author}</span> " for author in AUTHORS),
        samples="".join(_samples(runs, task) for task in runs.tasks),
        rollouts="".join(_rollouts(runs, task) for task in runs.tasks),
        details="".join(_details(record) for record in runs.records),
        data=_script_json(_curve_data(runs)),
        plotly=get_plotlyjs(),
    )


def _samples(runs: Runs, task: str) -> str:
    """The same test prompts under every row, side by side."""
    groups = {algo: group[0]["samples"] for name, algo, group in runs.groups() if name == task}
    by_prompt: dict[int, dict[str, Any]] = {}
    for algo, samples in groups.items():
        for sample in samples:
            by_prompt.setdefault(sample["sample_id"], {})[algo] = sample
    blocks = []
    for sample_id, samples in by_prompt.items():
        prompt = html.escape(next(iter(samples.values()))["prompt"])
        columns = "".join(
            f"<div><h4>{html.escape(algo)} <b>{sample['reward']:.3f}</b></h4>"
            f"<p>{_segments(sample['segments'])}</p></div>"
            for algo, sample in samples.items()
        )
        blocks.append(
            f"<article><p class=asked><small>test prompt {sample_id}</small><span class=prompt>{prompt}</span></p>"
            f"<div class=answers>{columns}</div></article>"
        )
    return f"<h3>{html.escape(task)}</h3>{''.join(blocks)}" if blocks else ""


def _rollouts(runs: Runs, task: str) -> str:
    """A few training episodes of which the policy wrote only a part."""
    blocks = [
        f"<article><h4>{html.escape(algo)}, {_opening(rollout['prefix_length'])} <b>{rollout['reward']:.3f}</b></h4>"
        f"<p><span class=prompt>{html.escape(rollout['prompt'])}</span>{_segments(rollout['segments'])}</p></article>"
        for name, algo, group in runs.groups()
        if name == task
        for rollout in group[0]["rollouts"]
    ]
    return f"<h3>{html.escape(task)}</h3>{''.join(blocks)}" if blocks else ""


def _opening(prefix_length: int) -> str:
    return f"restart after {prefix_length} tokens" if prefix_length else "handed off"


def _segments(segments: Iterable[tuple[str, str]]) -> str:
    """Stretches of text by author; an author that is not known is shown as the policy's."""
    return "".join(
        f"<span class={author if author in AUTHORS else 'policy'}>{html.escape(text)}</span>"
        for author, text in segments
    )


def _details(record: Record) -> str:
    """Everything that makes a run what it is."""
    parts = {key: record[key] for key in ("hyperparameters", "fingerprints", "reward_parts", "metrics", "versions")}
    parts["evaluation"] = {key: value for key, value in record["evaluation"].items() if not isinstance(value, list)}
    body = "".join(
        f"<section><h4>{key.replace('_', ' ')}</h4>"
        f"<pre>{html.escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre></section>"
        for key, value in parts.items()
    )
    name = html.escape(f"{record['task']} {record['algo']}, seed {record['seed']}")
    return f"<details><summary>{name}</summary><div class=parts>{body}</div></details>"


def _curve_data(runs: Runs) -> dict[str, Any]:
    """What the page's script draws: for every run its history as columns."""
    drawn = [
        {
            "task": record["task"],
            "algo": record["algo"],
            "seed": record["seed"],
            "columns": {key: [entry.get(key) for entry in record["history"]] for key in (*AXES, *CURVES)}
            | {"seconds": np.cumsum([entry["seconds"] for entry in record["history"]]).tolist()},
        }
        for record in runs.records
        if record["history"]
    ]
    return {"runs": drawn, "algos": runs.algos, "axes": AXES, "curves": CURVES}


def _script_json(value: Any) -> str:
    """JSON inside a script element: no character in it can end the element."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _measured(record: Record) -> dict[str, float]:
    """Parts of the reward and metrics, by name."""
    return record["reward_parts"] | record["metrics"]


def _hands_off(record: Record) -> bool:
    """Whether the policy can hand off, also at test."""
    return record["hyperparameters"]["env"].get("handoff", False)


def _at_test(group: Sequence[Record]) -> list[str]:
    """Who wrote at test: policy tokens and guide tokens a prompt, and the share of texts handed off."""

    def mean(key: str) -> float:
        return _mean(record["evaluation"][key] / len(record["evaluation"]["rewards"]) for record in group)

    written = f"{mean('policy_tokens'):.1f}"
    if not _hands_off(group[0]):
        return [written, "-", "-"]
    share = _mean(record["evaluation"]["handoff_fraction"] for record in group)
    return [written, f"{mean('guide_tokens'):.1f}", f"{share:.0%}"]


def _rewards(group: Sequence[Record]) -> np.ndarray:
    """Test rewards, (seeds, prompts)."""
    return np.array([record["evaluation"]["rewards"] for record in group])


def _prompts(runs: Runs, task: str) -> int:
    return next(len(record["evaluation"]["rewards"]) for record in runs.records if record["task"] == task)


def _mean(values: Iterable[float | None]) -> float:
    """Mean of the values that are there."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else float("nan")


def _ratio(first: Sequence[Record], second: Sequence[Record], metric: str) -> str:
    above = _mean(record["metrics"].get(metric) for record in first)
    below = _mean(record["metrics"].get(metric) for record in second)
    return _number(above / below) if below else "-"


def _number(value: float) -> str:
    """Three digits or so, a dash where there is no number."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


if __name__ == "__main__":
    import tyro

    written = tyro.cli(write_report, config=(tyro.conf.PositionalRequiredArgs,))
    print(written.table)
    print(written.page)
