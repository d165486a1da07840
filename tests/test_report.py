"""The report: every run in it, nothing fetched, everything that came from data escaped; and pages made from results."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import fake_results
import numpy as np
import pytest
from fake_results import record
from scipy import stats

from benchmarks.comparison.results import Runs, append_result, read_results
from benchmarks.report.analysis import Analysis
from benchmarks.report.curves import POINTS, level, lines
from benchmarks.report.findings import Findings, fill_page
from benchmarks.report.page import summary
from benchmarks.report.write import write_report

ATTACK = "<script>alert(1)</script>"
ALGOS = ("sl", "best-of-4", "ppo", "ppo++")


def put(folder, *records):
    for made in records:
        append_result(folder, made)
    return folder


def variant(algo: str, name: str, place: int, seed: int = 0, **evaluation) -> dict:
    """A record under another name and place."""
    made = record(algo, seed, prompts=40) | {"algo": name, "place": place}
    made["evaluation"] |= evaluation
    return made


def cells(table: str, title: str) -> list[dict[str, str]]:
    """A table of the report, a mapping from column to cell for each row."""
    if f"**{title}.**" not in table:
        return []
    block = table.split(f"**{title}.**")[1].split("\n\n")[1].strip().splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block)
    return [dict(zip(header, row, strict=True)) for row in rows]


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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of two seeds of four rows on two tasks, written once."""
    text = f" a\u2028{ATTACK} & <b>b"
    records = [
        record(algo, seed, name=name, text=text, prompts=40)
        for name in ("imdb", ATTACK)
        for algo in ALGOS
        for seed in range(2)
    ]
    return write_report(put(tmp_path_factory.mktemp("report"), *records))


def test_the_page_is_self_contained_and_escapes_what_came_from_data(report):
    page = report.page.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(page)
    assert not [attrs for _, attrs in elements.tags if {"src", "href", "srcset", "data"} & set(attrs)]
    assert "default-src 'none'" in next(attrs["content"] for _, attrs in elements.tags if "http-equiv" in attrs)
    assert [tag for tag, _ in elements.tags].count("script") == 2  # the data, and the page's own
    assert elements.text.count(ATTACK) > 12
    assert page.count("alert(1)</script>") == 0
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_begins_with_what_was_compared_and_who_is_above(tmp_path):
    rewards = np.linspace(0, 1, 40)
    for algo, gain in (("sl", 0.0), ("ppo", 0.3), ("ppo++", 0.3)):
        for seed in range(3):
            noise = np.random.default_rng(seed + 10 * (algo == "ppo++")).normal(0, 0.05, 40)
            made = record(algo, seed, prompts=40)
            made["evaluation"]["rewards"] = (rewards + gain + noise).tolist()
            made["final_reward"] = float(np.mean(rewards + gain + noise))
            put(tmp_path, made)
    said = summary(Analysis(Runs.read(tmp_path)))
    compared = "3 rows are compared on imdb with 3 training seeds, by the rewards of the same test prompts."
    assert said[0] == compared
    assert re.match(r"On imdb, ppo(\+\+)? has the highest test reward, 0.*; ppo(\+\+)? cannot be told apart", said[1])
    assert "sl" not in said[1]
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert compared in page
    assert "Proximal policy optimisation (Schulman et al. 2017" in page


def test_every_run_is_on_the_page_and_authors_are_apart(report):
    elements = Elements()
    page = report.page.read_text(encoding="utf-8")
    elements.feed(page)
    packed = re.search(r"<script id=data type=text/plain>(.*?)</script>", page)[1]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    for task in ("imdb", ATTACK):
        for algo in ALGOS:
            assert f"{task} {algo}, seeds 0, 1" in elements.text
            texts = [text for sample in data["samples"][task] for text in sample["texts"] if text["algo"] == algo]
            assert {text["seed"] for text in texts} == {0, 1}
    assert {(line["task"], line["algo"]) for line in data["lines"]} == {
        (task, algo) for task in ("imdb", ATTACK) for algo in ("ppo", "ppo++")
    }
    classes = {attrs.get("class") for tag, attrs in elements.tags if tag == "span"}
    assert {"prompt", "guide", "policy"} <= classes


