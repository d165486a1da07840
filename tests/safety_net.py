"""Every number of every algorithm on mini data, to the last bit: for changes that must not change any.

python tests/safety_net.py before.json                          before the change, some minutes
python tests/safety_net.py after.json --same-as before.json     after it; exits with 1 where a number is another

It uses the package as its users do, so that a copy of it also runs on other commits. Numbers depend on the processor
and the versions of libraries: compare files from one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, LlamaConfig, T5Config

import textgym  # noqa: F401  # registers the environments
from agents import ALGORITHMS, CausalLMPolicy, Seq2SeqPolicy, TabularPolicy, evaluate
from textgym.decoding import Decoding
from textgym.guides.local import LocalGuide

LOCK = "textgym/CombinationLock-v0"
TASKS = ("textgym/IMDB-v0", "textgym/CommonGen-v0", "textgym/TLDR-v0")
ROWS, PROMPT, NEW = 8, 64, 12
PLAIN = {"episodes_per_iteration": 2 * ROWS, "minibatch_size": ROWS, "seed": 5, "device": "cpu"}
# What an algorithm can be beside its defaults: (its name, arguments of it, of the environment, of the policy).
VARIANTS = {
    "ppo, hand-off": ("ppo", {"ent_coef": 0.01, "kl_penalty": "loss"}, {"handoff": True}, {"handoff_prob": 0.2}),
    "ppo, separate critic, schedules": (
        "ppo",
        {"critic": "separate", "lr_schedule": "cosine", "clip_schedule": "linear", "schedule_episodes": 64},
        {},
        {},
    ),
    "ppo, demonstrations": ("ppo", {"target_coef": 0.1, "kl_target": 0.1}, {}, {}),
    "ppo, top-k and a least length": ("ppo", {"decoding": Decoding(top_k=50, top_p=0.9, min_new_tokens=4)}, {}, {}),
    "lols, separate critic": ("lols", {"critic": "separate", "tau": 0.5}, {}, {}),
    "d2lols that switches": ("d2lols", {"tau": 1, "gradient_accumulation_steps": 2}, {}, {}),
    "rloo, guided": ("rloo", {"beta": 0.7, "n_epochs": 2}, {}, {}),
    "grpo, guided": ("grpo", {"beta": 1.0}, {}, {}),
    "ppo, stop strings": (
        "ppo",
        {},
        {"stop": ["."], "template": "Well, {prompt}", "max_prompt_tokens": PROMPT + 8},
        {},
    ),
}


def language_model(env: Any, seed: int, family: str = "gpt2") -> Any:
    """A tiny one with random weights."""
    torch.manual_seed(seed)
    width = env.max_prompt_tokens + env.max_new_tokens
    ends: dict[str, Any] = {"bos_token_id": env.eos_token_id, "eos_token_id": env.eos_token_id}
    if family == "t5":
        config: Any = T5Config(
            vocab_size=env.vocab_size, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2,
            pad_token_id=env.pad_token_id, decoder_start_token_id=env.pad_token_id, **ends,
        )  # fmt: skip
        return AutoModelForSeq2SeqLM.from_config(config).eval()
    if family == "llama":
        config = LlamaConfig(
            vocab_size=env.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=width, **ends,
        )  # fmt: skip
    else:
        config = GPT2Config(vocab_size=env.vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=width, **ends)
    return AutoModelForCausalLM.from_config(config).eval()


def make(task: str, **arguments: Any) -> Any:
    """An environment as algorithms want it."""
    size = {} if task == LOCK else {"max_prompt_tokens": PROMPT, "max_new_tokens": NEW}
    how = {"num_envs": ROWS, "parking": True, "autoreset_mode": AutoresetMode.DISABLED, "source": "mini"}
    return gym.make_vec(task, **{**how, **size, **arguments}).unwrapped


def trained(
    task: str,
    algorithm: str,
    arguments: dict[str, Any],
    of_env: dict[str, Any],
    of_policy: dict[str, Any],
    family: str = "gpt2",
) -> dict[str, Any]:
    """The numbers of a short training, and of evaluations of what it made."""
    guide: Any = {"dr-po": "references", "sl": None}.get(algorithm, "model")
    if guide == "model":
        plain = make(task, **{key: value for key, value in of_env.items() if key != "handoff"})
        guide = LocalGuide(language_model(plain, 1), tokenizer=plain.tokenizer, device="cpu")
    env = make(task, guide=guide, **of_env)
    kind = Seq2SeqPolicy if family == "t5" else CausalLMPolicy
    policy = kind(language_model(env, 0, family), env.tokenizer, **of_policy)
    agent = ALGORITHMS[algorithm](policy, env, eval_every=2, eval_prompts=ROWS, **PLAIN, **arguments)
    agent.learn(total_episodes=3 * PLAIN["episodes_per_iteration"])
    numbers = {"history": agent.history, "weights": digest_of(agent.policy.state_dict())}
    for decoding in (
        Decoding(),
        Decoding(greedy=True),
        *([] if agent.policy.can_hand_off else [Decoding(num_beams=2)]),
    ):
        result = evaluate(agent, task, num_prompts=ROWS, decoding=decoding, **evaluation(env, of_env))
        ids = [list(map(int, line)) for line in result.token_ids]
        numbers[str(decoding)] = {"rewards": result.rewards.tolist(), "metrics": dict(result.metrics), "ids": ids}
    return numbers


def evaluation(env: Any, of_env: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation makes its environment with."""
    guide = {"guide": env.guide} if "handoff" in of_env else {}
    size = {"max_prompt_tokens": env.max_prompt_tokens, "max_new_tokens": env.max_new_tokens}
    return {"source": "mini", "tokenizer": env.tokenizer, **size, **guide, **of_env}


