"""The workload of speed measurements: a small model, prompts of random words, and a constant reward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents.advantages import gae, whiten
from agents.policy import CausalLMPolicy
from agents.ppo import ppo_loss, token_rewards
from textgym.data.splits import Split
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guides.local import LocalGuide
from textgym.task import Task

VOCABULARY, PROMPT, NEW, EPISODES = 4096, 64, 48, 112
MINIBATCH, EPOCHS, GROUP = 28, 4, 8
LEARNING_RATE, KL_COEF, CLIP = 1e-5, 0.05, 0.2
EOS = 0
# Completions that end with this probability at every token, or at the maximum length, have 16 tokens on average.
STOP_PROB = 1 / 17
SIZE = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256}


@functools.cache
def tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Words w0, w1 and so on; w0 is the end-of-sequence token."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")


def texts(count: int = EPISODES, new: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    """Random prompts followed by `new` random tokens, int64 (count, PROMPT + new), without EOS."""
    return np.random.default_rng(0).integers(1, vocabulary, (count, PROMPT + new))


def no_reward(*, completions: Sequence[str], **_: Any) -> np.ndarray:
    """Zero for every completion."""
    return np.zeros(len(completions))


def task() -> Task:
    """Continue random words."""
    rows = [{"text": " ".join(f"w{token}" for token in prompt)} for prompt in texts(10 * EPISODES)]
    split = Split.of(rows)  # hashed once, for any number of environments
    return Task("workload", lambda *_: split, "{text}", lambda row: (), PROMPT, NEW, no_reward, tokenizer=tokenizer)


def language_model(stops: bool = False, family: str = "gpt2", **size: Any) -> Any:
    """A model with random weights; with `stops`, the probability of EOS is `STOP_PROB` at every token.

    Args:
        stops: Whether completions end before the maximum length.
        family: "gpt2" or "llama". The Llama has the width, depth and number of heads of the GPT-2, and rotary
            positions, RMSNorm, SwiGLU (with as many weights as GPT-2's MLP) and, like Llama 3.2 1B, one key-value head
            for every four query heads.
        **size: Replacements for values of `SIZE`, by GPT-2's names.
    """
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, **SIZE, **size}
    rest: Any = {
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOS),
        "tie_word_embeddings": not stops,
    }
    model: Any
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **size, **rest))
    else:
        config = LlamaConfig(
            vocab_size=size["vocab_size"],
            hidden_size=size["n_embd"],
            intermediate_size=8 * size["n_embd"] // 3,
            num_hidden_layers=size["n_layer"],
            num_attention_heads=size["n_head"],
            num_key_value_heads=max(1, size["n_head"] // 4),
            max_position_embeddings=size["n_positions"],
            **rest,
        )
        model = LlamaForCausalLM(config)
    if stops:
        # The logit of EOS is the same in every state; of the others, so is the expected sum of exponentials.
        with torch.no_grad():
            weight = model.lm_head.weight
            weight[EOS] = 0.0
            others = weight[1:].square().sum(1).mul(0.5).exp().sum().log()
            bias = torch.zeros(len(weight))
            bias[EOS] = others + np.log(STOP_PROB / (1 - STOP_PROB))
            model.lm_head.bias = nn.Parameter(bias)
    return model.eval()


def policy(best: bool, stops: bool = False, new: int = NEW, **size: Any) -> CausalLMPolicy:
    """A policy with a new model of a family and a size; `best` takes the fastest settings."""
    model, decoding = language_model(stops, **size), Decoding(min_new_tokens=0 if stops else new)
    words = tokenizer(model.config.vocab_size)
    return CausalLMPolicy(model, words, decoding, autocast="auto" if best else None, compile=best)


def environment(guided: bool = False, best: bool = False, family: str = "gpt2") -> TextVectorEnv:
    """An environment with one row per episode of an iteration; if `guided`, with a guide of the policy's size."""
    guide = None
    if guided:
        decoding = Decoding(min_new_tokens=NEW)
        model, words = language_model(family=family), tokenizer()
        guide = LocalGuide(model, tokenizer=words, decoding=decoding, dtype="auto" if best else None)
    return TextVectorEnv(
        EPISODES, task=task(), tokenizer=tokenizer(), guide=guide, parking=True, autoreset_mode="Disabled"
    )


def sample(writer: CausalLMPolicy, ids: np.ndarray, new: int, seed: int) -> float:
    """Sample completions of prompts (B, P) with log-probabilities and values, and return the number of new tokens."""
    sampler = writer.sampler(
        {"input_ids": ids, "attention_mask": np.ones_like(ids)},
        seeds=np.random.default_rng(seed).integers(2**63, size=len(ids)),
        max_new_tokens=new,
    )
    written, lengths = 0, np.zeros(len(ids), int)
    while len(sampler.rows):
        tokens = sampler.sample().tokens.cpu().numpy()
        lengths[sampler.rows] += 1
        written += len(tokens)
        sampler.keep((tokens != EOS) & (lengths[sampler.rows] < new))
    return float(written)


def generate(model: Any, ids: Tensor, stops: bool = False, new: int = NEW) -> Tensor:
    """Sample with transformers; returns prompts and completions."""
    with torch.no_grad():
        output: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=None if stops else new,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=EOS,
        )
    return output


