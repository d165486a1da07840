"""Trained policies that are small enough for the repository: ``python -m benchmarks.zoo`` makes ``zoo/``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from safetensors.torch import load_file, save_file

import agents
from agents.checkpoint import DESCRIPTION, TRAINING
from benchmarks.comparison.results import read_results, write_text
from benchmarks.run_all import run_all
from textgym.storage import new_folder


class Trained(NamedTuple):
    """Where a policy comes from."""

    profile: str
    task: str
    row: str


ZOO = {
    "commongen-ppo": Trained("quick", "commongen", "ppo"),
    "countdown-grpo": Trained("frontier", "countdown", "grpo"),
}


def make_zoo(out: Path = Path("zoo"), runs: Path = Path("runs/zoo")) -> None:
    """Train every policy of the zoo, and write it with a table of what they are.

    Args:
        out: The folder of the zoo, in which each policy has one of its name.
        runs: The folder of the benchmark's runs, which go on where they were interrupted.

    Raises:
        RuntimeError: A run failed.
    """
    rows = []
    for name, trained in ZOO.items():
        folder = runs / name
        if run_all(trained.profile, tasks=trained.task, algos=trained.row, out=folder):
            raise RuntimeError(f"the run of {name} failed, see {folder}")
        publish(folder / f"{trained.task}-{trained.row}-0" / "last", out / name)
        (record,) = read_results(folder)
        agent = agents.load(out / name)
        reward = agents.evaluate(agent).reward
        size = sum(file.stat().st_size for file in (out / name).iterdir())
        command = f"`--profile {trained.profile} --tasks {trained.task} --algos {trained.row}`"
        rows.append(f"| `{name}` | {command} | {reward:.3f} | {size / 1e6:.1f} | {record['seconds']:.0f} |")
    head = (
        'Trained policies to look at: `agents.load("zoo/commongen-ppo")`. Made by `python -m benchmarks.zoo`, weights '
        "in bfloat16; the test reward is that of the saved weights on the whole test split of the mini data, without a "
        "guide; seconds are those of the run after its warm start.\n\n"
        "| policy | row of run_all.py | test reward | MB | seconds |\n|---|---|---:|---:|---:|\n"
    )
    write_text(out / "README.md", head + "\n".join(rows) + "\n")


def publish(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint without the state of its training and without paths, with weights in bfloat16."""
    with new_folder(folder) as new:
        shutil.copytree(checkpoint, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(TRAINING))
        description = json.loads((new / DESCRIPTION).read_text(encoding="utf-8"))
        description["hyperparameters"]["output_dir"] = None
        write_text(new / DESCRIPTION, json.dumps(description, indent=2))
        for file in new.glob("*.safetensors"):
            weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    tyro.cli(make_zoo)
