"""The workload of speed measurements: a small GPT-2, prompts of random words, and a reward that costs nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from agents.advantages import gae, whiten
from agents.policy import CausalLMPolicy
from agents.ppo import ppo_loss, token_rewards
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.guides.local import LocalGuide
from textgym.task import Task

VOCABULARY, PROMPT, NEW, EPISODES = 4096, 64, 48, 112
MINIBATCH, EPOCHS, GROUP = 28, 4, 8
LEARNING_RATE, KL_COEF, CLIP = 1e-5, 0.05, 0.2
EOS = 0
# A text that ends with this probability at every token, and at the horizon at the latest, has 16 tokens on average.
STOP_PROB = 1 / 17
SIZE = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w4095; w0 ends a text."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")


def prompts(count: int = EPISODES, seed: int = 0) -> np.ndarray:
    """Random prompts, int64 (count, PROMPT), without EOS."""
    return np.random.default_rng(seed).integers(1, VOCABULARY, (count, PROMPT))


def no_reward(*, completions: Sequence[str], **_: Any) -> np.ndarray:
    """Zero for every text."""
    return np.zeros(len(completions))


def task() -> Task:
    """Continue random words."""
    rows = [{"text": " ".join(f"w{token}" for token in prompt)} for prompt in prompts(10 * EPISODES)]
    return Task("workload", rows, "{text}", lambda row: (), PROMPT, NEW, no_reward, tokenizer=tokenizer)


def language_model(stops: bool = False, **size: Any) -> Any:
    """A GPT-2 with random weights; one that `stops` ends texts with `STOP_PROB` a token, whatever it has read."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=not stops,
        **{**SIZE, **size},
    )
    model = GPT2LMHeadModel(config)
    if stops:
        # The first hidden unit is 1 and only EOS looks at it, and at nothing else.
        with torch.no_grad():
            norm, head = model.transformer.ln_f, model.lm_head.weight
            norm.weight[0], norm.bias[0] = 0.0, 1.0
            head[:, 0] = 0.0
            head[EOS] = 0.0
            others = head[1:, 1:].square().sum(1).mul(0.5).exp().sum().log()
            head[EOS, 0] = others + np.log(STOP_PROB / (1 - STOP_PROB))
    return model.eval()


def policy(best: bool, stops: bool = False, **size: Any) -> CausalLMPolicy:
    """A policy with a fresh model; `best` is with all that makes it faster."""
    decoding = Decoding(min_new_tokens=0 if stops else NEW)
    model = language_model(stops, **size)
    return CausalLMPolicy(model, tokenizer(), decoding, autocast="auto" if best else None, compile=best)


def environment(guided: bool = False, best: bool = False, **size: Any) -> TextVectorEnv:
    """All episodes of an iteration at once; with a guide of the policy's size, if `guided`."""
    guide = None
    if guided:
        decoding = Decoding(min_new_tokens=NEW)
        guide = LocalGuide(
            language_model(**size), tokenizer=tokenizer(), decoding=decoding, dtype="auto" if best else None
        )
    return TextVectorEnv(
        EPISODES, task=task(), tokenizer=tokenizer(), guide=guide, parking=True, autoreset_mode="Disabled"
    )


def generate(model: Any, ids: Tensor, stops: bool = False) -> Tensor:
    """What transformers makes of sampling: the texts, prompts included."""
    with torch.no_grad():
        output: Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=None if stops else NEW,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=EOS,
        )
    return output


class PlainTrainer:
    """PPO and GRPO as one writes them at first: `generate`, whole logits, padded passes, AdamW as it comes.

    Args:
        group_size: Texts of a prompt; 1 is PPO, with a value head, more is GRPO, without.
        **size: Of the language model.
    """

    def __init__(self, group_size: int = 1, **size: Any) -> None:
        self.group_size = group_size
        self.model, self.reference = language_model(**size), language_model(**size)
        self.value_head = nn.Linear(self.model.config.n_embd, 1)
        self.parameters = [*self.model.parameters(), *self.value_head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)
        self.ids = torch.from_numpy(prompts(EPISODES // group_size).repeat(group_size, 0))

    def judge(self, model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values of the new tokens, each (B, NEW)."""
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)
        log_probs = output.logits.log_softmax(-1)
        chosen = log_probs[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
        entropy = -(log_probs.exp() * log_probs).sum(-1)[:, :-1]
        values = self.value_head(output.hidden_states[-1]).squeeze(2)[:, :-1]
        return chosen[:, PROMPT - 1 :], entropy[:, PROMPT - 1 :], values[:, PROMPT - 1 :]

    def iterate(self) -> None:
        """Sample, judge, and update."""
        texts = generate(self.model, self.ids)
        with torch.no_grad():
            old, _, values = self.judge(self.model, texts)
            reference = self.judge(self.reference, texts)[0]
        self.update(texts, old, reference, values, EPOCHS)

    def update(self, texts: Tensor, old: Tensor, reference: Tensor, values: Tensor, epochs: int) -> None:
        """Take the gradient steps of some epochs."""
        written = torch.ones_like(old, dtype=torch.bool)
        rewards = token_rewards(torch.zeros(len(texts)), old - reference, written, KL_COEF)
        advantages, returns = gae(rewards, values, written, 1.0, 0.95)
        if self.group_size > 1:
            totals = rewards.sum(1).unflatten(0, (-1, self.group_size))
            advantages = (totals - totals.mean(1, keepdim=True)).flatten()[:, None].expand_as(old)
        advantages = whiten(advantages, written)
        for _ in range(epochs):
            for rows in torch.randperm(len(texts)).split(MINIBATCH):
                log_probs, entropy, now = self.judge(self.model, texts[rows])
                loss = ppo_loss(
                    log_probs=log_probs,
                    values=now,
                    entropy=entropy,
                    old_log_probs=old[rows],
                    old_values=values[rows],
                    advantages=advantages[rows],
                    returns=returns[rows],
                    decisions=written[rows],
                    states=written[rows],
                    clip_range=CLIP,
                    clip_range_vf=None,
                    vf_coef=0.0 if self.group_size > 1 else 0.5,
                    ent_coef=0.0,
                ).loss
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()


def text_flop(read: int, judged: int, *, n_embd: int, n_layer: int, **_: int) -> float:
    """Floating-point operations that one text needs at least, forward.

    24 d^2 a layer and token in the products with weights (4 d x d for attention, 8 d x d for the MLP, two operations
    each), 4 d a layer for every pair of a token and one that it attends to, and 2 d V for every judged token's logits.

    Args:
        read: Tokens that the model reads.
        judged: Tokens whose distribution is needed.
        n_embd: d.
        n_layer: Layers.
    """
    pairs = read * (read + 1) / 2
    return n_layer * (24 * n_embd**2 * read + 4 * n_embd * pairs) + 2 * n_embd * VOCABULARY * judged
