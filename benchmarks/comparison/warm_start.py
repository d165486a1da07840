"""The models that all runs of a task start from, trained once and kept in the cache."""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import agents
import textgym
from agents.evaluation import make_env
from agents.policy import CausalLMPolicy, LanguageModelPolicy
from agents.supervised import SL
from benchmarks.comparison.jobs import describe
from benchmarks.comparison.results import write_text
from benchmarks.profiles import LanguageModel, TaskProfile
from textgym.engine import TextVectorEnv
from textgym.guides.local import fingerprint_of
from textgym.models import load_model
from textgym.storage import cache_dir, made_once
from textgym.tokenization import pretrained_tokenizer

# Called with what is happening, and the share of it that is done, in [0, 1].
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class WarmStart:
    """The models of a task, with safetensors weights and tokenizer.

    Attributes:
        start_model: Folder or hub id of the language model before it has learned the task.
        supervised: Folder of the supervised policy at its best validation loss; frozen, it is also the guide.
        history: The history of supervised learning.
        guided: Whether the task's environment has a guide of its own, so that the supervised policy is not it.
        fingerprints: Fingerprints of the data they learned from, their tokenizer and their weights.
    """

    start_model: str
    supervised: Path
    history: list[dict[str, Any]]
    guided: bool
    fingerprints: dict[str, str]

    def weights(self, start: Literal["supervised", "start_model"]) -> str | Path:
        """The folder or hub id of the policy that a row starts from."""
        return self.start_model if start == "start_model" else self.supervised


class _Learned(NamedTuple):
    """What supervised learning made: the policy or its model, where it stands, and the history."""

    model: Any
    folder: Path
    history: list[dict[str, Any]]


