"""Keep what a guide writes for the prompts of an environment in a file, which is then a guide."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from textgym import seeding
from textgym.checks import check_int
from textgym.completions import ask
from textgym.engine import TextVectorEnv
from textgym.guides.base import Completion, GuideRequest
from textgym.guides.recorded import read


def record(
    env: TextVectorEnv,
    path: str | os.PathLike,
    samples: Sequence[int] | None = None,
    completions_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> int:
    """Let an environment's guide write for the prompts of its split, and keep the texts in a file.

    The file grows by whole lines. After an interruption the same call goes on where it ended: prompts that the file has
    are not asked for again.

    Args:
        env: The environment, with a guide.
        path: The file, which is made where there is none.
        samples: Rows of the split; None for all.
        completions_per_prompt: Texts for each prompt, with different random choices.
        seed: Seed of these choices.
        batch_size: Prompts between two writes to the file.

    Returns:
        Number of texts that were written.

    Raises:
        ValueError: The environment has no guide, an argument is out of range, or the file has another form.
    """
    guide = env.guide
    if guide is None:
        raise ValueError("record needs a guide, and the environment was made with guide=None")
    check_int("completions_per_prompt", completions_per_prompt)
    check_int("batch_size", batch_size)
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_line(path)
    known = set(read(path)) if path.exists() else set()
    chosen = list(range(len(env.data)) if samples is None else samples)
    rows = [env.data.rows[sample] for sample in chosen]
    prompts = env.encode_prompts([env.task.prompt_of(row) for row in rows])
    missing = {
        prompt: (sample, ids, env.task.references_of(row))
        for sample, row, (prompt, ids) in zip(chosen, rows, prompts, strict=True)
        if prompt not in known
    }
    waiting = list(missing.items())
    for start in range(0, len(waiting), batch_size):
        batch = waiting[start : start + batch_size]
        requests = [
            GuideRequest(prompt, tuple(ids), "", (), env.max_new_tokens, int(drawn), tuple(references))
            for prompt, (sample, ids, references) in batch
            for drawn in seeding.hash64(seed, sample, np.arange(completions_per_prompt)) >> np.uint64(1)
        ]
        texts = iter(ask(guide, requests, env.tokenizer, env.vocab_size))
        with path.open("a", encoding="utf-8") as file:
            for prompt, _ in batch:
                completions = [_as_json(next(texts), env, prompt) for _ in range(completions_per_prompt)]
                file.write(json.dumps({"prompt": prompt, "completions": completions}, ensure_ascii=False) + "\n")
    return len(waiting) * completions_per_prompt


def _as_json(completion: Completion, env: TextVectorEnv, prompt: str) -> dict[str, Any]:
    text, finished, ids = completion.text, completion.finished, completion.token_ids
    if ids is not None:
        (text,) = env.texts([ids], [prompt])
        finished = finished or (len(ids) > 0 and ids[-1] in env.end_token_ids)
    return {"text": text, "finished": bool(finished)}


def _drop_cut_line(path: Path) -> None:
    """Drop what stands after the last newline: an interruption cut it."""
    if path.exists() and not (whole := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, whole.rfind(b"\n") + 1)