@pytest.mark.slow
def test_a_thousand_runs_are_reported_in_half_a_minute_and_three_megabytes(tmp_path):
    fake_results.write(tmp_path, seeds=20)
    assert len(read_results(tmp_path)) == 1020
    begun = time.process_time()
    page = write_report(tmp_path).page
    assert time.process_time() - begun < 30
    assert page.stat().st_size < 3e6


def test_headers_sort_and_say_so(report):
    elements = Elements()
    elements.feed(report.page.read_text(encoding="utf-8"))
    headers = [attrs for tag, attrs in elements.tags if tag == "th" and attrs.get("scope") == "col"]
    assert len(headers) > 30
    assert {attrs["aria-sort"] for attrs in headers} == {"none"}
    names = [tag for tag, _ in elements.tags]
    assert all(names[place + 1] == "button" for place, (_, attrs) in enumerate(elements.tags) if "aria-sort" in attrs)


def test_seeds_that_were_made_otherwise_stand_apart(tmp_path):
    other = record("ppo", 1)
    other["versions"] = {"torch": "another"}
    page = write_report(put(tmp_path, record("ppo", 0), other, record("ppo", 2))).page.read_text(encoding="utf-8")
    assert re.findall(r"<summary>(imdb ppo, .*?)</summary>", page) == [
        "imdb ppo, seed 0",
        "imdb ppo, seed 1",
        "imdb ppo, seed 2",
    ]


def test_the_summary_holds_interquartile_means_of_test_rewards(tmp_path):
    fake_results.write(tmp_path, algos=ALGOS, seeds=5, prompts=20)
    table = write_report(tmp_path).table
    summary = json.loads((tmp_path / "summary.json").read_text())
    runs = Runs(read_results(tmp_path))
    assert {task: [*rows] for task, rows in summary.items()} == {task: [*ALGOS] for task in runs.tasks}
    for task, algo, group in runs.groups():
        entry, rewards = summary[task][algo], [run["final_reward"] for run in group]
        assert [*entry] == ["iqm", "ci_low", "ci_high", "seeds", "metrics"]
        assert entry["iqm"] == pytest.approx(stats.trim_mean(rewards, 0.25))
        assert min(rewards) <= entry["ci_low"] <= entry["iqm"] <= entry["ci_high"] <= max(rewards)
        assert entry["seeds"] == 5
        assert entry["metrics"]["perplexity"] == pytest.approx(np.mean([run["metrics"]["perplexity"] for run in group]))
    first = cells(table, "Results")[0]
    entry = summary["imdb"]["sl"]
    assert first["test reward"] == f"{entry['iqm']:.3f} [{entry['ci_low']:.3f}, {entry['ci_high']:.3f}]"
    assert "75% of cases with 3 and 9" in table  # and 91% or so with 5, by simulation


def test_scores_are_normalised_between_the_supervised_policy_and_best_of_four(tmp_path):
    fake_results.write(tmp_path, algos=ALGOS, seeds=3, prompts=20)
    rows = {row["algorithm"]: row for row in cells(write_report(tmp_path).table, "Across tasks")}
    runs = Runs(read_results(tmp_path))

    def rewards(task, algo):
        return np.array([run["final_reward"] for run in runs.of(task, algo)])

    for algo in ALGOS:
        scores = [
            (rewards(task, algo) - rewards(task, "sl").mean())
            / (rewards(task, "best-of-4").mean() - rewards(task, "sl").mean())
            for task in runs.tasks
        ]
        assert float(rows[algo]["normalised score"].split()[0]) == pytest.approx(
            stats.trim_mean(scores, 0.25, axis=None), abs=0.006
        )
    assert rows["ppo"]["P(better than sl)"].startswith("1.00")
    assert rows["ppo"]["P(better than ppo)"] == "-"


