"""Every registered environment through both libraries' checkers, and what it costs to make one."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import textgym
from textgym import Guidance
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv

IDS = [id for id in gym.registry if id.startswith("textgym/")]
ROOT = Path(__file__).parents[1]


def a_few_words(requests):
    """A guide that is a pure function of its request, and writes words that every tokenizer has."""
    return [f" {request.prompt.split()[0]}" * (1 + request.seed % 3) for request in requests]


SETTINGS = {
    "no guide": {},
    "restart": {"guide": a_few_words, "guidance": Guidance(restart_prob=0.5)},
    "references": {"guide": "references", "guidance": {"restart_prob": 1.0}},
    "handoff": {"guide": a_few_words, "guidance": Guidance(0.5, None, 0.5), "handoff": True, "handoff_cost": 0.01},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("id", IDS)
@pytest.mark.filterwarnings("error")
def test_checkers_pass_without_a_warning(id, setting):
    check_env(gym.make(id, render_mode="ansi", **SETTINGS[setting]).unwrapped)
    sb3_check_env(gym.make(id, **SETTINGS[setting]).unwrapped, warn=True)


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize(
    ("id", "name", "meant"),
    [
        ("textgym/TLDR-v0", "horizon", "max_new_tokens"),
        ("textgym/IMDB-v0", "max_length", "max_new_tokens"),
        ("textgym/CommonGen-v0", "handoff_costs", "handoff_cost"),
        ("textgym/CombinationLock-v0", "lenght", "length"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_one_that_was_meant(make, id, name, meant):
    with pytest.raises(TypeError, match=rf"\w+Env has no argument '{name}'; did you mean {meant}\?"):
        make(id, **{name: 20})


def test_the_single_environment_shows_the_arguments_of_the_vector_environment():
    single, vector = (inspect.signature(made).parameters for made in (TextEnv, TextVectorEnv))
    assert single.keys() == vector.keys() - {"num_envs", "parking", "autoreset_mode", "copy", "unknown"}
    assert all(single[name].default == vector[name].default for name in single)


@pytest.mark.parametrize("id", IDS)
def test_vector_entry_point_equals_sync_vector_env(id):
    ours = gym.make_vec(id, num_envs=3, guide=a_few_words, guidance=Guidance(0.5, None, 0.5))
    theirs = gym.make_vec(
        id, num_envs=3, vectorization_mode="sync", guide=a_few_words, guidance=Guidance(0.5, None, 0.5)
    )
    obs, infos = ours.reset(seed=1)
    expected_obs, expected_infos = theirs.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(120):
        assert data_equivalence(obs, expected_obs, exact=True)
        assert data_equivalence(infos, expected_infos)  # model rewards to 1e-5
        actions = rng.integers(2, min(300, ours.single_action_space.n), 3)
        obs, rewards, terminations, _, infos = ours.step(actions)
        expected_obs, expected_rewards, expected_terminations, _, expected_infos = theirs.step(actions)
        np.testing.assert_allclose(rewards, expected_rewards, rtol=1e-5)
        np.testing.assert_array_equal(terminations, expected_terminations)


def run_python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_making_needs_no_torch_and_no_import():
    run_python(
        "import gymnasium as gym, sys, textgym.decoding\n"
        "gym.make('textgym:textgym/TLDR-v0').reset(seed=0)\n"
        f"[gym.make_vec(id, num_envs=64).reset(seed=0) for id in {IDS}]\n"
        "assert 'torch' not in sys.modules"
    )


def test_same_seed_gives_the_same_episode_in_another_process(tmp_path):
    code = (
        "import gymnasium as gym, numpy as np, textgym, hashlib\n"
        f"for id in {IDS}:\n"
        "    env = gym.make_vec(id, num_envs=4, guide='references', guidance={'restart_prob': .5})\n"
        "    obs, info = env.reset(seed=3)\n"
        "    rng = np.random.default_rng(0)\n"
        "    digest = hashlib.sha256(obs['input_ids'].tobytes())\n"
        "    for _ in range(120):\n"
        "        obs, reward, *_ = env.step(rng.integers(0, min(300, env.single_action_space.n), 4))\n"
        "        digest.update(obs['input_ids'].tobytes() + np.round(reward, 6).tobytes())\n"
        "    print(id, env.data.fingerprint, len(env.tokenizer), digest.hexdigest())\n"
    )
    # An empty cache in the second process: the tokenizer and the reward are then trained again, to the same values.
    first = run_python(code, PYTHONHASHSEED="1")
    second = run_python(code, PYTHONHASHSEED="2", TEXTGYM_CACHE=str(tmp_path))
    assert first == second


def test_own_task_from_the_readme():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = [snippet for snippet in snippets if "textgym.register" in snippet]
    assert len(snippet.strip().splitlines()) <= 15
    namespace: dict = {}
    exec(snippet, namespace)
    env = namespace["env"]
    check_env(env.unwrapped, skip_render_check=True)


def test_specs_survive_json():
    spec = gym.make("textgym/IMDB-v0", guide="references", guidance={"restart_prob": 0.5}).spec
    again = gym.make(gym.envs.registration.EnvSpec.from_json(spec.to_json()))
    assert again.unwrapped.guidance == Guidance(restart_prob=0.5)
    assert textgym.__all__


def test_the_version_is_that_of_the_distribution():
    assert textgym.__version__ == importlib.metadata.version("textgym")
