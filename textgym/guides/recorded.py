"""Completions that a guide wrote once, in a file, as a guide that costs nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym import seeding
from textgym.checks import check_int
from textgym.guides.base import Author, Completion, GuideRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textgym.engine import TextVectorEnv


class RecordedGuide:
    """Completes a prompt with one of the texts that are recorded for it, chosen by the seed of the request.

    A run with it needs neither the guide nor its server: restarts, also by fraction, distillation and every loss on
    guide tokens read the file. It cannot hand off, because a recorded text does not continue what another author began.

    Attributes:
        path: The file, as `record` writes it: a line of JSON for each prompt, with ``prompt`` and ``completions``, of
            which each has ``text`` and ``finished``. Lines with equal prompts add up.
        fingerprint: 16 hex digits that change with the file's content.

    Raises:
        ValueError: The file does not exist, or a line has another form.
    """

    author = Author.GUIDE
    can_hand_off = False

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise ValueError(f"guide must be a file of recorded completions that exists, got {str(path)!r}")
        self.fingerprint = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        self._completions = read(self.path)

    def __repr__(self) -> str:
        return f"RecordedGuide({str(self.path)!r})"

    def complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Return a recorded completion per request.

        Raises:
            ValueError: No completion is recorded for a prompt, or a request has a prefix.
        """
        for request in requests:
            if request.prefix_ids:
                raise ValueError("a recorded guide can only restart an episode, it cannot complete a begun text")
            if request.prompt not in self._completions:
                raise ValueError(
                    f"guide {self.path} has no completion of prompt {request.prompt!r}, among those of "
                    f"{len(self._completions)} prompts; train_samples limits training to a part of the split"
                )
        recorded = [self._completions[request.prompt] for request in requests]
        return [texts[request.seed % len(texts)] for request, texts in zip(requests, recorded, strict=True)]


def read(path: Path) -> dict[str, list[Completion]]:
    """Read a file of recorded completions: those of each prompt.

    Raises:
        ValueError: A line has another form.
    """
    completions: dict[str, list[Completion]] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                prompt, texts = entry["prompt"], [_completion(**completion) for completion in entry["completions"]]
                if not isinstance(prompt, str) or not texts:
                    raise ValueError("prompt must be text, completions must not be empty")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f'{path}, line {number} must be JSON with "prompt" and "completions", of which each has "text" and '
                    f'"finished" ({error})'
                ) from error
            completions.setdefault(prompt, []).extend(texts)
    return completions


def _completion(text: Any, finished: Any) -> Completion:
    if not (isinstance(text, str) and isinstance(finished, bool)):
        raise TypeError(f"got {text!r} and {finished!r}")
    return Completion(text=text, finished=finished)


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
        texts = iter(guide.complete(requests, env.tokenizer))
        with path.open("a", encoding="utf-8") as file:
            for prompt, _ in batch:
                completions = [_as_json(next(texts), env, prompt) for _ in range(completions_per_prompt)]
                file.write(json.dumps({"prompt": prompt, "completions": completions}, ensure_ascii=False) + "\n")
    return len(waiting) * completions_per_prompt


def _as_json(completion: Completion | str | Sequence[int], env: TextVectorEnv, prompt: str) -> dict[str, Any]:
    if isinstance(completion, str):
        completion = Completion(text=completion)
    elif not isinstance(completion, Completion):
        completion = Completion(token_ids=completion, finished=False)
    text, finished = completion.text, completion.finished
    if completion.token_ids is not None:
        ids = list(completion.token_ids)
        text, finished = env.texts([ids], [prompt])[0], finished or (bool(ids) and ids[-1] in env.end_token_ids)
    return {"text": text, "finished": finished}


def _drop_cut_line(path: Path) -> None:
    """Drop what stands after the last newline: an interruption cut it."""
    if path.exists() and not (whole := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, whole.rfind(b"\n") + 1)