def test_what_lacks_a_reference_is_named_and_left_out(tmp_path):
    put(tmp_path, *(record(algo, seed) for algo in ALGOS for seed in range(2)))
    put(tmp_path, record("sl", 0, "tldr"), record("ppo", 0, "tldr"))
    put(tmp_path, record("ppo", 0, "commongen"), record("gail", 0, "commongen"))
    table = write_report(tmp_path).table
    assert "all runs on imdb:" in table
    assert "Without tldr and commongen, which lacks a run of sl or best-of-4" in table
    assert "left out: gail." in table
    assert [row["normalised"] for row in cells(table, "Results") if row["task"] != "imdb"] == ["-"] * 4

    (tmp_path / "results.jsonl").unlink()
    put(tmp_path, record("sl", 0), record("ppo", 0))
    files = write_report(tmp_path)
    assert "No task has runs of both sl and best-of-4" in files.table
    assert "Across tasks" not in files.page.read_text(encoding="utf-8")  # nothing to show
    assert "normalised" not in cells(files.table, "Results")[0]


def test_one_seed_has_no_interval_and_is_compared_by_prompts(tmp_path):
    table = write_report(put(tmp_path, *(record(algo, 0) for algo in ALGOS))).table
    assert [row["test reward"] for row in cells(table, "Results")] == [
        f"{run['final_reward']:.3f}" for run in read_results(tmp_path)
    ]
    assert "one seed says nothing about others" in table
    assert cells(table, "Probability of improvement") == []
    assert [*cells(table, "Across tasks")[0]] == ["algorithm", "normalised score", "runs"]
    assert all("[" in row["difference"] for row in cells(table, "Paired comparisons"))
    shown = [row for title in ("Results", "Paired comparisons") for row in cells(table, title)]
    assert not any("seeds" in column for row in shown for column in row)
    assert not any({row[column] for row in shown[:4]} == {"-"} for column in shown[0])  # no empty column
    assert json.loads((tmp_path / "summary.json").read_text())["imdb"]["sl"]["ci_low"] is None


def test_the_matrix_has_every_two_rows(report):
    rows = cells(report.table, "Probability of improvement")
    assert [row["algorithm"] for row in rows] == [*ALGOS]
    for row in rows:
        for other in rows:
            first, second = row[other["algorithm"]], other[row["algorithm"]]
            if row is other:
                assert first == "-"
            else:
                assert float(first.strip("*")) + float(second.strip("*")) == pytest.approx(1, abs=0.011)
                assert first.endswith("*") == second.endswith("*")
    assert rows[0]["ppo"] == "0.00*"


def test_metrics_that_could_not_be_measured_are_named_with_the_reason(tmp_path):
    table = write_report(put(tmp_path, record("ppo", 0, "tldr"), record("ppo", 1, "tldr"))).table
    assert "Left out: bert score on tldr (encoder was not given)." in table
    table = write_report(put(tmp_path / "imdb", record("ppo", 0))).table
    assert "Left out" not in table


