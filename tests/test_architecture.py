"""What docs/architecture.md says: imports run one way and in no circle, and every recipe runs as it stands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.envs.registration import registry
from transformers import GPT2Config, GPT2LMHeadModel

import agents
from agents import CausalLMPolicy

ROOT = Path(__file__).parents[1]
PACKAGES = ("textgym", "agents", "benchmarks")
RECIPES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)


def modules():
    """The modules of the three packages, by name."""
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file, known):
    """The modules of `known` that a file imports anywhere, also within functions and for type checkers."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from (found for found in [name if name in known else node.module] if found in known)


def circles(graph):
    """Names that reach themselves."""

    def reached(name):
        seen, left = set(), list(graph[name])
        while left:
            if (other := left.pop()) not in seen:
                seen.add(other)
                left += graph[other]
        return seen

    return sorted(name for name in graph if name in reached(name))


def test_no_module_imports_itself_in_a_circle():
    """A package's `__init__` hands names on from its modules, and lazily: it takes no part."""
    known = modules()
    inits = {name for name, file in known.items() if file.name == "__init__.py"}
    graph = {name: set(imports(file, known)) - inits - {name} for name, file in known.items() if name not in inits}
    assert circles(graph) == []
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == ["a", "b", "c"]


def test_imports_run_one_way():
    known = modules()
    for name, file in known.items():
        package = PACKAGES.index(name.partition(".")[0])
        wrong = [other for other in imports(file, known) if PACKAGES.index(other.partition(".")[0]) > package]
        assert not wrong, name


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_recipes_run(number, tmp_path, monkeypatch):
    env = gym.make("textgym/IMDB-v0").unwrapped
    config = GPT2Config(
        vocab_size=len(env.tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    CausalLMPolicy(GPT2LMHeadModel(config), env.tokenizer).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agents, "_registered", dict(agents._registered))
    before = dict(registry)
    try:
        exec(RECIPES[number], {"__name__": "__main__"})
    finally:
        registry.clear()
        registry.update(before)
