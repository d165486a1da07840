"""What puzzles share: problems drawn from a seed, splits by a hash, a vocabulary of words and a scripted guide."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import Parameter, Signature, cleandoc, signature
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from textgym import seeding
from textgym.checks import check, check_int, is_int, is_number
from textgym.guides.base import Author, Completion, Guide, GuideRequest
from textgym.task import SPLITS, Row, Split, SplitName, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The four residues of a prompt's hash.
SPLIT_OF_RESIDUE: tuple[SplitName, ...] = ("train", "train", "validation", "test")
# Which byte of the hash: one by which every split has chains of parities of two bits already.
RESIDUE_BYTE = 9
# Draws in a row without a new problem, after which a split is content with those that it has.
PATIENCE = 1000

# One value, or values of which each is given to as many problems.
Difficulty = int | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Puzzle(ABC):
    """Settings of procedural problems with an exact verifier.

    Attributes:
        guide_accuracy: Probability that a step of the scripted guide is right, in [0, 1].
        train_problems: Rows of the training split, at least 1.
        test_problems: Rows of the validation split, and of the test split, at least 1.
        problem_seed: The problems are a hash of it. Which split a problem belongs to does not depend on it.

    Raises:
        ValueError: A value is outside of its range.
    """

    guide_accuracy: float = 0.9
    train_problems: int = 1024
    test_problems: int = 256
    problem_seed: int = 0

    name: ClassVar[str]
    # The fields that say how hard a problem is, with their least values; each has a twin "train_..." that may be None.
    difficulties: ClassVar[dict[str, int]]

    def __post_init__(self) -> None:
        accuracy = self.guide_accuracy
        check("guide_accuracy", accuracy, is_number(accuracy) and 0 <= accuracy <= 1, "a number in [0, 1]")
        check_int("train_problems", self.train_problems)
        check_int("test_problems", self.test_problems)
        check("problem_seed", self.problem_seed, is_int(self.problem_seed), "an int")
        for name, least in self.difficulties.items():
            for field in (name, f"train_{name}"):
                value = getattr(self, field)
                if value is None and field != name:
                    continue
                values = (value,) if is_int(value) else value
                valid = isinstance(values, Sequence) and bool(values) and all(is_int(v) and v >= least for v in values)
                check(field, value, valid, f"an int >= {least} or a sequence of them")
                if not is_int(value):
                    object.__setattr__(self, field, tuple(values))  # lists of a JSON specification

    # What a puzzle is

    @property
    @abstractmethod
    def words(self) -> Sequence[str]:
        """The vocabulary without EOS, the same for all difficulties."""

    @abstractmethod
    def lengths(self, *level: int) -> tuple[int, int]:
        """Return the most words of a prompt and of a reference, by the values of `difficulties`."""

    @abstractmethod
    def problem(self, seed: int, *level: int) -> tuple[str, str] | None:
        """Return prompt and worked solution, functions of the seed; None where the draw is no problem."""

    @abstractmethod
    def worth(self, prompt: Sequence[str], text: Sequence[str]) -> float:
        """Return what a whole text is worth, both given as words; 0 also where the prompt is none of this puzzle."""

    @abstractmethod
    def proceed(self, prompt: Sequence[str], text: list[str], draws: Sequence[float]) -> None:
        """Complete a text in place, as the scripted guide does.

        Args:
            prompt: The prompt's words.
            text: The words so far, to which the rest is appended, at least up to the number of draws.
            draws: Uniform draws in [0, 1), one for each position in the text (see `choose`).
        """

    # What follows from it

    @property
    def max_prompt_tokens(self) -> int:
        """P: words of the longest prompt of any split."""
        return max(self.lengths(*level)[0] for split in SPLITS for level in self.levels(split))

    @property
    def max_new_tokens(self) -> int:
        """T: words of the longest reference of any split, and EOS."""
        return 1 + max(self.lengths(*level)[1] for split in SPLITS for level in self.levels(split))

    def levels(self, split: SplitName) -> list[tuple[int, ...]]:
        """The difficulties of a split: every combination of the values of each."""
        values = []
        for name in self.difficulties:
            value = getattr(self, name)
            if split == "train" and getattr(self, f"train_{name}") is not None:
                value = getattr(self, f"train_{name}")
            values.append((value,) if is_int(value) else value)
        return list(itertools.product(*values))

    def rows(self, split: SplitName, source: str = "") -> Split:
        """Return the problems of a split.

        The difficulties take turns. The problems of each are distinct; where there are fewer than asked for, they are
        repeated in turn.

        Args:
            split: "train", "validation" or "test".
            source: Changes nothing.

        Raises:
            ValueError: No problem of a difficulty belongs to the split, as happens where there are only a few.
        """
        count = self.train_problems if split == "train" else self.test_problems
        levels = self.levels(split)
        found = [self._distinct(split, level, -(-count // len(levels))) for level in levels]
        rounds = [divmod(number, len(levels)) for number in range(count)]
        return Split.of([found[level][turn % len(found[level])] for turn, level in rounds])

    def _distinct(self, split: SplitName, level: tuple[int, ...], count: int) -> list[Row]:
        difficulty = dict(zip(self.difficulties, level, strict=True))
        found: dict[str, Row] = {}
        attempt = newest = 0
        while len(found) < count and attempt - newest < PATIENCE:
            attempt += 1
            drawn = self.problem(int(seeding.hash64(self.problem_seed, SPLITS.index(split), *level, attempt)), *level)
            if drawn and drawn[0] not in found and _split_of(drawn[0]) == split:
                found[drawn[0]] = {"prompt": drawn[0], "solution": drawn[1], **difficulty}
                newest = attempt
        if not found:
            raise ValueError(
                f"split {split!r} of {self.name} has no problem with {difficulty}: there are too few of them"
            )
        return list(found.values())

    def prompt_of(self, row: Row) -> tuple[str, str, str]:
        """Return a row's prompt as a part that is never truncated: a part of a problem is another problem."""
        return row["prompt"], "", ""

    def reward(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """Return the worth of each text (see `textgym.rewards.base.RewardFunction`); references are not read."""
        return [self.worth(prompt.split(), text.split()) for prompt, text in zip(prompts, completions, strict=True)]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return a tokenizer with EOS and `words`, separated by white space."""
        from textgym.tokenization import word_tokenizer

        return word_tokenizer(self.words)

    @property
    def task(self) -> Task:
        """The puzzle as a task, with a worked solution as the reference of every problem."""
        return Task(
            name=self.name,
            data=self.rows,
            prompt=self.prompt_of,
            references="solution",
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            reward=self.reward,
            tokenizer=self.tokenizer,
        )


def _split_of(prompt: str) -> SplitName:
    return SPLIT_OF_RESIDUE[hashlib.sha256(prompt.encode()).digest()[RESIDUE_BYTE] % len(SPLIT_OF_RESIDUE)]


def choose(right: Sequence[Any], wrong: Sequence[Any], accuracy: float, draw: float) -> Any:
    """Return one of `right` with a probability, else one of `wrong`, uniformly; where one has none, of the other.

    Args:
        right: Right values.
        wrong: Wrong values; not both are empty.
        accuracy: The probability of a right value.
        draw: A uniform draw in [0, 1), which decides both.
    """
    if right and wrong:
        is_right = draw < accuracy
        draw = draw / accuracy if is_right else (draw - accuracy) / (1 - accuracy)
    else:
        is_right = bool(right)
    values = right if is_right else wrong
    return values[min(int(draw * len(values)), len(values) - 1)]  # rounding may reach the end


@dataclass(frozen=True)
class ScriptedGuide:
    """The guide of a puzzle, which works any prefix out from the prompt.

    Attributes:
        puzzle: The puzzle.
    """

    puzzle: Puzzle
    author = Author.GUIDE
    can_hand_off = True

    def complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Complete every request; a word depends only on prompt, prefix, the seed of the request and its position."""
        completions = []
        for request in requests:
            prompt, text = request.prompt.split(), request.prefix.split()
            begun = len(text)
            draws = seeding.uniform(request.seed, np.arange(begun + request.max_new_tokens))
            self.puzzle.proceed(prompt, text, draws.tolist())
            new = text[begun:]
            finished = len(new) < request.max_new_tokens
            completions.append(Completion(text=" ".join(new[: request.max_new_tokens]), finished=finished))
        return completions


class WithPuzzle:
    """The constructor that the single and the vector environments of a puzzle share, and the rest of their pages.

    A class names its puzzle: ``class MyEnv(WithPuzzle, TextEnv, puzzle=MyPuzzle)``. The fields of the puzzle become
    arguments of the environment.

    Attributes:
        puzzle: The settings.
    """

    puzzle: Puzzle

    def __init_subclass__(cls, puzzle: type[Puzzle]) -> None:
        base: Callable = super().__init__
        settings = [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default) for f in fields(puzzle)]

        def __init__(
            self: WithPuzzle,
            *num_envs: int,
            guide: str | Guide | Callable | None = "scripted",
            max_new_tokens: int | None = None,
            **arguments: Any,
        ) -> None:
            self.puzzle = puzzle(**{p.name: arguments.pop(p.name) for p in settings if p.name in arguments})
            least = self.puzzle.max_new_tokens
            valid = max_new_tokens is None or (is_int(max_new_tokens) and max_new_tokens >= least)
            check("max_new_tokens", max_new_tokens, valid, f"None or an int >= {least}, room for every solution")
            if isinstance(guide, str) and guide == "scripted":
                guide = ScriptedGuide(self.puzzle)
            arguments |= {"task": self.puzzle.task, "guide": guide, "max_new_tokens": max_new_tokens}
            base(self, *num_envs, **arguments)

        # So that `help` and errors show all arguments, which are written once.
        given = [p for p in signature(base).parameters.values() if p.name != "task"]
        given = [p.replace(default="scripted") if p.name == "guide" else p for p in given]
        first = [p for p in given if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        rest = [p for p in given if p not in first]
        __init__.__signature__ = Signature([*first, *settings, *rest])  # type: ignore[attr-defined]
        setattr(cls, "__init__", __init__)  # noqa: B010
        if "    Arguments\n" in (cls.__doc__ or ""):
            cls.__doc__ = f"{cleandoc(cls.__doc__ or '')}\n{_PAGE}"


_PAGE = """\
    ``guide_accuracy``: the probability that a step of the scripted guide is right, by default 0.9.
    ``train_problems``, ``test_problems``: rows of the training split, by default 1024, and of validation and test
    split each, by default 256. Difficulties take turns in a split. Its problems are distinct; where there are too few
    of a difficulty they repeat in turn, and where there is none the environment is refused. A hash of its prompt says
    which split a problem belongs to (half are for training, a quarter for validation, a quarter for the test), so that
    no problem of a split is in another one, whatever the other arguments.
    ``problem_seed``: the problems are drawn from it, by default 0.
    ``split``: "train" (default), "validation" or "test". ``source`` changes nothing.
    ``tokenizer``: None for the puzzle's own words, or any other, for which P and T must be given.
    ``max_prompt_tokens``, ``max_new_tokens``: P and T, by default the tokens of the longest prompt, and of the
    longest solution with EOS, of all splits. T can only be greater than that: give it, and P, to an environment with
    short problems whose policy is to read long ones.
    ``reward``: None for the exact reward; or a callable ``(prompts, completions, references) -> floats or named
    parts``, or the hub id or path of a sequence-classification model.
    ``guide``: "scripted" (default), None, "references", the hub id or path of a language model, a
    `textgym.guides.Guide`, or a function on a list of `textgym.guides.GuideRequest`.
    The rest is as for every task: ``template``, ``chat``, ``stop``, ``guidance``, ``handoff``, ``handoff_cost``,
    ``min_new_tokens``, ``banned_tokens``, ``order``, ``render_mode`` and, for the vector environment, ``num_envs``,
    ``parking``, ``autoreset_mode`` and ``copy`` (see `textgym.engine.TextVectorEnv`).

Action Space
    ``Discrete(vocab)``: the next token; 0 ends the text. With ``handoff=True``, ``Discrete(vocab + 1)``: the last
    action asks the guide to finish the text.

Observation Space
    ``Dict`` of ``input_ids``, int64 (P+T,), and ``attention_mask``, int8 (P+T,). The prompt is left-padded into the
    first P columns; token h of the text is in column P+h; the columns after the text are padding, mask 0.

Starting State
    The prompt of a sample, with probability ``guidance.restart_prob`` followed by a prefix that the guide wrote. The
    options of ``reset`` choose the sample (``index``), or give a ``prompt`` with ``references``, a ``prefix``, or new
    ``guidance``.

Episode End
    The episode terminates at the end-of-sequence token or a string of ``stop`` ("stop"), after T tokens ("length"), or
    when the guide has completed the text ("handoff"). It is never truncated: the horizon is part of the task.

Info
    From ``reset``: ``prompt``, ``references``, ``sample_id`` (-1 for a user's prompt), ``prefix_length``, ``authors``
    (int8 (T,): -1 nothing, 0 policy, 1 guide, 2 reference, 3 user). From the last ``step``: ``text``, ``authors``,
    ``finish_reason``, ``reward_parts``, ``prefix_length``, ``policy_tokens``, ``guide_tokens``.

Version History
    v0: first version.
"""
