"""Countdown: an expression of given numbers that equals a target."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from textgym import seeding
from textgym.checks import check, check_int, check_one_of
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.tasks.procedural import Difficulty, Puzzle, WithPuzzle, choose

ANSWER = "=>"
# The scripted guide searches all ways to combine the numbers.
MOST_NUMBERS = 4
# No expression of four numbers needs more, and none of this length is nested too deeply for Python's parser.
MOST_CHARACTERS = 100
_EXACT = {
    ast.Add: Fraction.__add__,
    ast.Sub: Fraction.__sub__,
    ast.Mult: Fraction.__mul__,
    ast.Div: Fraction.__truediv__,
}


class Term(NamedTuple):
    """A value, and the words of an expression that has it."""

    value: int
    words: tuple[str, ...]


class Step(NamedTuple):
    """Two terms made one: the words of "a op b = c ,", the terms then, and whether a is not below b."""

    words: tuple[str, ...]
    terms: tuple[Term, ...]
    ordered: bool


@dataclass(frozen=True)
class Countdown(Puzzle):
    """Settings of Countdown (see `CountdownEnv`).

    Attributes:
        numbers: How many numbers are given, 2 to 4.
        train_numbers: The same for the training split; None for `numbers`.
        max_number: The greatest number given, at least 2.
        min_target: The least target, at least 1.
        max_value: The greatest target, and the greatest value on the way to it; not below `max_number` and
            `min_target`.
        search: Whether steps precede the expression.
    """

    numbers: Difficulty = 3
    train_numbers: Difficulty | None = None
    max_number: int = 20
    min_target: int = 10
    max_value: int = 100
    search: bool = False

    name = "countdown"
    difficulties = {"numbers": 2}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        for split, name in (("test", "numbers"), ("train", "train_numbers")):
            most = max(level[0] for level in self.levels(split))  # type: ignore[arg-type]
            check(name, getattr(self, name), most <= MOST_NUMBERS, f"at most {MOST_NUMBERS}")
        check_int("max_number", self.max_number, 2)
        check_int("min_target", self.min_target)
        check_int("max_value", self.max_value, max(self.max_number, self.min_target))
        check_one_of("search", self.search, (False, True))

    @property
    def words(self) -> Sequence[str]:
        """The numbers up to `max_value`, and signs."""
        return (*map(str, range(self.max_value + 1)), "+", "-", "*", "/", "(", ")", "=", ":", ",", ANSWER)

    def lengths(self, *level: int) -> tuple[int, int]:
        """Words of a prompt, and of the longest reference."""
        (numbers,) = level
        expression = 4 * numbers - 5  # all parts of it that are no number, and not it itself, are in parentheses
        return numbers + 3, expression + self.search * (6 * (numbers - 1) + 1)

    def problem(self, seed: int, *level: int) -> tuple[str, str] | None:
        """Numbers and steps of the seed's choice, whose last result is the target if it is large enough."""
        draws = seeding.uniform(seed, np.arange(2 * level[0]))
        given = sorted(seeding.integer(1, self.max_number, draws[: level[0]]).tolist())
        terms, steps = _terms(given), []
        for draw in draws[level[0] : -1]:
            possible = [step for step in _steps(terms, self.max_value) if step.ordered]
            if not possible:
                return None
            step = choose(possible, (), 1.0, draw)
            terms = step.terms
            steps += step.words
        ((target, expression),) = terms
        if target < self.min_target or target in given:
            return None
        prompt = " ".join(map(str, [*given, "=", target, ":"]))
        return prompt, " ".join([*steps, ANSWER, *expression] if self.search else expression)

    def worth(self, prompt: Sequence[str], text: Sequence[str]) -> float:
        """1 for an expression (with `search` after the one "=>") that equals the target exactly, else 0."""
        given, target = _read(prompt)
        if self.search and [*text].count(ANSWER) != 1:
            return 0.0
        expression = text[[*text].index(ANSWER) + 1 :] if self.search else text
        return float(bool(given) and _value(" ".join(expression), given) == target)

    def proceed(self, prompt: Sequence[str], text: list[str], draws: Sequence[float]) -> None:
        """Go on with steps that lead to the target, then with an expression; each is right with `guide_accuracy`.

        A wrong step is one from which the target cannot be reached; a wrong word of an expression is another sign.
        """
        given, target = _read(prompt)
        if not given or len(given) > MOST_NUMBERS:
            return
        intended: tuple[str, ...] = ()
        if self.search:
            intended = self._search(given, target, text, draws)
            if ANSWER not in text:
                return
        start = text.index(ANSWER) + 1 if self.search else 0
        begun = tuple(text[start:])
        solution: Sequence[str]
        if intended and intended[: len(begun)] == begun:
            text += intended[len(begun) :]  # what the steps have found
            return
        fitting = [words for words in _solutions(given, target, self.max_value) if words[: len(begun)] == begun]
        if len(text) >= len(draws):
            return
        if fitting:
            # By a draw of its own: the one of this position decides the next sign.
            solution = choose(fitting, (), 1.0, float(seeding.uniform(int(draws[len(text)] * 2**53))))
        else:
            solution = _closed(begun, given)
        for word in solution[len(begun) : len(begun) + len(draws) - len(text)]:
            others = [sign for sign in "+-*/" if sign != word] if word in "+-*/" else ()
            text.append(choose([word], others, self.guide_accuracy, draws[len(text)]))

    def _search(self, given: tuple[int, ...], target: int, text: list[str], draws: Sequence[float]) -> tuple[str, ...]:
        """Write steps up to "=>", and return the expression that they have found; none after words that are no step."""
        terms, place = _terms(given), 0
        while True:
            begun = tuple(text[place : text.index(ANSWER, place) if ANSWER in text[place:] else None][:6])
            found = [term for term in terms if term.value == target and len(term.words) > 1]
            if text[place : place + 1] == [ANSWER]:
                return (found or terms)[-1].words if place else ()
            possible = [step for step in _steps(terms, self.max_value) if step.words[: len(begun)] == begun]
            ends = not begun and (found or not possible)
            if len(begun) < 6 and len(text) >= len(draws):
                return ()
            if ends or not possible or (len(begun) < 6 and ANSWER in text):
                text += [] if ANSWER in text else [ANSWER]
                return (found or terms)[-1].words if ends and place else ()
            if len(begun) < 6:
                drawn = [step for step in possible if step.ordered] or possible
                right = [step for step in drawn if _reaches(_values(step.terms), target, self.max_value)]
                wrong = [step for step in drawn if step not in right]
                possible = [choose(right, wrong, self.guide_accuracy, draws[len(text)])]
                text += possible[0].words[len(begun) :]
            terms, place = possible[0].terms, place + 6