def test_curves_hold_the_history(report):
    folder = report.page.parent
    runs = read_results(folder)
    with (folder / "learning_curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(run["history"]) for run in runs)
    first = next(run for run in runs if run["algo"] == "ppo")
    of_first = [row for row in rows if (row["task"], row["algo"], row["seed"]) == ("imdb", "ppo", "0")]
    assert [float(row["reward"]) for row in of_first] == [entry["reward"] for entry in first["history"]]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.report.write.find_spec", lambda name: None)
    assert write_report(put(tmp_path, record("ppo", 0))).page.exists()
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("task", ["imdb", "commongen"])  # 32 and 200 iterations
def test_drawn_curves_are_means_of_stretches_of_the_history(task):
    records = [record("ppo++", seed, task, prompts=4) for seed in range(3)]
    runs = [*records, record("sl", 0, task, prompts=4)]
    (line,) = lines(Runs(runs))
    assert (line.algo, line.seeds) == ("ppo++", [0, 1, 2])
    points = line.x["num_episodes"].shape[1]
    assert points == 1 + min(POINTS, len(records[0]["history"]))
    start = level(Runs(runs), task)
    assert start == ("sl", fake_results.TASKS[task][0], True)
    assert not any(values[:, 0].any() for values in line.x.values())  # they begin with the start policy
    assert (line.y["eval/reward"][:, 0] == start.reward).all()
    for row, run in enumerate(records):
        last = run["history"][-1]
        assert line.x["tokens"][row, -1] == last["num_timesteps"] + last["num_guide_tokens"]
        assert line.x["seconds"][row, -1] == pytest.approx(run["seconds"])
        assert np.nanmean(line.y["reward"][row]) == pytest.approx(
            np.mean([entry["reward"] for entry in run["history"]]), abs=0.005
        )
        evaluations = [entry["eval/reward"] for entry in run["history"] if "eval/reward" in entry]
        found = line.y["eval/reward"][row, 1:]
        assert found[np.isfinite(found)] == pytest.approx(evaluations)
    drawn = [point for point in line.over_seeds("eval/reward") if point]
    assert len(drawn) == 1 + len(evaluations)


def test_curves_of_earlier_results_begin_where_they_were_evaluated(tmp_path):
    records = [record(algo, seed) for algo in ("sl", "ppo") for seed in range(2)]
    for made in records:
        made.pop("about")
        made.pop("validation_reward", None)
    started = record("ppo", 0) | {"algo": "ppo-from-base", "place": 3, "about": ""}
    started["hyperparameters"]["start"] = "start_model"
    page = write_report(put(tmp_path, *records, started)).page.read_text(encoding="utf-8")
    runs = Runs.read(tmp_path)
    test_rewards = [run["final_reward"] for run in runs.of("imdb", "sl")]
    assert level(runs, "imdb") == ("sl", pytest.approx(np.mean(test_rewards)), False)
    assert [line.x["num_episodes"][0, 0] > 0 for line in lines(runs)] == [True, True]
    assert "marks the test reward of the policy that others start from" in page
    assert "what its reward pays" not in page

    for made in records:
        made |= {"validation_reward": 0.5} if made["algo"] == "sl" else {}
    newer = Runs([*records, started])
    assert [line.x["num_episodes"][0, 0] > 0 for line in lines(newer)] == [False, True]  # another start


def test_the_page_says_what_tasks_ask_for(tmp_path):
    page = write_report(put(tmp_path, record("sl", 0), record("ppo", 0, "tldr"))).page.read_text(encoding="utf-8")
    described = re.findall(r"<dt>(\w+)</dt><dd>(Write .*?)</dd>", page)
    assert described == [(task, f"Write {task}. Reward: from 0 to 1.") for task in ("imdb", "tldr")]


def test_the_report_depends_on_the_results_alone(report, tmp_path):
    folder = tmp_path / report.page.parent.name  # of the same name, which is the page's title
    folder.mkdir()
    shutil.copy(report.page.parent / "results.jsonl", folder)
    assert write_report(folder).page.read_bytes() == report.page.read_bytes()


def test_rows_stand_in_the_order_of_the_profile_whatever_finished_first(tmp_path):
    for name, place in (("ppo++", 3), ("zz", 0), ("sl", 1), ("aa", 2)):
        append_result(tmp_path, variant("sl", name, place))
    table = write_report(tmp_path).table
    assert [row["algorithm"] for row in cells(table, "Results")] == ["zz", "sl", "aa", "ppo++"]


def test_columns_appear_where_there_is_something_to_show(tmp_path):
    table = write_report(put(tmp_path, record("sl", 0), record("ppo", 0))).table
    assert "handed off" not in table
    table = write_report(put(tmp_path, record("handoff-0", 0))).table
    rows = {row["algorithm"]: row for row in cells(table, "Results")}
    assert rows["handoff-0"]["guide tokens at test"] == "9.0"
    assert rows["handoff-0"]["handed off"] == "40%"
    assert rows["sl"]["guide tokens at test"] == "-"
    costs = {row["algorithm"]: row for row in cells(table, "Costs")}
    assert costs["handoff-0"]["all tokens"] == "223,641"
    assert costs["sl"]["tokens at test"] == "48.0"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["sl", "ppo", "ppo++"], ["ppo - sl", "ppo++ - sl", "ppo++ - ppo"]),
        (["sl", "a", "ppo", "b"], ["a - sl", "ppo - sl", "b - sl", "a - ppo", "b - ppo"]),
        (["ppo", "a", "b"], ["a - ppo", "b - ppo"]),
        (["a", "b", "c"], ["b - a", "c - a"]),
        (["a"], []),
    ],
)
def test_every_row_is_compared_with_the_baselines_and_on_the_page_with_every_row(tmp_path, names, expected):
    for place, name in enumerate(names):
        append_result(tmp_path, variant("sl", name, place))
    files = write_report(tmp_path)
    found = [f"{row['algorithm']} - {row['baseline']}" for row in cells(files.table, "Paired comparisons")]
    assert found == expected
    page = files.page.read_text(encoding="utf-8")
    assert page.count(" data-baseline=") == len(names) * (len(names) - 1)