def warm_start(
    profile: TaskProfile, source: str, base: str | None, seed: int, report: Report, out: Path, dtype: str = "float32"
) -> WarmStart:
    """Train the models of a task, or find them in the cache.

    The cache's key is a fingerprint of everything that they depend on: data, tokenizer, base, hyperparameters, our code
    and the versions of torch and transformers.

    Args:
        profile: The task's profile.
        source: "mini", "hub" or a folder.
        base: Hub id or folder of the start model; None trains one from scratch on the task's text.
        seed: Seed of weights and batches.
        report: Called with what is happening.
        out: The folder that takes the models if the cache cannot be written.
        dtype: What models compute products of matrices in during training, "float32" or "auto".

    Raises:
        ValueError: `base` is not a causal language model with safetensors weights.
    """
    report("loading data", 0)
    env = make_env(profile.env_id, num_envs=1, source=source, tokenizer=base, **profile.env)
    tokenizer = _digest(json.dumps(env.tokenizer.get_vocab(), sort_keys=True).encode())
    shared = {
        "task": env.task.name,
        "tokenizer": tokenizer,
        "seed": seed,
        "dtype": dtype,
        "code": code_fingerprint(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    start = str(start_model(profile, source, env, shared, report, out)) if base is None else base
    start_weights, data = fingerprint_of(load_model(start, device="cpu")), _data_of(env)
    recipe = {
        **shared,
        "start_model": start_weights,
        "data": data,
        **_environment(env, profile.env),
        "policy": dict(profile.policy),
        "supervised": dict(profile.supervised),
    }

    def make() -> _Learned:
        policy = load_policy(start, dtype, **profile.policy)
        return learn(policy, env, profile.supervised, seed, partial(report, "supervised"))

    made = _made_once("warm_starts", recipe, make, out)
    weights = {"start_model": start_weights, "supervised": fingerprint_of(made.model)}
    return WarmStart(
        start_model=start,
        supervised=made.folder,
        history=made.history,
        guided=env.guide is not None,
        fingerprints={**data, "tokenizer": tokenizer, **weights},
    )


def start_model(
    profile: TaskProfile, source: str, env: TextVectorEnv, shared: Mapping[str, Any], report: Report, out: Path
) -> Path:
    """Train a task's language model from scratch, or find it in the cache, where tasks that differ elsewhere share it.

    Args:
        profile: The task's profile.
        source: "mini", "hub" or a folder.
        env: The task's environment.
        shared: What the model and the supervised policy both depend on: "seed" and "dtype" among it.
        report: Called with what is happening.
        out: The folder that takes the model if the cache cannot be written.
    """
    shape, easier, arguments = profile.language_model, env, dict(profile.env)
    assert shape is not None
    if shape.env:
        # Prompts in as many columns as the task's: the policy remembers where they end.
        arguments = {**arguments, "max_prompt_tokens": env.max_prompt_tokens, **shape.env}
        easier = make_env(profile.env_id, num_envs=1, source=source, tokenizer=env.tokenizer, **arguments)
    recipe = {
        **shared,
        "start_model": shape.settings(),
        "positions": env.max_prompt_tokens + env.max_new_tokens,
        "data": _data_of(easier),
        **_environment(easier, arguments),
    }

    def make() -> _Learned:
        with tempfile.TemporaryDirectory() as untrained:  # to load it with its precision, as any other model
            CausalLMPolicy(initial_model(env, shape, shared["seed"]), env.tokenizer).save_pretrained(untrained)
            policy = load_policy(untrained, shared["dtype"])
        training = {"loss_on": "text", **shape.training}
        return learn(policy, easier, training, shared["seed"], partial(report, "start model"))

    return _made_once("start_models", recipe, make, out).folder


def _made_once(kind: str, recipe: Mapping[str, Any], make: Callable[[], _Learned], out: Path) -> _Learned:
    """The model that a recipe makes: in the cache, or, if that cannot be written, in the folder `out`."""
    text = json.dumps(recipe, sort_keys=True, default=describe)
    name = Path(kind, f"{recipe['task']}-{_digest(text.encode())}")

    def keep(made: _Learned, folder: Path) -> None:
        made.model.save_pretrained(folder / "model")
        write_text(folder / "history.json", json.dumps(made.history))
        write_text(folder / "recipe.json", json.dumps(recipe, indent=2, sort_keys=True, default=describe))

    def load(folder: Path) -> _Learned:
        path = folder / "model"
        pretrained_tokenizer(path)  # which must be whole, too
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        return _Learned(load_model(path, device="cpu"), path, history)

    return made_once(cache_dir() / name, make, keep, load, otherwise=out / name)


def _environment(env: TextVectorEnv, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says about an environment other than its data, such as the accuracy of a guide that is imitated."""
    sizes = [env.max_prompt_tokens, env.max_new_tokens, env.truncation_side]
    return {"env": sizes, "env_arguments": dict(arguments)}


@cache
def code_fingerprint() -> str:
    """A fingerprint of the code that can change a warm start; comments and docstrings do not count."""
    packages = (Path(package.__path__[0]) for package in (textgym, agents))
    trees = []
    for path in [Path(__file__), *(path for folder in packages for path in sorted(folder.rglob("*.py")))]:
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
        trees.append(ast.dump(tree))
    return _digest("\n".join(trees).encode())


def load_policy(path: str | Path, dtype: str, **arguments: Any) -> LanguageModelPolicy:
    """Load a policy that computes products of matrices in `dtype`, "float32" or "auto"."""
    how: Any = torch.float32 if dtype == "float32" else "auto"
    return LanguageModelPolicy.from_pretrained(path, dtype=how, **arguments)


def initial_model(env: TextVectorEnv, shape: LanguageModel, seed: int) -> PreTrainedModel:
    """Make a model with random weights that can read an episode of `env`."""
    positions = env.max_prompt_tokens + env.max_new_tokens
    config = model_config(shape, env.vocab_size, positions, env.eos_token_id, env.pad_token_id)
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config) if isinstance(config, GPT2Config) else LlamaForCausalLM(config)


def model_config(
    shape: LanguageModel, vocab_size: int, positions: int, eos_token_id: int | None, pad_token_id: int | None
) -> GPT2Config | LlamaConfig:
    """The configuration of a start model that is trained from scratch."""
    ids: Any = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if shape.family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=positions,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            **ids,
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        hidden_size=shape.n_embd,
        intermediate_size=4 * shape.n_embd,
        num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        tie_word_embeddings=True,
        **ids,
    )


def learn(
    policy: LanguageModelPolicy,
    env: TextVectorEnv,
    arguments: Mapping[str, Any],
    seed: int,
    report: Callable[[float], None],
) -> _Learned:
    """Train a policy by supervised learning in `env`; it is returned at its best validation loss."""
    report(0)
    algorithm = SL(policy, env, seed=seed, **arguments)

    def callback(_locals: dict[str, Any], _globals: dict[str, Any]) -> None:
        report(algorithm.num_episodes / algorithm.total_texts)

    algorithm.learn(callback=callback)
    return _Learned(algorithm.policy, Path(), algorithm.history)


def _data_of(env: TextVectorEnv) -> dict[str, str]:
    """Fingerprints of what is learned from, and of what says when to stop."""
    return {"train": env.data.fingerprint, "validation": env.task.split("validation", env.source).fingerprint}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