def written(new: Tensor) -> float:
    """Number of tokens of completions (B, T) up to EOS, which counts."""
    return float(((new == EOS).cumsum(1) - (new == EOS).long() == 0).sum())


class PlainTrainer:
    """Straightforward PPO and GRPO: `generate`, full logits, padded forward passes, default AdamW.

    Args:
        group_size: Completions per prompt; 1 is PPO, with a value head, more is GRPO, without.
        **size: Family and size of the language model.
    """

    def __init__(self, group_size: int = 1, **size: Any) -> None:
        self.group_size = group_size
        self.model, self.reference = language_model(**size), language_model(**size)
        self.value_head = nn.Linear(self.model.config.hidden_size, 1)
        self.parameters = [*self.model.parameters(), *self.value_head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)
        self.ids = torch.from_numpy(texts(EPISODES // group_size).repeat(group_size, 0))

    def judge(self, model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values of the tokens after the prompts, each (B, T)."""
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)
        log_probs = output.logits.log_softmax(-1)
        chosen = log_probs[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
        entropy = -(log_probs.exp() * log_probs).sum(-1)[:, :-1]
        values = self.value_head(output.hidden_states[-1]).squeeze(2)[:, :-1]
        return chosen[:, PROMPT - 1 :], entropy[:, PROMPT - 1 :], values[:, PROMPT - 1 :]

    def iterate(self) -> float:
        """Sample, judge, and update; one iteration."""
        ids = generate(self.model, self.ids)
        with torch.no_grad():
            old, _, values = self.judge(self.model, ids)
            reference = self.judge(self.reference, ids)[0]
        self.update(ids, old, reference, values, EPOCHS)
        return 1.0

    def update(self, ids: Tensor, old: Tensor, reference: Tensor, values: Tensor, epochs: int) -> None:
        """Take the gradient steps of some epochs."""
        states = torch.ones_like(old, dtype=torch.bool)
        rewards = token_rewards(torch.zeros(len(ids)), old - reference, states, KL_COEF)
        advantages, returns = gae(rewards, values, states, 1.0, 0.95)
        if self.group_size > 1:
            totals = rewards.sum(1).unflatten(0, (-1, self.group_size))
            advantages = (totals - totals.mean(1, keepdim=True)).flatten()[:, None].expand_as(old)
        advantages = whiten(advantages, states)
        for _ in range(epochs):
            for rows in torch.randperm(len(ids)).split(MINIBATCH):
                log_probs, entropy, now = self.judge(self.model, ids[rows])
                loss = ppo_loss(
                    log_probs=log_probs,
                    values=now,
                    entropy=entropy,
                    old_log_probs=old[rows],
                    old_values=values[rows],
                    advantages=advantages[rows],
                    returns=returns[rows],
                    decisions=states[rows],
                    states=states[rows],
                    clip_range=CLIP,
                    clip_range_vf=None,
                    vf_coef=0.0 if self.group_size > 1 else 0.5,
                    ent_coef=0.0,
                ).loss
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()


def gradient_step(best: bool, rows: int = MINIBATCH, new: int = NEW, **size: Any) -> Callable[[], float]:
    """A gradient step of the policy on log-probabilities, entropies and values of random completions."""
    learner = policy(best, new=new, **size)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids = torch.from_numpy(texts(rows, new, learner.model.config.vocab_size))
    columns = torch.arange(PROMPT, PROMPT + new).expand(rows, -1)

    def step() -> float:
        judged = learner.evaluate_actions(ids, torch.ones_like(ids), columns)
        (judged.values.square() - judged.log_probs - 0.01 * judged.entropy).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(ids.numel())

    return step


def plain_gradient_step(rows: int = MINIBATCH, new: int = NEW, **size: Any) -> Callable[[], float]:
    """The same step as `PlainTrainer` takes it."""
    plain = PlainTrainer(**size)
    ids = torch.from_numpy(texts(rows, new, plain.model.config.vocab_size))

    def step() -> float:
        log_probs, entropy, values = plain.judge(plain.model, ids)
        (values.square() - log_probs - 0.01 * entropy).mean().backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        return float(ids.numel())

    return step


def text_flop(read: int, judged: int, *, n_embd: int, n_layer: int, **_: int) -> float:
    """The least floating-point operations of a GPT-2's forward pass over `read` tokens, of which some are judged.

    24 d^2 a layer and token in the products with weights (4 d x d for attention, 8 d x d for the MLP, two operations
    each), 4 d a layer for every pair of a token and one that it attends to, and 2 d V for every judged token's logits;
    d is `n_embd`.
    """
    pairs = read * (read + 1) / 2
    return n_layer * (24 * n_embd**2 * read + 4 * n_embd * pairs) + 2 * n_embd * VOCABULARY * judged