def opened(algorithm: str, **of_env: Any) -> dict[str, Any]:
    """A tabular policy on the combination lock, whose guide is scripted."""
    env = make(LOCK, **of_env)
    agent = ALGORITHMS[algorithm](TabularPolicy.for_lock(env.lock), env, **PLAIN)
    agent.learn(total_episodes=6 * PLAIN["episodes_per_iteration"])
    return {"history": agent.history, "weights": digest_of(agent.policy.state_dict())}


def digest_of(state: dict[str, torch.Tensor]) -> str:
    """Changes with any bit of any weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(state.items()):
        digest.update(name.encode() + weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def runs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Everything that is run, by name."""
    for algorithm in sorted(ALGORITHMS):
        for task in TASKS:
            yield f"{algorithm} on {task}", partial(trained, task, algorithm, {}, {}, {})
    for name, how in VARIANTS.items():
        yield name, partial(trained, TASKS[0], *how)
    for family in ("llama", "t5"):
        for algorithm in ("sl", "ppo", "aggrevated", "ppo++"):
            yield f"{algorithm}, {family}", partial(trained, TASKS[1], algorithm, {}, {}, {}, family)
    for algorithm in sorted(set(ALGORITHMS) - {"sl", "dr-po", "gail", "opd", "gkd"}):
        for fork in (False, True):
            yield f"{algorithm} on the lock, fork={fork}", partial(opened, algorithm, fork=fork)


def exact(value: Any) -> Any:
    """Plain data in which every bit of a number shows, without clocks."""
    if isinstance(value, dict):
        return {str(key): exact(part) for key, part in value.items() if "seconds" not in str(key)}
    if isinstance(value, list | tuple):
        return [exact(part) for part in value]
    return float(value).hex() if isinstance(value, float | np.floating) else value


def differences(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Where two results differ, a line each."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            yield from differences(ours.get(key), theirs.get(key), f"{where}/{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif ours != theirs:
        yield f"{where}: {str(theirs)[:60]} -> {str(ours)[:60]}"


def main() -> None:
    """Run everything, write the file, and compare it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--same-as", type=Path, help="a file of another commit, from the same machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, run in runs():
        results[name] = exact(run())
        print(name, flush=True)
    options.file.write_text(json.dumps(results, indent=1) + "\n")
    if options.same_as is not None:
        found = list(differences(results, json.loads(options.same_as.read_text())))
        print(*found[:50], f"{len(results)} runs, {len(found)} numbers differ", sep="\n")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
