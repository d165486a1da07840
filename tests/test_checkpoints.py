"""A checkpoint is whole whenever a process dies, belongs to its user, and says which of its files is damaged."""

from __future__ import annotations

import os
import shutil
import stat
from itertools import count

import pytest
import torch
from killing import dies_at
from test_algorithms import GUIDE

from agents import PPO
from agents.checkpoint import TRAINING
from agents.policy import LanguageModelPolicy


@pytest.fixture
def agent(make_env, make_policy):
    return PPO(make_policy(), make_env(8, guide=GUIDE), critic="separate", episodes_per_iteration=8, n_epochs=1)


def state_of(folder, env):
    """The iteration of a checkpoint, and its weights."""
    agent = PPO.load(folder, env)
    models = {"policy": agent.policy, **agent.models()}
    return agent.iteration, {name: model.state_dict() for name, model in models.items()}


def test_a_save_that_is_killed_at_any_call_leaves_a_checkpoint_that_loads(agent, tmp_path):
    folder, known = tmp_path / "last", {}
    for iteration in (1, 2):
        agent.learn(total_episodes=8).save(tmp_path / str(iteration))
        known[iteration] = state_of(tmp_path / str(iteration), agent.env)[1]
    shutil.copytree(tmp_path / "1", folder)
    loaded = {}
    for number in count():
        died = dies_at(number, lambda: agent.save(folder))
        # Loading reads nothing but this, and so need not be tried again for the same.
        found = tuple((path.name, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file())
        if found not in loaded:
            loaded[found], weights = state_of(folder, agent.env)
            torch.testing.assert_close(weights, known[loaded[found]], rtol=0, atol=0)
        if not died:
            break
        if loaded[found] == 2:
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "1", folder)
    assert number > 50
    assert [*loaded.values()] == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "last"}, "leftovers are cleared"


def test_a_checkpoint_that_was_moved_away_when_a_process_died_is_found(agent, tmp_path):
    agent.learn(total_episodes=8).save(tmp_path / "last")
    for load in (lambda path: PPO.load(path, agent.env), LanguageModelPolicy.from_pretrained):
        (tmp_path / "last").rename(tmp_path / ".last-0123456789abcdef-old")
        load(tmp_path / "last")
        assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_checkpoint_has_the_permissions_of_its_user(agent, tmp_path):
    old = os.umask(0o027)
    try:
        agent.save(tmp_path / "last")
    finally:
        os.umask(old)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "last", *(tmp_path / "last").rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o750}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o640}


# What a file of a checkpoint can become, and what it would have been of something else.
DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "two bytes short": lambda content: content[:-2],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"<html>not found</html>",
    "json": lambda content: b"[1, 2]",
}


def test_every_damaged_file_of_a_checkpoint_is_named(agent, tmp_path):
    folder = tmp_path / "last"
    agent.learn(total_episodes=8).save(folder)
    needed = {
        "algorithm.json",
        "config.json",
        "model.safetensors",
        "heads.safetensors",
        "policy.json",
        "tokenizer.json",
    }
    needed |= {f"{TRAINING}/{name}" for name in ("state.pt", "critic.safetensors")}
    silent = set()
    for name in sorted(needed):
        whole = (folder / name).read_bytes()
        for damage, make in DAMAGES.items():
            (folder / name).write_bytes(make(whole))
            try:
                PPO.load(folder, agent.env)
                silent.add((name, damage))
            except ValueError as error:
                assert str(folder) in str(error), (name, damage, error)  # noqa: PT017
                assert name.removesuffix(".json") in str(error), (name, damage, error)  # noqa: PT017
        (folder / name).write_bytes(whole)
    assert not silent
    PPO.load(folder, agent.env)
