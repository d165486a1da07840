"""What `test_processes.py` starts as two processes, and also runs in its own.

    torchrun --standalone --nproc_per_node 2 tests/two_processes.py FOLDER

Each process writes what it saw into FOLDER: of everything, or of one of `AGENTS` that is named after FOLDER.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch
from accelerate import PartialState
from conftest import ENV_ID, HORIZON, PROMPT_TOKENS, WORDS, Notebook
from gymnasium.vector import AutoresetMode
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from agents import ALGORITHMS, CausalLMPolicy
from agents.checkpoint import write_checkpoint
from textgym.guides import CallableGuide, Completion
from textgym.guides.local import LocalGuide
from textgym.seeding import hash64
from textgym.tokenization import train_tokenizer

ROWS, EPISODES = 8, 16  # of all processes
GUIDE = CallableGuide(
    lambda requests: [
        Completion(token_ids=(20 + hash64(r.seed, np.arange(r.max_new_tokens)) % 9).astype(int).tolist())
        for r in requests
    ]
)
# Minibatches of 5 leave one row at the end: then one of two processes has nothing to do.
UNEVEN = {"minibatch_size": 5, "eval_every": 1, "eval_prompts": 9}
AGENTS = {
    "sl": ("sl", {**UNEVEN}),
    "distill": ("sl", {**UNEVEN, "targets": "guide", "samples_per_prompt": 2, "min_reward": 0.0}),
    "ppo": ("ppo", {**UNEVEN, "target_kl": 0.002, "learning_rate": 3e-3}),
    "ppo with all options": (
        "ppo++",
        {**UNEVEN, "critic": "separate", "target_coef": 0.1, "kl_target": 0.05, "gradient_accumulation_steps": 2},
    ),
    "d2lols": ("d2lols", {**UNEVEN, "tau": 1}),
    "gail": ("gail", {**UNEVEN}),
    "rloo": ("rloo", {**UNEVEN, "beta": 0.5}),
    "grpo with adaback and rescue": (
        "grpo",
        {**UNEVEN, "curriculum": "adaback", "dead_groups": "rescue", "success": 0.3},
    ),
    "rloo with other samples": ("rloo", {**UNEVEN, "beta": 0.5, "dead_groups": "resample"}),
    "hpt": ("hpt", {**UNEVEN, "success": 0.3}),
    "mentor": ("mentor", {**UNEVEN, "group_size": 4, "guided_texts": 2}),
    "relift": ("relift", {**UNEVEN, "group_size": 4, "success": 0.3, "buffer_size": 3}),
    "prefix-rft": ("prefix-rft", {**UNEVEN, "group_size": 4}),
    "vine-ppo": ("vine-ppo", {**UNEVEN, "tokens_per_step": 4, "rollouts_per_state": 3}),
    "pav": ("pav", {**UNEVEN, "group_size": 4, "tokens_per_step": 4, "rollouts_per_state": 2}),
    "opd": ("opd", {**UNEVEN, "gamma": 1.0, "reward_coef": 0.5}),
    "gkd": ("gkd", UNEVEN),
}
AGENTS |= {f"{name}, FSDP": AGENTS[name] for name in ("sl", "ppo with all options", "rloo")}
# What `accelerate launch` tells the processes that it starts.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
RECORDED = {"ppo++": {"ent_coef": 0.1}, "aggrevated": {"beta": 0.6}, "rloo": {}, "grpo": {"scale": "batch"}}


def make(name, arguments, rows=ROWS, **env_arguments):
    """An agent with a small model in double precision, in which rounding is no excuse."""
    tokenizer = train_tokenizer([" ".join(WORDS), " " + " ".join(reversed(WORDS))] * 3)
    # Started from other weights in each process: the first one's count.
    torch.manual_seed(PartialState().process_index)
    ids = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos")}
    shape = {"n_positions": PROMPT_TOKENS + HORIZON, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(vocab_size=len(tokenizer), **shape, **ids)
    policy = CausalLMPolicy(GPT2LMHeadModel(config), tokenizer).double()
    guide: CallableGuide | LocalGuide = GUIDE
    if name in ("opd", "gkd"):  # the same in all processes
        torch.manual_seed(2)
        guide = LocalGuide(GPT2LMHeadModel(config).double(), tokenizer=tokenizer)
    env = gym.make_vec(
        ENV_ID,
        num_envs=rows // PartialState().num_processes,
        tokenizer=tokenizer,
        parking=True,
        autoreset_mode=AutoresetMode.DISABLED,
        **{"guide": guide, **env_arguments},
    ).unwrapped
    return ALGORITHMS[name](policy, env, **{"episodes_per_iteration": EPISODES, **arguments})


def numbers(history):
    """A history without its clocks."""
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in history]


def learn(name):
    """Two iterations of one of `AGENTS`."""
    algorithm, arguments = AGENTS[name]
    with patch.dict(os.environ, FSDP if "FSDP" in name else {}):
        return make(algorithm, arguments).learn(total_episodes=1).learn(total_episodes=1)


def in_pieces(agent):
    """The share of its weights that are."""
    return sum(isinstance(weight, DTensor) for weight in agent.trainable) / len(agent.trainable)


def weights(agent):
    """Everything that an agent has learned or learns from, on paper."""
    models = {"policy": agent.policy, **agent.models()}
    return {
        f"{kind}.{name}": weight.detach().clone()
        for kind, model in models.items()
        for name, weight in model.named_parameters()
    }


def judge_recorded(name, file):
    """Losses, and gradients by number, of one step over recorded episodes."""
    whole = {"minibatch_size": EPISODES, "max_grad_norm": 1e9, "n_epochs": 1}
    agent = make(name, {**whole, **RECORDED[name]})
    if not file.exists():
        with file.open("wb") as opened:
            pickle.dump(agent.play(), opened)
    with file.open("rb") as opened:
        rollout = agent.last_rollout = pickle.load(opened)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from who played, so that ratios are not 1 and critics say something
        for parameter in agent.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=random, dtype=torch.float64), alpha=0.05)
    losses = agent.update(rollout, agent.credit(rollout, agent.reference_log_probs(rollout)))
    gradients = {str(i): p.grad for i, p in enumerate(agent.trainable) if p.grad is not None}
    return losses, gradients


def refusal(make_wrong, environment=None):
    """What is said to arguments, or an environment, that do not go with two processes."""
    with patch.dict(os.environ, environment or {}):
        try:
            make_wrong()
        except ValueError as error:
            return str(error)
    return None


def main(folder):
    state = PartialState()
    saw = {"num_processes": state.num_processes, "backend": state.backend, "refused": {}}
    for what, wrong in {
        "episodes_per_iteration": lambda: make("ppo", {"episodes_per_iteration": 12}),
        "device": lambda: make("ppo", {"device": "meta"}),
        "order": lambda: make("ppo", {}, order="sequential"),
        "group_size": lambda: make("rloo", {"episodes_per_iteration": 12}, rows=12),
    }.items():
        saw["refused"][what] = refusal(wrong)

    saw["recorded"] = {}
    for name in RECORDED:
        saw["recorded"][name], gradients = judge_recorded(name, folder / f"{name}.pickle")
        save_file(gradients, folder / f"gradients-{name}-{state.process_index}.safetensors")

    saw["histories"], saw["pieces"] = {}, {}
    for name in AGENTS:
        agent = learn(name)
        saw["histories"][name], saw["pieces"][name] = numbers(agent.history), in_pieces(agent)
        save_file(weights(agent), folder / f"weights-{name}-{state.process_index}.safetensors")
    for name, value in (("VERSION", "1"), ("OFFLOAD_PARAMS", "true"), ("CPU_RAM_EFFICIENT_LOADING", "True")):
        wrong = {**FSDP, f"FSDP_{name}": value}
        saw["refused"][f"fsdp_{name.lower()}"] = refusal(lambda: make("ppo", {}), wrong)

    asked = []
    notes = CallableGuide(lambda requests: asked.extend(r.seed for r in requests) or GUIDE.complete(requests, None))
    make("sl", {"targets": "guide"}, guide=notes)
    saw["asked"] = asked

    for environment, kind in (({}, "whole"), (FSDP, "in pieces")):
        with patch.dict(os.environ, environment):
            saw[kind] = resume(folder / kind)

    agent = make("ppo", {})
    agent.learn(total_episodes=9 * EPISODES, callback=lambda *_: state.is_main_process)  # the other one stops
    saw["stopped_after"] = agent.iteration
    (folder / f"saw-{state.process_index}.json").write_text(json.dumps(saw))


def resume(folder):
    """Whether an agent goes on from a checkpoint as if nothing had been, and who wrote what."""
    notebook, written = Notebook(), []
    agent = make("d2lols", {"tau": 1, "output_dir": folder, "track": [notebook], "eval_every": 2, "eval_prompts": 9})
    spy = patch(
        "agents.algorithm.write_checkpoint",
        lambda path, *rest, **more: (written.append(path.name), write_checkpoint(path, *rest, **more)),
    )
    with spy:
        agent.learn(total_episodes=2 * EPISODES, progress_bar=True)
    agent.output_dir = None
    agent.learn(total_episodes=EPISODES)
    resumed = type(agent).load(folder / "best", agent.env, output_dir=None).learn(total_episodes=EPISODES)
    there = weights(agent)
    return {
        "lines": [values["iteration"] for _, values in notebook.lines],
        "written": written,
        "unbroken": numbers(agent.history),
        "resumed": numbers(resumed.history),
        "same_weights": all(torch.equal(there[name], weight) for name, weight in weights(resumed).items()),
        "in_pieces": in_pieces(resumed),
    }


def main_of_one(folder, name):
    """The short way: one of `AGENTS`."""
    agent, state = learn(name), PartialState()
    saw = {"num_processes": state.num_processes, "in_pieces": in_pieces(agent), "history": numbers(agent.history)}
    (folder / f"saw-{state.process_index}.json").write_text(json.dumps(saw))


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)
    (main if len(sys.argv) == 2 else main_of_one)(Path(sys.argv[1]), *sys.argv[2:])
