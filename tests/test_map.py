"""The map of what pays where: winners, ties, and cells in which nothing is above the start."""

import numpy as np
import pytest
import tyro
from fake_results import record

from benchmarks.comparison.jobs import resolve
from benchmarks.comparison.results import Runs, append_result
from benchmarks.profiles.frontier import FRONTIER, MAP, SEARCH
from benchmarks.report.analysis import Analysis
from benchmarks.report.map import Cell, cells, main

PROMPTS = 200
# The share of the test prompts that each row solves.
SOLVED = {
    "weak": {"start": 0.0, "grpo": 0.0, "distill@0.6": 0.0, "rescue@0.6": 0.3, "distill@1": 0.8, "rescue@1": 0.4},
    "strong": {"start": 0.4, "grpo": 0.9, "distill@0.6": 0.1, "rescue@0.6": 0.9, "distill@1": 0.8, "rescue@1": 0.9},
    "stuck": {"start": 0.4, "grpo": 0.4, "distill@0.6": 0.2, "rescue@0.6": 0.4, "distill@1": 0.4, "rescue@1": 0.4},
}


def records(solved=SOLVED):
    """Runs that solve the first so many prompts, with one seed."""
    made = []
    for task, rows in solved.items():
        for place, (algo, share) in enumerate(rows.items()):
            rewards = (np.arange(PROMPTS) < share * PROMPTS).astype(float)
            run = record("ppo", 0, name=task, prompts=PROMPTS)
            run["evaluation"]["rewards"] = rewards.tolist()
            made.append(run | {"algo": algo, "place": place, "final_reward": float(rewards.mean())})
    return made


def test_each_cell_has_the_best_methods_of_its_guide_and_those_without_one():
    assert cells(Analysis(Runs(records()))) == {
        ("weak", "0.6"): Cell(0.3, ["rescue"]),
        ("weak", "1"): Cell(0.8, ["distill"]),
        ("strong", "0.6"): Cell(0.9, ["grpo", "rescue"]),
        ("strong", "1"): Cell(0.9, ["grpo", "rescue"]),
        ("stuck", "0.6"): Cell(0.4, []),
        ("stuck", "1"): Cell(0.4, []),
    }


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for run in records():
        append_result(tmp_path, run)
    tyro.cli(main, args=[str(tmp_path), "--out", str(tmp_path / "map.png")])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_has_not_run_leaves_its_cell_out_and_other_seeds_are_not_compared():
    partly = cells(Analysis(Runs(records({"weak": {"start": 0.0, "distill@1": 0.8}, "new": {"start": 0.0}}))))
    assert [*partly] == [("weak", "1")]
    runs = records({"weak": {"start": 0.0, "distill@1": 0.8}})
    runs[0]["seed"] = 1
    with pytest.raises(ValueError, match="task weak must have a run of distill@1 and of start with one seed"):
        cells(Analysis(Runs(runs)))


@pytest.mark.parametrize("profile", [FRONTIER, SEARCH, MAP], ids=lambda profile: profile.name)
def test_every_row_of_the_frontier_can_be_run(profile):
    assert len(resolve(profile, None, {})) == len(profile.tasks) * len(profile.rows)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="task weak must have a run of the row 'start'"):
        cells(Analysis(Runs(records({"weak": {"grpo": 0.5, "distill@1": 0.5}}))))
    with pytest.raises(ValueError, match=r"rows must be named METHOD@GUIDE, got \['start', 'grpo'\]"):
        cells(Analysis(Runs(records({"weak": {"start": 0.5, "grpo": 0.5}}))))