def test_algorithms_that_met_different_tests_are_not_compared(tmp_path):
    put(tmp_path, record("sl", 0), record("ppo", 0, prompts=30))
    other = record("ppo++", 0)
    other["fingerprints"]["reward"] = "another"
    assert cells(write_report(put(tmp_path, other)).table, "Paired comparisons") == []


def test_only_seeds_that_both_have_are_paired(tmp_path):
    put(tmp_path, *(record("sl", seed) for seed in range(3)), *(record("ppo", seed) for seed in (1, 2, 5)))
    (row,) = cells(write_report(tmp_path).table, "Paired comparisons")
    rewards = {(run["algo"], run["seed"]): run["final_reward"] for run in read_results(tmp_path)}
    expected = np.mean([rewards["ppo", seed] - rewards["sl", seed] for seed in (1, 2)])
    assert row["difference"].split()[0] == f"{expected:+.3f}"
    assert row["seeds above / below"] == "2 / 0 of 2"


def test_results_are_whole_lines_or_nothing(tmp_path):
    append_result(tmp_path, record("sl", 0))
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match="imdb, ppo"):
        append_result(tmp_path, record("ppo", 0) | {"final_reward": float("nan")})
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{half", "SL"], "line 1 is no record of a run .*: delete the line"),
        (["SL", "", "PPO"], "line 2 is no record"),
        (["SL", "\xff\xfe", "PPO"], "line 2 is no record"),
        (["SL", "5"], "line 2 is no record"),
        (["SL", '"text"'], r"line 2 is no record of a run, it lacks \['task', 'algo', "),
        (["SL", "{}"], r"line 2 is no record of a run, it lacks \['task', 'algo', "),
        (["SL", "[1, 2]"], "line 2 is no record of a run, it lacks"),
        (
            ["SL", "NULL"],
            r"line 2 is no record of a run, of a wrong type are \['evaluation', 'history'\]: delete the line",
        ),
        (["SL", "PPO", "SL"], r"lines 1 and 3 are of the same run \('imdb', 'sl', 0\): delete one of them"),
    ],
)
def test_a_damaged_line_is_named_with_what_to_do(tmp_path, lines, message):
    known = {"SL": json.dumps(record("sl", 0)), "PPO": json.dumps(record("ppo", 0))}
    known["NULL"] = json.dumps(record("ppo", 0) | {"history": None, "evaluation": []})
    text = "".join(known.get(line, line) + "\n" for line in lines)
    (tmp_path / "results.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{tmp_path}/results.jsonl {message}"):
        read_results(tmp_path)


