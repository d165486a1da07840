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

# What alone fails in an attempt, and often; anything in the one with None, nothing in the last one.
ATTEMPTS = (*("killed", "full", "silent") * 2, None, "nothing")


@pytest.mark.slow
def test_random_kills_silent_guides_and_full_disks_change_no_number(tmp_path, monkeypatch):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    broken.mkdir()
    monkeypatch.setenv("TEXTGYM_CACHE", str(broken / "cache"))
    monkeypatch.setenv("SOAK", str(broken))
    for only in ATTEMPTS:
        if only is None:  # what schedules the runs fails, too
            monkeypatch.delenv("SOAK_ONLY")
            command = [sys.executable, ROOT / "benchmarks" / "run_all.py", "--profile", "soak:PROFILE", "--jobs", "2"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [*command, "--out", broken / "out"], env=environment, cwd=Path(__file__).parent
            ).returncode
        else:
            monkeypatch.setenv("SOAK_ONLY", only)
            done = run_all.run_all(profile="soak:PROFILE", jobs=2, out=broken / "out")
        if done == 0:
            break
        assert only != "nothing"
    failures = Counter((broken / FAILURES).read_text().split())
    print(failures)
    assert failures.keys() == {"killed", "full", "silent"}

    monkeypatch.delenv("SOAK")
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
