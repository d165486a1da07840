"""Chain of parities: a text of many bits that is worth something only if every step of a chain is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textgym import seeding
from textgym.checks import check, check_one_of, is_int
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.tasks.procedural import Difficulty, Puzzle, WithPuzzle, choose

EASY, HARD = "easy", "hard"
EASY_WORTH, HARD_WORTH = 0.5, 1.0
# At the fork the guide takes the easy answer with this probability.
TAKES_EASY = 0.8


@dataclass(frozen=True)
class ChainOfParities(Puzzle):
    """Settings of the chain of parities (see `ChainOfParitiesEnv`).

    Attributes:
        length: L, bits of the prompt and links of the chain, at least 1.
        train_length: The same for the training split; None for `length`.
        copies_input: Whether each link repeats its bit of the prompt.
        fork: Whether there is an easy answer, worth half.
        guide_links: Links whose parity the scripted guide knows, the first ones; it guesses the rest. None for all.
    """

    length: Difficulty = 16
    train_length: Difficulty | None = None
    copies_input: bool = False
    fork: bool = False
    guide_links: int | None = None

    name = "parities"
    difficulties = {"length": 1}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("copies_input", self.copies_input, (False, True))
        check_one_of("fork", self.fork, (False, True))
        valid = self.guide_links is None or (is_int(self.guide_links) and self.guide_links >= 0)
        check("guide_links", self.guide_links, valid, "None or an int >= 0")

    @property
    def words(self) -> Sequence[str]:
        """The two bits, the end of the prompt, and the marks of a fork."""
        return ("0", "1", ":", *([EASY, HARD] if self.fork else []))

    @property
    def width(self) -> int:
        """Words of a link of the chain."""
        return 3 if self.copies_input else 2

    def lengths(self, *level: int) -> tuple[int, int]:
        """Words of a prompt and of a reference."""
        (length,) = level
        return length + 1, self.fork + self.width * length

    def problem(self, seed: int, *level: int) -> tuple[str, str]:
        """The bits x, and a chain with bits Y of the seed's choice."""
        bits = (seeding.uniform(seed, np.arange(2 * level[0])) < 0.5).astype(int).tolist()
        chain, z = [HARD] if self.fork else [], 0
        for x, y in zip(bits[::2], bits[1::2], strict=True):
            z ^= y ^ x
            chain += [str(y), str(x), str(z)] if self.copies_input else [str(y), str(z)]
        return " ".join(map(str, [*bits[::2], ":"])), " ".join(chain)

    def worth(self, prompt: Sequence[str], text: Sequence[str]) -> float:
        """1 for a chain without an error, 0.5 for the easy answer of a fork, 0 for anything else."""
        x = prompt[:-1]
        if not x or prompt[-1] != ":" or not {*x} <= {"0", "1"}:
            return 0.0
        if self.fork:
            if text[:1] == [EASY]:
                return EASY_WORTH if text[1:] == x else 0.0
            if text[:1] != [HARD]:
                return 0.0
            text = text[1:]
        if len(text) != self.width * len(x) or not {*text} <= {"0", "1"}:
            return 0.0
        before = ["0", *text[self.width - 1 :: self.width]]
        links = zip(x, before, text[:: self.width], text[self.width - 1 :: self.width], strict=False)
        right = all((bit + z + y).count("1") % 2 == int(after) for bit, z, y, after in links)
        copied = not self.copies_input or text[1 :: self.width] == x
        return HARD_WORTH if right and copied else 0.0

    def proceed(self, prompt: Sequence[str], text: list[str], draws: Sequence[float]) -> None:
        """Write free bits uniformly, copies without an error, and parities that are right with `guide_accuracy`.

        Those after `guide_links` are right with probability 1/2.
        """
        x = [word for word in prompt if word in ("0", "1")]
        if self.fork and not text:
            text.append(EASY if draws[0] < TAKES_EASY else HARD)
        if self.fork and text[0] == EASY:
            text += x[len(text) - 1 :]
            return
        while len(text) < min(self.fork + self.width * len(x), len(draws)):
            link, part = divmod(len(text) - self.fork, self.width)
            draw = draws[len(text)]
            if part == 0:
                text.append("01"[draw < 0.5])
            elif part < self.width - 1:
                text.append(x[link])
            else:
                before = text[-self.width] if link else "0"
                parity = [before, text[1 - self.width], x[link]].count("1") % 2
                knows = self.guide_links is None or link < self.guide_links
                text.append(choose("01"[parity], "10"[parity], self.guide_accuracy if knows else 0.5, draw))


class ChainOfParitiesEnv(WithPuzzle, TextEnv, puzzle=ChainOfParities):
    """Write a chain of parities without an error.

    Description
        The prompt is L bits x and ":". The text is Y1 Z1 ... YL ZL, in which Y is free and every Z is the parity of the
        Z before it (0 at first), its Y and its bit of x. Bits drawn uniformly are right with probability 2^-L, so that
        plain reinforcement sees no reward, whereas each step alone is simple. A task of AdaBack (arXiv 2506.18110, with
        L = 16 and 1,024 problems); it was written from a summary of the paper, and details such as the paper's tokens
        were not compared.

        With ``fork=True`` the text begins with "easy", after which a copy of x is worth 0.5, or with "hard", after
        which the chain is worth 1. The scripted guide takes the easy answer with probability 0.8, and then makes no
        error: to surpass it is the task.

    Rewards
        Zero until the episode ends; then 1 if the text is the whole chain and all Z are right, else 0; with
        ``fork=True`` 0.5 for the easy answer.

        Every token of a guide's completion costs ``handoff_cost``.

    Arguments
        ``length``: L, by default 16; an int or several, which then take turns.
        ``train_length``: the same for the training split, such as ``(1, 2, 3)``; by default that of ``length``.
        ``copies_input``: True for a chain Y1 X1 Z1 ..., in which X must repeat x; by default False.
        ``fork``: True for an easy answer beside the chain, by default False.
        ``guide_links``: links whose Z the scripted guide knows, the first ones; it guesses the others. By default None,
        all. Such a guide begins well and seldom succeeds.

        A step of the scripted guide is a Z: without a fork it earns 1 with probability ``guide_accuracy ** L``, or if
        it knows K < L links ``guide_accuracy ** K * 0.5 ** (L - K)``.
    """


class ChainOfParitiesVectorEnv(WithPuzzle, TextVectorEnv, puzzle=ChainOfParities):
    """`ChainOfParitiesEnv` for N rows at once (see `textgym.engine.TextVectorEnv`)."""
