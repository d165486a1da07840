"""The generators of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760) as tasks: ``task("countdown")``.

A question is one of about a hundred procedural puzzles, and the reward is the generator's own verifier. It needs the
package: ``pip install "textgym[reasoning]"``.

Left out, each named by the error that refuses it (`REFUSED`), are generators whose questions depend on the process
(PYTHONHASHSEED), that run programs of their data set, or whose verifier accepts one and the same text for every
question.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from textgym.checks import check, check_arguments, check_int, check_one_of
from textgym.data.splits import SPLITS, Split, SplitName
from textgym.packages import require
from textgym.seeding import hash64
from textgym.task import Task
from textgym.tokenization import as_continuation, load_tokenizer, pretrained_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HASH = "its questions or answers depend on PYTHONHASHSEED, and so differ between processes"
REFUSED = {
    "codeio": "it runs the programs of its data set to make questions",
    "composite": "it mixes other generators: make a task of each",
    "game_of_life_halting": "its verifier accepts every text that is not empty",
    "isomorphic_strings": _HASH,
    "knight_swap": _HASH,
    "list_functions": _HASH,
    "polynomial_multiplication": _HASH,
    "puzzle24": "its verifier does not compare the numbers with the question's: 6+6+6+6 is always right",
    "ransom_note": _HASH,
    "word_ladder": _HASH,
}

# What a verifier must not read: it evaluates the text as Python (`eval`, SymPy's `parse_expr`), repeats something as
# often as a number in the text says, or takes "nan" for every number.
_UNREADABLE = {
    "binary_matrix": r"[^0-9\s]",
    "coin_flip": r"[^-+0-9.,/\seE]|[eE][-+0-9,]{4}",
    "complex_arithmetic": r"(?i)nan",
    "countdown": r"[^-+*/().0-9 ]|\*\s*\*|/\s*/",
    "n_queens": r"[^Q_\s]",
    "number_sorting": r"(?i)nan",
    "rubiks_cube": r"\d\d",
    "rush_hour": r"\d\d",
    "spiral_matrix": r"[^-0-9\s]",
    "string_insertion": r"[^A-Z]",
}
_FORMULAS = ("intermediate_integration", "simple_integration")
_UNREADABLE |= dict.fromkeys(_FORMULAS, r"[0-9.][eE]")  # 1e999999999, for SymPy an integer
_FUNCTIONS = ("acos", "asin", "atan", "cos", "exp", "log", "sin", "sqrt")
# Most characters of an answer: so many, or so many more than four times the generator's own answer.
_LENGTHS = dict.fromkeys(("countdown", "propositional_logic", *_FORMULAS), 200)
_MORE_CHARACTERS = 1000
# Most binary digits of a formula (see `_digits`). The longest of 400 answers of the generators have 110.
_MOST_DIGITS = 160

# Shares of all possible questions, by hash: the same question is in the same split whatever sizes and seed are.
_SHARES: Mapping[str, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


def task(
    generator: str,
    *,
    size: int = 2000,
    validation_size: int = 200,
    test_size: int = 200,
    seed: int = 0,
    partial_credit: bool = False,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    **config: Any,
) -> Task:
    """Make a task of a generator.

    The questions are drawn from one stream. A hash of a question decides which split it can be in (8 in 10 train, 1
    validation, 1 test), and duplicates are dropped: no question is in two splits, not even in those of tasks with
    other sizes or seeds. A question whose own answer its verifier does not accept (after the protection below) is
    dropped, too. A row has "question" (the prompt, of which nothing may be truncated), "answer" (the reference; None
    for some generators, whose rows then have no reference) and "index", its place in the stream.

    White space around a completion is dropped, and the rest is the answer: a completion that does more than answer is
    wrong, for most generators. An answer that the verifier accepts with 1.0 is worth 1, every other 0. An answer with
    which the verifier raises an exception is wrong. So is one that it may not read at all:

    - one with more characters than 1,000 plus four times the generator's answer; for countdown, the integrals and
      propositional_logic more than 200;
    - where the verifier would evaluate the answer as Python code, one that is not made of the characters of an answer:
      countdown (numbers, ``+ - * / ( )``; neither ``**`` nor ``//``), binary_matrix, n_queens, spiral_matrix,
      string_insertion (not a Python list either, which is worth partial credit there);
    - for simple_integration and intermediate_integration, one that is not a formula of numbers, the question's
      variable, C, ``+ - * / **``, acos, asin, atan, cos, exp, log, sin and sqrt, without functions of functions, with
      constant exponents and denominators, no 1e9, and of moderate size (`_digits`). Unevaluated ``Integral(...)``,
      with which every question would be solved, is none. SymPy then simplifies the formula, which can take it seconds:
      there is no limit of time;
    - a number of two digits for rubiks_cube and rush_hour, or an exponent of four digits for coin_flip, for which the
      verifier would work as long as the number is large, and "nan" for complex_arithmetic and number_sorting, which
      equals everything there.

    Other verifiers only compare and parse the text. None runs in a process of its own.

    Args:
        generator: A name of reasoning-gym's.
        size: Rows of the train split. Sizes that are about 8 : 1 : 1 need the fewest draws.
        validation_size: Rows of the validation split.
        test_size: Rows of the test split.
        seed: Seed of the stream; any integer. The same seed gives the same rows in every process.
        partial_credit: The reward is what the verifier returns, in [0, 1]: some give a little to any text, and to one
            that merely contains the answer.
        tokenizer: The environment's default tokenizer, or its hub id or path; None for a byte-level BPE trained on the
            train split (see `textgym.tokenization.load_tokenizer`).
        max_prompt_tokens: P; None measures the longest question of all splits under that tokenizer, and adds two for
            the special tokens of others. An environment with a tokenizer of its own may need more.
        max_new_tokens: T; None measures the longest answer of all splits in the same way, adds EOS and a quarter. A
            generator without answers needs the argument. With both numbers given, no question is drawn until an
            environment asks for a split.
        **config: The generator's own settings, such as ``min_numbers=3``.

    Raises:
        ImportError: reasoning-gym is not installed.
        TypeError: The generator has no such setting.
        ValueError: An argument is wrong; the generator is one of `REFUSED`; or, when the questions are drawn, it does
            not have enough of them.
    """
    require("reasoning", "textgym.reasoning_gym", "reasoning_gym")
    with contextlib.redirect_stdout(io.StringIO()):  # some print while they are imported or draw
        import reasoning_gym  # noqa: F401  (registers the generators)
        from reasoning_gym.factory import DATASETS

    if generator in REFUSED:
        raise ValueError(f"generator must be one whose task is sound, got {generator!r}: {REFUSED[generator]}")
    check_one_of("generator", generator, sorted(DATASETS.keys() - REFUSED.keys()))
    sizes = {
        "train": check_int("size", size),
        "validation": check_int("validation_size", validation_size),
        "test": check_int("test_size", test_size),
    }
    kind = DATASETS[generator][1]
    check_arguments(
        f"generator {generator!r}", config, {field.name for field in dataclasses.fields(kind)} - {"seed", "size"}
    )
    try:
        kind(**config).validate()
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"config must be valid for generator {generator!r}, got {config}: {error}") from error
    for name, number in (("max_prompt_tokens", max_prompt_tokens), ("max_new_tokens", max_new_tokens)):
        if number is not None:
            check_int(name, number)
    questions = Questions(generator, sizes, seed, config, partial_credit)
    made = Task(
        name=f"reasoning-gym-{generator}",
        data=questions.split,
        prompt=_prompt,
        references="answer",
        max_prompt_tokens=max_prompt_tokens or 1,
        max_new_tokens=max_new_tokens or 1,
        reward=questions,
        tokenizer=None if tokenizer is None else functools.partial(_tokenizer, tokenizer),
    )
    if max_prompt_tokens is not None and max_new_tokens is not None:
        return made
    encode = load_tokenizer(None, made, "mini")
    rows = [row for name in SPLITS for row in questions.split(name).rows]
    answers = [as_continuation(row["question"], row["answer"]) for row in rows if row["answer"] is not None]
    check("max_new_tokens", max_new_tokens, bool(answers) or max_new_tokens is not None, "given without any answer")

    def longest(texts: Sequence[str]) -> int:
        return max(len(ids) for ids in encode(texts, verbose=False)["input_ids"])

    return dataclasses.replace(
        made,
        max_prompt_tokens=max_prompt_tokens or longest([row["question"] for row in rows]) + 2,
        max_new_tokens=max_new_tokens or -(-5 * (longest(answers) + 1) // 4),
    )


def _prompt(row: Mapping[str, Any]) -> tuple[str, str, str]:
    # No part may be truncated: the verifier's data is found by the whole question.
    return row["question"], "", ""


def _tokenizer(tokenizer: PreTrainedTokenizerBase | str) -> PreTrainedTokenizerBase:
    return pretrained_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


@dataclasses.dataclass(frozen=True)
class Questions:
    """The questions of a generator and, as a `textgym.rewards.base.RewardFunction`, its verifier (see `task`).

    Attributes:
        generator: Its name.
        sizes: Rows of each split.
        seed: Seed of the stream.
        config: The generator's settings.
        partial_credit: Whether a reward can lie between 0 and 1.
    """

    generator: str
    sizes: Mapping[str, int]
    seed: int
    config: Mapping[str, Any]
    partial_credit: bool

    def split(self, name: SplitName, source: str = "mini") -> Split:
        """Return a split; the source does not matter.

        Raises:
            ValueError: The generator does not have enough questions.
        """
        return self._drawn[0][name]

    @property
    def fingerprint(self) -> str:
        """Identifies the verifier and what it depends on."""
        recipe = (self.generator, version("reasoning-gym"), self.seed, sorted(self.config.items()), self.partial_credit)
        return hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """Score N texts.

        Raises:
            ValueError: A prompt is no question of the task, which no verifier can score.
        """
        entries = self._drawn[1]
        for prompt in prompts:
            check("prompts", prompt, prompt in entries, "questions of the task, which alone can be verified")
        return [self._score(text, entries[prompt]) for prompt, text in zip(prompts, completions, strict=True)]

    @functools.cached_property
    def _dataset(self) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            from reasoning_gym import create_dataset

            # Row i of their seed s is drawn by seed s + i: hashed, so that neighbouring seeds share no rows.
            seed = int(hash64(self.seed)) >> 33
            return create_dataset(self.generator, seed=seed, size=self._most_draws, **self.config)

    @property
    def _most_draws(self) -> int:
        return 100 + 20 * max(round(rows / _SHARES[name]) for name, rows in self.sizes.items())

    @functools.cached_property
    def _drawn(self) -> tuple[dict[str, Split], dict[str, dict[str, Any]]]:
        """The splits, and what the verifier needs by question."""
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        entries: dict[str, dict[str, Any]] = {}
        for index in range(self._most_draws):
            if all(len(rows[name]) == self.sizes[name] for name in SPLITS):
                break
            with contextlib.redirect_stdout(io.StringIO()):
                entry = self._dataset[index]
            question, answer = entry["question"], entry["answer"]
            name = _split_of(question)
            if question in entries or len(rows[name]) == self.sizes[name]:
                continue
            if answer is not None and self._score(answer, entry) < 1:
                continue
            rows[name].append({"question": question, "answer": answer, "index": index})
            entries[question] = entry
        else:
            found = {name: len(rows[name]) for name in SPLITS}
            raise ValueError(
                f"size, validation_size and test_size must be at most what generator {self.generator!r} has, got "
                f"{dict(self.sizes)}: {self._most_draws} draws gave only {found} distinct questions with these settings"
            )
        return {name: Split.of(rows[name]) for name in SPLITS}, entries

    def _score(self, text: str, entry: dict[str, Any]) -> float:
        answer = text.strip()
        with warnings.catch_warnings():  # of parsers about what they read
            warnings.simplefilter("ignore")
            if not _is_readable(self.generator, answer, entry):
                return 0.0
            try:
                # A copy, because some verifiers write into it.
                score = float(self._dataset.score_answer(answer, copy.deepcopy(entry)))
            except Exception:  # of any kind, as the verifiers do not say which
                return 0.0
        return min(max(score, 0.0), 1.0) if self.partial_credit else float(score >= 1)


def _split_of(question: str) -> str:
    draw = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) / 2**64
    return "train" if draw < _SHARES["train"] else "validation" if draw < 1 - _SHARES["test"] else "test"


def _is_readable(generator: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether a verifier may read an answer (see `task`)."""
    if len(answer) > _LENGTHS.get(generator, _MORE_CHARACTERS + 4 * len(entry["answer"] or "")):
        return False
    if generator in _UNREADABLE and re.search(_UNREADABLE[generator], answer):
        return False
    if generator in _FORMULAS:
        try:
            formula = ast.parse(answer, mode="eval").body
            return _digits(formula, (entry["metadata"]["variable"], "C")) <= _MOST_DIGITS
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return False
    return True


def _digits(node: ast.expr, names: Sequence[str], functions: Sequence[str] = _FUNCTIONS) -> float:
    """Bound the binary digits that a formula's value has with 2-digit numbers in place of its names.

    Raises:
        ValueError: It is no formula (see `task`).
    """
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return number.bit_length()
        case ast.Constant(value=float()):
            return 2  # it does not grow
        case ast.Name(id=name) if name in names:
            return 2
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _digits(operand, names, functions)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult(), left=left, right=right):
            return _digits(left, names, functions) + _digits(right, names, functions)
        case ast.BinOp(op=ast.Div(), left=left, right=right):
            return _digits(left, names, functions) + _constant(right).bit_length()
        case ast.BinOp(op=ast.Pow(), left=base, right=exponent):
            return max(_digits(base, names, functions), 1) * max(_constant(exponent), 1)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in functions:
            return 2 * _digits(argument, names, functions=())
    raise ValueError(f"formula must be made of numbers, {names} and functions, got {ast.dump(node)}")


def _constant(node: ast.expr) -> int:
    """Return the magnitude, rounded up, of a number, or of the larger part of a quotient of two.

    Raises:
        ValueError: It is neither.
    """
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and number < 1000:
            return math.ceil(number)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _constant(operand)
        case ast.BinOp(op=ast.Div(), left=left, right=right):
            return max(_constant(left), _constant(right))
    raise ValueError(f"constant must be a number below 1000, got {ast.dump(node)}")
