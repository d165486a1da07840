"""What is trained once and kept: whatever is damaged there is made again, and two benchmarks share it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import plugins
import pytest
from conftest import TASK
from killing import forked
from test_checkpoints import DAMAGES

from benchmarks.comparison.warm_start import warm_start
from textgym.rewards.trained import load_or_train
from textgym.tokenization import load_tokenizer


def reward(_: Path) -> str:
    trained = load_or_train("kind", {"data": "words"}, lambda: ({"weights": np.arange(9.0)}, {"accuracy": 0.9}))
    return f"{trained.arrays['weights'].tolist()} {trained.report} {trained.fingerprint}"


def tokenizer(_: Path) -> str:
    return str(sorted(load_tokenizer(None, TASK, "mini").get_vocab().items()))


def models(out: Path) -> str:
    return str(warm_start(plugins.WORDS, "mini", None, 0, lambda *_: None, out).fingerprints)


@pytest.mark.parametrize(
    ("make", "kinds", "files"),
    [
        (reward, ["rewards"], ["weights.safetensors", "report.json"]),
        (tokenizer, ["tokenizers"], ["tokenizer.json", "tokenizer_config.json"]),
        (models, ["start_models", "warm_starts"], ["model/model.safetensors", "model/config.json", "history.json"]),
    ],
    ids=["rewards", "tokenizers", "warm starts"],
)
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, make, kinds, files):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path / "cache"))
    whole = make(tmp_path / "out")
    few = dict(list(DAMAGES.items())[:2]) if make is models else DAMAGES  # they take a second each
    for kind in kinds:
        (folder,) = (path for path in (tmp_path / "cache" / kind).iterdir() if path.is_dir())
        for name in files:
            content = (folder / name).read_bytes()
            for damage, damaged in few.items():
                (folder / name).write_bytes(damaged(content))
                with pytest.warns(UserWarning, match=f"{folder} is damaged and is made again"):
                    assert make(tmp_path / "out") == whole, (name, damage)
                assert make(tmp_path / "out") == whole
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_recipe_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path))
    load_or_train("kind", {"data": "other"}, lambda: ({"weights": np.zeros(1)}, {}))
    (foreign,) = (path for path in (tmp_path / "rewards").iterdir() if path.is_dir())
    whole = reward(tmp_path)
    (own,) = (path for path in (tmp_path / "rewards").iterdir() if path.is_dir() and path != foreign)
    for name in ("report.json", "weights.safetensors"):
        (own / name).write_bytes((foreign / name).read_bytes())
    with pytest.warns(UserWarning, match="is damaged and is made again: it was made by another recipe"):
        assert reward(tmp_path) == whole


def test_two_processes_at_once_share_one_warm_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path / "cache"))

    def make(name: str) -> None:
        start = warm_start(plugins.WORDS, "mini", None, 0, lambda *_: None, tmp_path)
        (tmp_path / name).write_text(json.dumps([start.fingerprints, start.history]))

    with forked(lambda: make("first")) as first, forked(lambda: make("second")) as second:
        assert [os.waitpid(pid, 0)[1] for pid in (first, second)] == [0, 0]
    # The history has seconds: it is of one training.
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text()


@pytest.mark.parametrize("make", [reward, tokenizer, models], ids=["rewards", "tokenizers", "warm starts"])
def test_where_the_cache_cannot_be_written_the_same_is_made(tmp_path, monkeypatch, make):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path / "cache"))
    whole = make(tmp_path / "out")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written, so that what belongs there is kept"):
        assert make(tmp_path / "out") == whole
    # Other processes of a benchmark need the models, and find them beside its results.
    assert (tmp_path / "out" / "warm_starts").exists() == (make is models)
