"""The workload in TRL: ``python trl_peer.py {ppo,grpo} ITERATIONS WORKLOAD``; `peers.py` starts it.

It runs one iteration for each line that it reads and answers with a line, so that it can be measured in turns.

textgym is not installed there: the numbers of `benchmarks.performance.workload` come as the argument WORKLOAD.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from typing import Any, TextIO

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)


class Turns(TrainerCallback):
    """Wait for a line of standard input before every iteration.

    Args:
        steps: Calls of `on_step_end` in an iteration: optimiser's steps (GRPO) or batches (PPO).
        answers: File that gets a line after every iteration.
    """

    def __init__(self, steps: int, answers: TextIO) -> None:
        self.steps, self.answers, self.taken = steps, answers, 0

    def on_train_begin(self, args, state, control, **_) -> None:
        """Called by the trainer."""
        input()

    def on_step_end(self, args, state, control, **_) -> None:
        """Called by the trainer."""
        self.taken += 1
        if self.taken % self.steps == 0:
            print("done", file=self.answers, flush=True)
            input()


def _length(completions: list[str], **_: Any) -> list[float | None]:
    return [float(len(text) % 7) for text in completions]


def main(algorithm: str, iterations: int, workload: dict[str, Any], answers: TextIO) -> None:
    """Train for some iterations, each when it is asked for."""
    for setting in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):
        ctypes.CDLL(None).mallopt(*setting)  # as textgym.process.keep_freed_memory does
    vocabulary, prompt, new = workload["vocabulary"], workload["prompt"], workload["new"]
    episodes, minibatch, epochs, group = (workload[key] for key in ("episodes", "minibatch", "epochs", "group"))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0", padding_side="left")
    arguments: dict[str, Any] = {"vocab_size": vocabulary, **workload["size"]}
    arguments |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    arguments |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

    def model(kind: Any = GPT2LMHeadModel, **more: int) -> Any:
        torch.manual_seed(0)
        return kind(GPT2Config(**{**arguments, **more}))

    ids = np.random.default_rng(0).integers(1, vocabulary, (episodes * iterations, prompt))
    texts = [" ".join(f"w{token}" for token in row) for row in ids]
    turns = Turns(1 if algorithm == "ppo" else epochs * (episodes // minibatch), answers)
    config: Any
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "learning_rate": workload["learning_rate"],
            "max_grad_norm": 1.0,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        if algorithm == "ppo":
            from trl.experimental.ppo import PPOConfig, PPOTrainer

            config = PPOConfig(
                per_device_train_batch_size=episodes,
                num_mini_batches=episodes // minibatch,
                num_ppo_epochs=epochs,
                total_episodes=episodes * iterations,
                num_sample_generations=0,
                local_rollout_forward_batch_size=episodes,
                response_length=new,
                temperature=1.0,
                kl_coef=workload["kl_coef"],
                cliprange=workload["clip"],
                vf_coef=0.5,
                **common,
            )
            trainer = PPOTrainer(
                args=config,
                processing_class=tokenizer,
                model=model(),
                ref_model=model(),
                reward_model=model(GPT2ForSequenceClassification, num_labels=1, n_embd=8, n_layer=1, n_head=1),
                value_model=model(GPT2ForSequenceClassification, num_labels=1),
                train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
                eval_dataset=Dataset.from_dict({"input_ids": ids[:minibatch].tolist()}),
                callbacks=[turns],
            )
        else:
            from trl import GRPOConfig, GRPOTrainer

            config = GRPOConfig(
                per_device_train_batch_size=minibatch,
                num_generations=group,
                steps_per_generation=episodes // minibatch,
                num_iterations=epochs,
                max_steps=epochs * (episodes // minibatch) * iterations,
                max_completion_length=new,
                beta=workload["kl_coef"],
                epsilon=workload["clip"],
                temperature=1.0,
                top_k=0,
                generation_kwargs={"min_new_tokens": new},
                **common,
            )
            # It loads its reference model from where the policy says it came from.
            model().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            trainer = GRPOTrainer(
                model=folder,
                reward_funcs=_length,
                args=config,
                train_dataset=Dataset.from_dict({"prompt": texts}),
                processing_class=tokenizer,
                callbacks=[turns],
            )
        trainer.train()


if __name__ == "__main__":
    # Whatever libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), answers)
