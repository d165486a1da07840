"""Every snippet of README and the pages runs by itself, with tiny models for those that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from agents import CausalLMPolicy
from textgym.tasks import commongen, imdb
from textgym.tokenization import train_tokenizer

ROOT = Path(__file__).parents[1]
# What runs elsewhere: recipes in test_architecture.py, servers in test_http_guide.py and test_examples.py, TRL in
# test_trl.py, verifiers in test_verifiers.py, what a profile is made of in test_schedule.py.
ELSEWHERE = ("http://", "from trl import", "textgym.verifiers", "run_all(profile")
SNIPPETS = {
    f"{page.name}-{number}": snippet
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if page.name != "architecture.md"
    for number, snippet in enumerate(re.findall(r"```python[^\n]*\n(.*?)```", page.read_text(), re.DOTALL))
    if not any(mark in snippet for mark in ELSEWHERE)
}
MODELS = r'"(gpt2(-large)?|my-[a-z-]*model|Qwen/[^"]+|google/[^"]+)"'
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}<|im_end|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny language model that reads English, with a chat template, in a folder."""
    tasks = [(imdb.TASK, 200), (commongen.TASK, 1000)]
    texts = ["".join(task.prompt_of(row)) for task, count in tasks for row in task.split("train", "mini").rows[:count]]
    tokenizer = train_tokenizer(texts)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<end_of_turn>"]})
    tokenizer.chat_template = CHAT
    ids = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos")}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, **ids)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    CausalLMPolicy(GPT2LMHeadModel(config), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name, snippet in SNIPPETS.items() if "evaluate_policy" not in snippet])
def test_a_snippet_runs_by_itself(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = re.sub(MODELS, repr(str(model)), SNIPPETS[name])
    # An iteration shows that it runs.
    snippet = re.sub(r"total_episodes=[\d_]+", "total_episodes=1", snippet)
    snippet = re.sub(r"learn\([\d_]+\)", "learn(1)", snippet).replace("num_prompts=256", "num_prompts=8")
    snippet = snippet.replace("compile=True", "compile=False")  # minutes, and nothing to see
    namespace: dict = {"__name__": __name__}
    exec(compile(snippet, name, "exec"), namespace)


def test_the_first_agent_of_the_readme_opens_its_lock_with_the_guide_alone(capsys):
    (snippet,) = [snippet for name, snippet in SNIPPETS.items() if name.startswith("README") and "adaback" in snippet]
    exec(snippet, {})
    alone, guided = capsys.readouterr().out.splitlines()
    assert alone == "None 0.0"
    assert float(guided.removeprefix("adaback ")) > 0.95


@pytest.mark.slow
def test_ppo_of_stable_baselines3_raises_the_reward_as_the_readme_says(capsys, monkeypatch):
    (snippet,) = [snippet for snippet in SNIPPETS.values() if "evaluate_policy" in snippet]
    monkeypatch.chdir(ROOT)
    exec(snippet, {})
    before, after = map(float, capsys.readouterr().out.split())
    assert after > before + 0.02


def test_every_test_that_a_page_names_is_there():
    named = {
        (file, name)
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for file, name in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page.read_text())
    }
    assert len(named) > 50
    missing = [
        (file, name)
        for file, name in named
        if not (ROOT / "tests" / file).is_file() or f"def {name}(" not in (ROOT / "tests" / file).read_text() + "def ("
    ]
    assert not missing
