"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from conftest import ENV_ID, HORIZON
from gymnasium.envs.registration import registry
from transformers import GPT2Config, GPT2LMHeadModel

from agents import CausalLMPolicy

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Load an example as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


class _Servers(BaseHTTPRequestHandler):
    """Answers as vLLM does: a guide's completions, and the classes of texts, of which the last is their length."""

    asked: ClassVar[dict[str, list]] = {}

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.setdefault(self.path, []).append(body)
        if self.path == "/classify":
            data = [{"index": i, "probs": [1 - len(text) / 99, len(text) / 99]} for i, text in enumerate(body["input"])]
            answer = {"data": data[::-1]}
        else:
            usage = {"prompt_tokens": 1, "completion_tokens": 1}
            answer = {"choices": [{"text": " sun moon star", "index": 0, "finish_reason": "stop"}], "usage": usage}
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


def test_guide_and_reward_are_asked_at_their_servers(example, make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path / "policy")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Servers) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        agent = example("served").main(
            "writer",
            f"{url}/v1",
            "judge",
            url,
            policy=str(tmp_path / "policy"),
            env=ENV_ID,
            episodes_per_iteration=16,
            total_episodes=32,
            output_dir=tmp_path / "run",
        )
        server.shutdown()
    rollout, asked = agent.last_rollout, _Servers.asked
    assert agent.num_guide_tokens > 0
    assert {body["model"] for body in asked["/v1/completions"]} == {"writer"}
    assert [body["model"] for body in asked["/classify"]] == ["judge"] * 2
    texts = [prompt + text for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)]
    assert asked["/classify"][-1]["input"] == texts
    assert rollout.rewards.tolist() == pytest.approx([len(text) / 99 for text in texts])
    assert (tmp_path / "run" / "last").is_dir()


def test_cleanrl_script_runs_on_imdb(example, capsys):
    script = example("cleanrl_ppo")
    history = script.main(script.Args(total_timesteps=2 * 48 * 2, num_envs=2, num_minibatches=2, update_epochs=1))
    assert len(history) == 2
    assert all(0 <= reward <= 1 for reward in history)
    assert "2 episodes" in capsys.readouterr().out


def test_cleanrl_script_learns(example, make_policy, tmp_path):
    make_policy().save_pretrained(tmp_path)
    script = example("cleanrl_ppo")
    updates, rows = 15, 32
    history = script.main(
        script.Args(
            ENV_ID,
            str(tmp_path),
            seed=0,
            total_timesteps=updates * rows * HORIZON,
            num_envs=rows,
            num_steps=HORIZON,
            learning_rate=3e-3,
        )
    )
    assert np.mean(history[-3:]) > np.mean(history[:3]) + 0.3


def test_torchrl_collects_from_imdb(example):
    pytest.importorskip("torchrl", reason="needs torchrl: pip install textgym[torchrl]")
    rewards = example("torchrl_collector").main(frames_per_batch=96, total_frames=192)
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)


def test_torchrl_accepts_every_environment():
    envs = pytest.importorskip("torchrl.envs", reason="needs torchrl: pip install textgym[torchrl]")
    for id in (id for id in registry if id.startswith("textgym/")):
        env = envs.GymEnv(id)
        envs.check_env_specs(env, seed=0)
        env.close()


@pytest.mark.parametrize("number", range(3))
def test_the_ecosystem_page_runs_as_it_stands(number, tmp_path, monkeypatch):
    """With a small model in the place of GPT-2, and less of everything."""
    code = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs/ecosystem.md").read_text(), re.DOTALL)[number]
    env = gym.make(re.search(r"textgym/\w+-v0", code)[0]).unwrapped
    config = GPT2Config(
        vocab_size=len(env.tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    CausalLMPolicy(GPT2LMHeadModel(config), env.tokenizer).save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    for usual, less in (
        ("num_envs=32", "num_envs=4"),
        ("batch_size=768", "batch_size=96"),
        ("batch_size=320", "batch_size=40"),
        ("100_000", "100"),
        ("episodes_per_iteration=64", "episodes_per_iteration=4, minibatch_size=2"),
        ("total_episodes=6400", "total_episodes=4"),
        ("num_prompts=256", "num_prompts=8"),
    ):
        code = code.replace(usual, less)
    namespace: dict = {}
    exec(code, namespace)
    assert namespace.get("model", namespace.get("algorithm")).num_timesteps >= 100