def test_a_line_that_is_cut_anywhere_is_dropped_and_its_run_made_again(tmp_path):
    path = put(tmp_path, record("sl", 0), record("ppo", 0)) / "results.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (*range(first + 1, first + 40), *range(first + 40, len(whole) - 1, 997), len(whole) - 2):
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match=f"{path} line 2 is cut: its run is not finished"):
            assert [run["algo"] for run in read_results(tmp_path)] == ["sl"]
        append_result(tmp_path, record("ppo", 0))
        assert path.read_bytes() == whole
    for end in (first, len(whole) - 1, len(whole)):  # nothing is cut here: at most the end of the line is missing
        path.write_bytes(whole[:end])
        assert [run["algo"] for run in read_results(tmp_path)] == ["sl", "ppo"][: 1 + (end > first)]
    append_result(tmp_path, record("ppo", 1))
    assert [run["seed"] for run in read_results(tmp_path)] == [0, 0, 1]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no finished run"):
        fill_page(tmp_path, tmp_path / "page.md")


@pytest.mark.parametrize("damage", ["missing", "empty", "line"])
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, damage):
    folder = tmp_path / "runs"
    message = f"folder must be a folder with the results of a benchmark, got '{folder}'"
    if damage != "missing":
        folder.mkdir()
        message = f"{folder}/results.jsonl holds no finished run, so there is nothing to report"
    if damage == "line":
        (folder / "results.jsonl").write_text("{half\n{}\n")
        message = f"{folder}/results.jsonl line 1 is no record of a run"
    command = [sys.executable, "-m", "benchmarks.report", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"error: {message}")
    assert ended.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Ten rows of three tasks, five seeds each; in truth d2lols and ppo++ are above ppo, and ppo above sl."""
    folder = tmp_path_factory.mktemp("results")
    fake_results.write(folder, algos=("sl", "best-of-4", "ppo", "ppo++", "d2lols", "aggrevated"), prompts=50)
    write_report(folder)
    return folder


def test_a_page_is_begun_and_filled_again(results, tmp_path):
    page = tmp_path / "docs" / "evidence.md"
    fill_page(results, page)
    text = page.read_text()
    assert "90 runs of profile `small`: 6 rows with 5 seeds" in text
    assert (results / "table.md").read_text().split("\n\n")[1] in text  # the table of results
    picture = re.search(r"!\[Learning curves\]\((.*)\)", text)[1]
    assert (page.parent / picture).resolve() == results / "curves.png"

    page.write_text(text.replace("# Evidence", "# Ours\n\nA word of ours."))
    fill_page(results, page)
    assert page.read_text() == text.replace("# Evidence", "# Ours\n\nA word of ours.")


def test_claims_are_judged_by_intervals(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- claims --><!-- / -->")
    fill_page(results, page)
    text = page.read_text()
    summary = json.loads((results / "summary.json").read_text())
    for row, baseline in (("d2lols", "ppo"), ("ppo++", "ppo"), ("ppo", "sl")):
        above = [task for task, rows in summary.items() if rows[row]["ci_low"] > rows[baseline]["ci_high"]]
        heading, found, block = re.search(
            rf"\*\*(`{re.escape(row)}` above `{baseline}`.*?)\*\* \((.*?)\)\.\n\n((?:- .*\n)*)", text
        ).groups()
        assert heading.endswith("holds" if len(above) >= 2 else "does not hold")
        assert found.endswith(f"of {len(summary)} tasks; needed on 2")
        for task in summary:
            sentence = re.search(rf"^- {task}: (.*)$", block, re.MULTILINE)[1]
            assert sentence.startswith("above:" if task in above else "not told apart:")
            entry = summary[task][row]
            assert f"{entry['iqm']:.3f} [{entry['ci_low']:.3f}, {entry['ci_high']:.3f}] over 5 seeds" in sentence
    page.write_text("<!-- claims d2lols ppo --><!-- / -->")
    fill_page(results, page)
    assert page.read_text().count("**`") == 1
    assert re.search(r"\*\*`d2lols` above `ppo`.*?\n\n(- .*\n)*", text)[0] in page.read_text() + "\n"


def test_a_claim_fails_where_perplexity_rises_or_runs_are_missing(tmp_path):
    for seed in range(5):
        put(tmp_path, record("ppo", seed), record("d2lols", seed), record("ppo++", seed))
    worse = read_results(tmp_path)
    for run in worse:
        run["metrics"]["perplexity"] *= 2 if run["algo"] == "d2lols" else 1
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in worse))
    page = tmp_path / "page.md"
    page.write_text("<!-- claims --><!-- / -->")
    fill_page(tmp_path, page)
    first, second, third = re.findall(r"\*\* \((.*)\)\.\n\n- imdb: (.*)", page.read_text())
    assert first[0] == "on none of 1 task; needed on 1"
    assert first[1].startswith("above:")
    assert first[1].endswith("times that of ppo, higher.")
    assert second[0] == "on imdb of 1 task; needed on 1"
    assert third[1] == "no run of sl."


def test_passages_of_one_number_stand_in_sentences(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "PPO gets <!-- reward imdb ppo -->?<!-- / -->, <!-- difference imdb ppo sl -->?<!-- / --> above;\n"
        "normalised <!-- normalised ppo -->?<!-- / -->, P = <!-- improvement ppo sl -->?<!-- / -->,\n"
        "perplexity times <!-- ratio perplexity imdb ppo sl -->?<!-- / -->. <!-- a comment of ours -->\n"
        "In iteration 2: <!-- history seconds imdb ppo 2 -->?<!-- / --> s.\n"
        "Validated: <!-- history eval/reward imdb ppo 8 -->?<!-- / -->\n"
    )
    fill_page(results, page)
    text = re.sub(r"<!-- .*? -->", "", page.read_text())
    entry = json.loads((results / "summary.json").read_text())["imdb"]["ppo"]
    number = r"[+-]?\d\.\d+ \[[+-]?\d\.\d+, [+-]?\d\.\d+\]"
    assert text.startswith(f"PPO gets {entry['iqm']:.3f} [{entry['ci_low']:.3f}, {entry['ci_high']:.3f}], +")
    assert len(re.findall(number, text)) == 5
    seconds = [run["history"][1]["seconds"] for run in Runs.read(results).of("imdb", "ppo")]
    expected = f"{sum(seconds) / 5:.3g} ({min(seconds):.3g} to {max(seconds):.3g}) s."
    assert f"In iteration 2: {expected}" in text
    assert "?" not in text


def nearly(value):
    """A tree of numbers, equal to those that another processor adds up in another order."""
    return {key: nearly(part) for key, part in value.items()} if isinstance(value, dict) else pytest.approx(value)


@pytest.mark.parametrize(
    ("results", "page"), [("small", "evidence"), ("frontier", "frontier"), ("gemma", "stronger_guide")]
)
def test_what_is_published_is_what_the_results_say(results, page, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    folder, page = Path("benchmarks/results", results), Path("docs", f"{page}.md")
    analysis = Analysis(Runs.read(folder))
    published = json.loads((folder / "summary.json").read_text())
    assert published == nearly(json.loads(json.dumps(analysis.summary())))
    text = page.read_text()
    assert Findings(folder, page).fill(text) == text


@pytest.mark.parametrize(
    ("passage", "message"),
    [
        ("<!-- verdict --><!-- / -->", "must be one of .*got 'verdict'"),
        ("<!-- reward imdb grpo --><!-- / -->", "asks for what .* does not have"),
        ("<!-- table losses --><!-- / -->", "asks for what .* does not have"),
        ("<!-- normalised --><!-- / -->", "asks for what .* does not have"),
        ("<!-- history kl imdb ppo 1000 --><!-- / -->", "asks for what .* does not have"),
        ("<!-- claims ppo --><!-- / -->", "asks for what .* does not have"),
        ("<!-- / --> <!-- claims --><!-- / -->", "got 2 of them for 1"),
    ],
)
def test_passages_that_there_are_not_are_refused(results, tmp_path, passage, message):
    page = tmp_path / "page.md"
    page.write_text(passage)
    with pytest.raises(ValueError, match=message):
        fill_page(results, page)
    assert page.read_text() == passage
