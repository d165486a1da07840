"""The report: every run in it, nothing fetched, everything that came from data escaped."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from benchmarks.report import write_report
from benchmarks.results import append_result, read_results

ATTACK = "<script>alert(1)</script>"
ALGOS = ("sl", "ppo", "ppo++")


def record(task: str, algo: str, seed: int, *, text: str = " it was fine", prompts: int = 40) -> dict:
    """A finished run as the runner writes it, with invented numbers."""
    rng = np.random.default_rng([ALGOS.index(algo), seed, len(task)])
    difficulty = np.random.default_rng(len(task)).uniform(0, 0.4, prompts)
    rewards = difficulty + 0.2 * ALGOS.index(algo) + rng.normal(0, 0.05, prompts)
    history = [
        {
            "iteration": i,
            "num_episodes": 32 * (i + 1),
            "num_timesteps": 1000 * (i + 1),
            "num_guide_tokens": 400 * (i + 1) if algo == "ppo++" else 0,
            "seconds": 1.5,
            "reward": 0.3 + 0.02 * i + rng.normal(0, 0.02),
            "kl": 0.01 * i,
            **({"eval/reward": 0.3 + 0.03 * i} if i % 4 == 3 else {}),
            "entropy": 3.0 - 0.03 * i,
        }
        for i in range(0 if algo == "sl" else 20)
    ]
    sample = {
        "sample_id": 7,
        "prompt": f"{text} The plot",
        "reward": float(rewards[0]),
        "segments": [["policy", text]],
    }
    rollout = {"prompt": text, "prefix_length": 3, "reward": 0.5, "segments": [["guide", text], ["policy", text]]}
    return {
        "task": task,
        "algo": algo,
        "seed": seed,
        "place": ALGOS.index(algo),
        "profile": "quick",
        "source": "mini",
        "base": None,
        "final_reward": float(rewards.mean()),
        "best_reward": float(rewards.mean()),
        "reward_parts": {"sentiment": float(rewards.mean())},
        "metrics": {"perplexity": 20.0 + ALGOS.index(algo), "distinct_2": 0.5},
        "policy_tokens": 20_000,
        "guide_tokens": 8_000 if algo == "ppo++" else 0,
        "episodes": 640 if history else 0,
        "seconds": 30.0,
        "hyperparameters": {"algorithm": algo, "best_of": 1, "env": {}, "learning_rate": 1e-4, "note": text},
        "fingerprints": {"data": "0123456789abcdef"},
        "versions": {"torch": "0"},
        "evaluation": {
            "seed": 1,
            "sample_ids": list(range(prompts)),
            "rewards": rewards,
            "policy_tokens": 20 * prompts,
            "guide_tokens": 0,
            "handoff_fraction": 0.0,
        },
        "history": history,
        "samples": [sample],
        "rollouts": [rollout] if algo == "ppo++" else [],
        "finished": "2026-01-01 00:00:00",
    }


class Elements(HTMLParser):
    """Start tags with their attributes, and the text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.text += data


@pytest.fixture
def folder(tmp_path):
    for task in ("imdb", ATTACK):
        for algo in ALGOS:
            for seed in range(2):
                append_result(tmp_path, record(task, algo, seed, text=f" a\u2028{ATTACK} & <b>b"))
    return tmp_path


def test_the_page_is_self_contained_and_escapes_what_came_from_data(folder):
    page = write_report(folder).page.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(page)
    assert not [attrs for _, attrs in elements.tags if {"src", "href", "srcset", "data"} & set(attrs)]
    assert "default-src 'none'" in next(attrs["content"] for _, attrs in elements.tags if "http-equiv" in attrs)
    assert [tag for tag, _ in elements.tags].count("script") == 3  # the data, plotly, and the page's own
    assert elements.text.count(ATTACK) > 12
    assert page.count("alert(1)</script>") == 0
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_every_run_is_on_the_page_and_authors_are_apart(folder):
    files = write_report(folder)
    elements = Elements()
    elements.feed(files.page.read_text(encoding="utf-8"))
    for algo in ALGOS:
        for seed in range(2):
            assert f"imdb {algo}, seed {seed}" in elements.text
        assert any(line.split()[1:4:2] == ["imdb", algo] for line in files.table.splitlines())
    classes = {attrs.get("class") for tag, attrs in elements.tags if tag == "span"}
    assert {"prompt", "guide", "policy"} <= classes


