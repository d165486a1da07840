"""A benchmark that is killed, whose disk is full and whose guide is silent ends as one that never failed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from soak import FAILURES
from test_schedule import ROOT, numbers

from benchmarks import run_all
from benchmarks.comparison.results import read_results

# What alone fails in an attempt, and often; anything in those with None, nothing in the last one.
ATTEMPTS = ("killed", "full", "silent", None, "nothing")


@pytest.mark.slow
def test_random_kills_silent_guides_and_full_disks_change_no_number(tmp_path, monkeypatch):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    command = [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "--profile", "soak:PROFILE", "--jobs", "2"]
    broken.mkdir()
    calm = {**os.environ, "PYTHONPATH": str(ROOT), "TEXTGYM_CACHE": str(broken / "cache")}
    for only in ATTEMPTS:
        failing = {"SOAK": str(broken)} | ({} if only is None else {"SOAK_ONLY": only})
        done = subprocess.run(
            [*command, "--out", str(broken / "out")],
            env=calm if only == "nothing" else calm | failing,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            break
        assert only != "nothing", done.stdout + done.stderr
    failures = Counter((broken / FAILURES).read_text().split())
    print(failures)
    assert failures.keys() == {"killed", "full", "silent"}

    monkeypatch.setenv("TEXTGYM_CACHE", str(whole / "cache"))
    assert run_all.run_all(profile="soak:PROFILE", jobs=2, out=whole / "out") == 0
    found, expected = (
        {record["algo"]: numbers(record) for record in read_results(folder / "out")} for folder in (broken, whole)
    )
    assert found.keys() == {"sl", "ppo", "ppo++"}
    for algo, record in expected.items():
        for key in record.keys() | found[algo].keys():  # one by one: of a whole record pytest does not say where
            assert found[algo].get(key) == record.get(key), (algo, key)
    for name in ("summary.json", "learning_curves.csv"):
        assert (broken / "out" / name).exists()
    assert not [path for path in broken.rglob(".*") if path.is_dir()], "what dead processes left is cleared"