def _terms(numbers: Sequence[int]) -> tuple[Term, ...]:
    return tuple(Term(number, (str(number),)) for number in numbers)


def _values(terms: Sequence[Term]) -> tuple[int, ...]:
    return tuple(sorted(term.value for term in terms))


def _steps(terms: tuple[Term, ...], max_value: int) -> Iterator[Step]:
    """All steps from terms, with results from 1 to `max_value` that are neither of the two terms again."""
    for i, (a, left) in enumerate(terms):
        for j, (b, right) in enumerate(terms):
            if i == j:
                continue
            rest = tuple(term for k, term in enumerate(terms) if k not in (i, j))
            results = {"+": a + b, "-": a - b, "*": a * b} | ({} if a % b else {"/": a // b})
            for sign, c in results.items():
                if 1 <= c <= max_value and c not in (a, b):
                    parts = [["(", *words, ")"] if len(words) > 1 else words for words in (left, right)]
                    made = Term(c, (*parts[0], sign, *parts[1]))
                    ordered = a > b or (a == b and i < j)
                    yield Step((str(a), sign, str(b), "=", str(c), ","), (*rest, made), ordered)


@functools.lru_cache(2**16)
def _reaches(values: tuple[int, ...], target: int, max_value: int) -> bool:
    """Whether steps lead from values to the target."""
    following = {_values(step.terms) for step in _steps(_terms(values), max_value) if step.ordered}
    return target in values or any(_reaches(left, target, max_value) for left in sorted(following))


@functools.lru_cache(256)
def _solutions(given: tuple[int, ...], target: int, max_value: int) -> tuple[tuple[str, ...], ...]:
    """All expressions that steps lead to and that equal the target."""
    found: dict[tuple[str, ...], None] = {}

    def search(terms: tuple[Term, ...]) -> None:
        found.update({term.words: None for term in terms if term.value == target})
        if _reaches(_values(terms), target, max_value):
            for step in _steps(terms, max_value):
                search(step.terms)

    search(_terms(given))
    return tuple(found)


def _closed(begun: tuple[str, ...], given: tuple[int, ...]) -> tuple[str, ...]:
    """An expression that begins so, by the first number left and parentheses, as far as there is one."""
    unused = Counter(map(str, given)) - Counter(begun)
    needed = not begun or begun[-1] in ("(", "+", "-", "*", "/")
    number = [next(iter(unused), str(given[0]))] if needed else []
    return (*begun, *number, *[")"] * (begun.count("(") - begun.count(")")))


def _read(prompt: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """The numbers and the target of a prompt; no number where it is none."""
    match = re.fullmatch(r"((?:[1-9][0-9]{0,5} )+)= ([0-9]{1,6}) :", " ".join(prompt))
    return (tuple(map(int, match[1].split())), int(match[2])) if match else ((), 0)


def _value(expression: str, given: Sequence[int]) -> Fraction | None:
    """The exact value of an expression of numbers given, each used at most as often as it is; None for any other."""
    if len(expression) > MOST_CHARACTERS or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    left = Counter(given)

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _EXACT:
            return _EXACT[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int and left[node.value]:
            left[node.value] -= 1
            return Fraction(node.value)
        raise ValueError

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


class CountdownEnv(WithPuzzle, TextEnv, puzzle=Countdown):
    """Combine numbers to a target.

    Description
        The prompt is numbers in ascending order and a target: "3 7 12 = 33 :". The text is an expression of them with
        + - * / and parentheses, each used at most once, that equals the target exactly: "( 3 * 7 ) + 12". With
        ``search=True`` steps precede it, as in the worked solutions of UFT (arXiv 2505.16984; the form is our own):
        "7 * 3 = 21 , 21 + 12 = 33 , => ( 7 * 3 ) + 12"; what stands before the one "=>" is not scored.

        Every number up to ``max_value`` is a token of its own. A small model then learns tables of single tokens, with
        texts a third as long, where digits would ask for carries.

    Rewards
        Zero until the episode ends; then 1 if the expression equals the target, else 0.

        It is read by Python's parser and computed in fractions, never evaluated; anything else than the numbers given,
        the four signs and parentheses, or more than 100 characters, is worth 0.
        Every token of a guide's completion costs ``handoff_cost``.

    Arguments
        ``numbers``: how many numbers, 2 to 4, by default 3; an int or several, which then take turns.
        ``train_numbers``: the same for the training split, such as ``(2, 3)``; by default that of ``numbers``.
        ``max_number``: the greatest number, by default 20. ``min_target``: the least target, by default 10.
        ``max_value``: the greatest target, and the greatest value in a worked solution, by default 100; the vocabulary
        depends on it alone. Values of worked solutions are positive whole numbers.
        ``search``: True for steps before the expression, by default False.

        A step of the scripted guide is a sign of the expression, which is wrong if it is another sign. With
        ``search=True`` it is a step, which is wrong if the target cannot be reached after it; the expression is then
        the one that the steps have found.
    """


class CountdownVectorEnv(WithPuzzle, TextVectorEnv, puzzle=Countdown):
    """`CountdownEnv` for N rows at once (see `textgym.engine.TextVectorEnv`)."""