def test_the_table_and_the_curves_hold_the_results(folder):
    files = write_report(folder)
    assert "ppo++ - ppo" in files.table
    assert "above" in files.table
    runs = [run for run in read_results(folder) if (run["task"], run["algo"]) == ("imdb", "ppo")]
    assert f"{np.mean([run['final_reward'] for run in runs]):.3f} [" in files.table
    with (folder / "learning_curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(run["history"]) for run in read_results(folder))
    assert float(rows[0]["reward"]) == pytest.approx(runs[0]["history"][0]["reward"], abs=1)


def test_the_report_depends_on_the_results_alone(folder):
    first = write_report(folder)
    page = first.page.read_bytes()
    first.page.unlink()
    assert write_report(folder).page.read_bytes() == page


def cells(table: str, title: str) -> list[dict[str, str]]:
    """A table of the report, a mapping from column to cell for each row."""
    block = table.split(f"**{title}.**")[1].split("\n\n")[1].strip().splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
    return [dict(zip(header, row, strict=True)) for row in rows]


def variant(algo: str, name: str, place: int, **evaluation) -> dict:
    """A record under another name and place."""
    made = record("imdb", algo, 0) | {"algo": name, "place": place}
    made["evaluation"] |= evaluation
    return made


def test_rows_stand_in_the_order_of_the_profile_whatever_finished_first(tmp_path):
    for name, place in (("ppo++", 3), ("zz", 0), ("sl", 1), ("aa", 2)):
        append_result(tmp_path, variant("sl", name, place))
    table = write_report(tmp_path).table
    assert [row["algorithm"] for row in cells(table, "Results")] == ["zz", "sl", "aa", "ppo++"]


def test_columns_appear_where_there_is_something_to_show(tmp_path):
    for algo in ("sl", "ppo"):
        append_result(tmp_path, record("imdb", algo, 0))
    table = write_report(tmp_path).table
    assert "at test" not in table
    assert "over seeds" not in table

    handoff = variant("ppo", "handoff-0", 5, guide_tokens=180, handoff_fraction=0.4)
    handoff["hyperparameters"]["env"] = {"handoff": True}
    append_result(tmp_path, handoff)
    append_result(tmp_path, record("imdb", "ppo", 1))
    rows = {row["algorithm"]: row for row in cells(write_report(tmp_path).table, "Results")}
    assert rows["handoff-0"]["guide tokens at test"] == "4.5"
    assert rows["handoff-0"]["handed off"] == "40%"
    assert rows["sl"]["policy tokens at test"] == "20.0"
    assert rows["sl"]["guide tokens at test"] == "-"
    means = sorted(run["final_reward"] for run in read_results(tmp_path) if run["algo"] == "ppo")
    assert rows["ppo"]["over seeds"] == f"{means[0]:.3f} to {means[1]:.3f}"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sl", "ppo", "ppo++"], ["ppo - sl", "ppo++ - sl", "ppo++ - ppo"]),
        (["sl", "a", "ppo", "b"], ["ppo - sl", "a - sl", "b - sl", "a - ppo", "b - ppo"]),
        (["ppo", "a", "b"], ["a - ppo", "b - ppo"]),
        (["a", "b", "c"], ["b - a", "c - a"]),
        (["a"], []),
    ],
)
def test_every_row_is_compared_with_the_baselines(tmp_path, names, expected):
    for place, name in enumerate(names):
        append_result(tmp_path, variant("sl", name, place))
    table = write_report(tmp_path).table
    found = [row["difference"] for row in cells(table, "Paired comparisons")] if expected else []
    assert found == expected
    assert ("Paired" in table) == bool(expected)


def test_algorithms_on_different_prompts_are_not_compared(tmp_path):
    append_result(tmp_path, record("imdb", "sl", 0))
    append_result(tmp_path, record("imdb", "ppo", 0, prompts=30))
    assert "ppo - sl" not in write_report(tmp_path).table


def test_results_are_whole_lines_or_nothing(tmp_path):
    append_result(tmp_path, record("imdb", "sl", 0))
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match="imdb, ppo"):
        append_result(tmp_path, record("imdb", "ppo", 0) | {"final_reward": float("nan")})
    assert (tmp_path / "results.jsonl").read_bytes() == before
    (tmp_path / "results.jsonl").write_text(json.dumps({"task": "imdb"}) + "\n{half")
    with pytest.raises(ValueError, match="line 2"):
        read_results(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        write_report(tmp_path)
