"""Completions that a guide wrote once, in a file, as a guide that costs nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgym.guides.base import Author, Completion, GuideRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RecordedGuide:
    """Completes a prompt with one of the texts that are recorded for it, chosen by the seed of the request.

    A run with it needs neither the guide nor its server: restarts, also by fraction, distillation and every loss on
    guide tokens read the file. It cannot hand off, because a recorded text does not continue what another author began.

    Attributes:
        path: The file, as `textgym.recording.record` writes it: a line of JSON for each prompt, with ``prompt`` and
            ``completions``, of which each has ``text`` and ``finished``. Lines with equal prompts add up.
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
