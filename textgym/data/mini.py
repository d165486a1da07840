"""The mini edition of each task: texts written at call time by seeded grammars (their rules are in `grammars/`).

Small vocabulary, real structure: a review's verdict is carried by many different clauses, some of them conceded to the
other side; a concept set has several sentences that inflect and order its concepts in different ways; the summary of a
post states the facts that are scattered over it. The rows have the columns of the real data.
"""

from __future__ import annotations

import random
import re
import tomllib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from textgym.checks import check_one_of

SIZES = {"train": 6000, "validation": 500, "test": 500}

T = TypeVar("T")
Row = dict[str, Any]
_GRAMMARS = Path(__file__).with_name("grammars")
_MIRROR = str.maketrans("+-", "-+")


class _Draw:
    """Random choices by `random.Random.random` alone, whose sequence for a seed is the same in all Python versions."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return sorted(options, key=lambda _: self.random())


class _Grammar:
    """The rules of a file: an unindented line names a rule, the indented lines below it are its alternatives.

    ``{name}`` in an alternative stands for a rule. A rule whose name is in capitals is a fact: drawn once per text, the
    same wherever the text mentions it. A rule with ``±`` and ``∓`` in it stands for two, one for each sentiment: with
    ``+`` and ``-`` in their places, and with ``-`` and ``+``.
    """

    def __init__(self, file: str) -> None:
        source = (_GRAMMARS / file).read_text(encoding="utf-8")
        self.rules: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for block in re.split(r"\n+(?=\S)", source.strip()):
            mirrored = (block.translate(str.maketrans("±∓", signs)) for signs in ("+-", "-+"))
            for text in mirrored if "±" in block else [block]:
                name, *alternatives = (line.strip() for line in text.splitlines())
                self.rules[name] = [
                    (re.sub(r"\{[^}]*\}", "%s", line), tuple(re.findall(r"\{([^}]*)\}", line))) for line in alternatives
                ]

    def write(self, draw: _Draw, name: str, facts: dict[str, str]) -> str:
        """Write one alternative of a rule, and add the facts that it draws to `facts`."""
        if name in facts:
            return facts[name]
        template, names = draw.choice(self.rules[name])
        text = template % tuple([self.write(draw, part, facts) for part in names]) if names else template
        if name.isupper():
            facts[name] = text
        return text


def _paragraph(sentences: Sequence[str]) -> str:
    text = " ".join(sentences)
    return re.sub(r"(?:^|[.?] )[a-z]", lambda start: start[0].upper(), text)


# --- IMDB -------------------------------------------------------------------------------------------------------------

_LEADS = (
    ("Anna Reed", "her"), ("Clara Stone", "her"), ("Lucy Marsh", "her"), ("Nora Quinn", "her"),
    ("Tom Hale", "his"), ("Peter Lane", "his"), ("Victor Cole", "his"), ("Sam Carter", "his"),
)  # fmt: skip
_ASPECTS = (
    "acting", "story", "music", "dialogue", "ending", "pace", "camera", "humor",
    "people", "lead", "director", "compare", "audience", "viewer", "scenes",
)  # fmt: skip

_REVIEW = _Grammar("imdb.txt")


def _begin_review(draw: _Draw) -> tuple[str, dict[str, str]]:
    lead, his = draw.choice(_LEADS)
    facts = {"LEAD": lead, "his": his}
    return _REVIEW.write(draw, "opening", facts), facts


def _finish_review(draw: _Draw, opening: str, facts: dict[str, str]) -> Row:
    label = int(draw.random() < 0.5)
    side, other = "+-" if label else "-+"
    # How much of a review speaks for its verdict: nearly all of a plain one, a little more than half of a mixed one,
    # only the end of a turning one. So the first half of a review leaves its second half open.
    mood = draw.choice(("plain", "plain", "plain", "mixed", "turning"))
    length = 5 + int(draw.random() * 3)
    turn = length // 2 if mood == "turning" else 0
    aspects = iter(draw.shuffled(_ASPECTS))

    sentences = [opening]
    if draw.random() < 0.4:
        sentences.append(_REVIEW.write(draw, "plot", facts))
    for position in range(length):
        agrees = draw.random() < (0.6 if mood == "mixed" else 0.9)
        if position == turn > 0:
            form, sign = "turn", side
        elif draw.random() < 0.2:
            form, sign = "neutral", ""
        else:
            form = draw.choice(("single", "single", "pair", "mixed"))
            sign = side if agrees == (position >= turn) else other
        if sign:
            facts["one" + sign] = _REVIEW.write(draw, next(aspects) + sign, facts)
            sign_of_two = sign.translate(_MIRROR) if form == "mixed" else sign
            facts["two" + sign_of_two] = _REVIEW.write(draw, next(aspects) + sign_of_two, facts)
        sentence = _REVIEW.write(draw, form + sign, facts)
        if sentence not in sentences:
            sentences.append(sentence)
    if draw.random() < 0.9:
        sentences.append(_REVIEW.write(draw, "verdict" + side, facts))
    return {"text": _paragraph(sentences), "label": label}


# --- CommonGen --------------------------------------------------------------------------------------------------------

_SCENES = tomllib.loads((_GRAMMARS / "commongen.toml").read_text(encoding="utf-8"))
_PLACES = {place: f"{words} {place}" for words, places in _SCENES["places"].items() for place in places.split()}
_PLURALS, _MASS, _COMPANIONS = _SCENES["plurals"], _SCENES["mass"].split(), _SCENES["companions"].split()
# Forms of the verb, who, what, where, and the word before a companion.
_FRAMES = [
    [field.replace("PEOPLE", _SCENES["people"]).split() for field in line.split("|")]
    for line in _SCENES["frames"].strip().splitlines()
]
# Forms of what a companion does: present, progressive, past.
_BYSTANDING = {
    verb: (f"{verb}s", f"is {stem}ing", f"{stem}ed") for verb, stem in _SCENES["stems_of_bystanders"].items()
}
# Parts of a scene by their letters (see the file), for each kind of concept set.
_CONCEPT_PARTS = _SCENES["concepts"].split()


def _begin_scene(draw: _Draw) -> tuple[str, dict[str, Any]]:
    frame = draw.choice(_FRAMES)
    scene = _complete(draw, frame, {})
    concepts = {part: scene[part] for part in draw.choice(_CONCEPT_PARTS)}
    return " ".join(sorted(concepts.values())), {"frame": frame, "concepts": concepts}


def _finish_scene(draw: _Draw, key: str, scene: dict[str, Any]) -> Row:
    count = 3 + int(draw.random() * 3)
    targets = dict.fromkeys(_sentence(draw, **scene) for _ in range(count))  # no sentence twice, in order
    return {"concepts": draw.shuffled(tuple(scene["concepts"].values())), "targets": list(targets)}


def _complete(draw: _Draw, frame: list[list[str]], concepts: dict[str, str]) -> dict[str, str]:
    """Choose the parts of a scene that its concepts leave open."""
    (verb, *_), agents, things, places, _ = frame
    agent = concepts.get("A") or draw.choice([agent for agent in agents if agent != concepts.get("B")])
    companion = draw.choice([companion for companion in _COMPANIONS if companion != agent])
    scene = {"A": agent, "V": verb, "O": draw.choice(things), "L": draw.choice(places), "B": companion}
    return scene | {"W": draw.choice(tuple(_BYSTANDING))} | concepts


def _noun(draw: _Draw, noun: str, several: bool = False) -> str:
    """A noun with an article or a number."""
    if noun in _MASS:
        return draw.choice(("some ", "the ")) + noun
    if several:
        return draw.choice(("two ", "some ", "the ")) + _PLURALS.get(noun, noun + "s")
    return draw.choice(("the ", "an " if noun[0] in "aeiou" else "a ")) + noun


def _sentence(draw: _Draw, frame: list[list[str]], concepts: dict[str, str]) -> str:
    """Write a sentence that shows all concepts of a scene, and sometimes more of it."""
    scene = _complete(draw, frame, concepts)
    (verb, verbs, verbing, verbed), joint = frame[0], frame[4][0]
    tense = int(draw.random() * 3)  # present, progressive, past

    agents, things = draw.random() < 0.25, draw.random() < 0.25 and scene["O"] not in _MASS
    who, what = _noun(draw, scene["A"], agents), _noun(draw, scene["O"], things)
    where = _PLACES[scene["L"]] if "L" in concepts or draw.random() < 0.3 else ""
    companion = meanwhile = ""
    if "W" in concepts:
        meanwhile = f"{_noun(draw, scene['B'])} {_BYSTANDING[scene['W']][tense]}"
    elif "B" in concepts or draw.random() < 0.15:
        companion = f"{joint} {_noun(draw, scene['B'])}"
        if joint == "with" and draw.random() < 0.4:
            who, agents, companion = f"{who} and {companion.removeprefix('with ')}", True, ""
    be = "are" if agents else "is"
    does = (verb if agents else verbs, f"{be} {verbing}", verbed)[tense]

    form = draw.random()
    if form < 0.15 and not companion:
        be = "are" if things else "is"
        done = (f"{be} {verbed}", f"{be} being {verbed}", f"{'were' if things else 'was'} {verbed}")[tense]
        words = [what, done, "by", who, where]
    elif form < 0.3 and not meanwhile and not who.startswith("the "):
        words = ["there", be, who, verbing, what, companion, where]
    elif form < 0.5 and where:
        words = [where + ",", who, does, what, companion]
    elif form < 0.65 and where:
        words = [who, where, does, what, companion]
    else:
        words = [who, does, what, companion, where]
    if meanwhile and form < 0.75:
        words += [draw.choice(("while", "as")), meanwhile]
    elif meanwhile:
        words = [meanwhile, draw.choice(("while", "as")), *words]
    text = " ".join([word for word in words if word])
    return text[0].upper() + text[1:] + "."


# --- TL;DR ------------------------------------------------------------------------------------------------------------

_PEOPLE_WE_KNOW = tuple(
    (who, *pronouns.split())
    for pronouns, people in (
        ("she her her", ("my sister", "my aunt", "my stepsister", "my mother", "my niece", "my grandmother")),
        ("he him his", ("my brother", "my uncle", "my stepbrother", "my father", "my nephew", "my grandfather")),
        ("she her her", ("my roommate", "my best friend", "my neighbor", "my cousin")),
        ("he him his", ("my roommate", "my best friend", "my neighbor", "my cousin")),
    )
    for who in people
)

_POST = _Grammar("tldr.txt")


def _begin_post(draw: _Draw) -> tuple[str, dict[str, str]]:
    who, he, him, his = draw.choice(_PEOPLE_WE_KNOW)
    # The others are of the other gender, so that it is clear whom a pronoun means.
    other, third, *_ = draw.shuffled([person[0] for person in _PEOPLE_WE_KNOW if person[1] != he and person[0] != who])
    facts = {"WHO": who, "he": he, "He": he.capitalize(), "him": him, "his": his, "OTHER": other, "THIRD": third}
    topic = facts["topic"] = _POST.write(draw, "topic", facts)
    facts["ASK"] = _POST.write(draw, topic + ".ask", facts)
    return " ".join([topic, who, facts["ASK"], _POST.write(draw, topic + ".facts", facts)]), facts


def _finish_post(draw: _Draw, key: str, facts: dict[str, str]) -> Row:
    def write(name: str) -> str:
        return _POST.write(draw, name, facts)

    topic = facts["topic"]
    while (bad_idea := write(topic + ".ask")) == facts["ASK"]:
        pass
    facts["BAD_IDEA"] = bad_idea
    sentences = [write("start")] if draw.random() < 0.6 else []
    for part in ("1", "2", "3"):
        sentences.append(write(f"{topic}.{part}"))
        if draw.random() < 0.6 and (filler := write("filler")) not in sentences:
            sentences.append(filler)
    if draw.random() < 0.6:
        sentences.append(write("advice"))
    sentences.append(write("question"))
    if draw.random() < 0.5:
        sentences.append(write("thanks"))
    return {
        "subreddit": write(topic + ".subreddit"),
        "title": _paragraph([write(topic + ".title")]),
        "post": _paragraph(sentences),
        "summary": _paragraph([write(topic + ".tldr")]),
    }


# --- the splits -------------------------------------------------------------------------------------------------------

_WRITERS: dict[str, tuple[Callable[[_Draw], tuple[str, Any]], Callable[[_Draw, str, Any], Row]]] = {
    "imdb": (_begin_review, _finish_review),
    "commongen": (_begin_scene, _finish_scene),
    "tldr": (_begin_post, _finish_post),
}


def _split_of(key: str) -> str:
    percent = zlib.crc32(key.encode()) % 100
    return "train" if percent < 80 else "validation" if percent < 90 else "test"


def mini_rows(task_name: str, split: str) -> list[Row]:
    """Write one split of a task's mini edition.

    The key of a sample (the opening sentence of a review, the concepts of a set, the facts of a post) can be read from
    its prompt, and a hash of the key decides the split: no prompt is in two splits.

    Args:
        task_name: "imdb", "commongen" or "tldr".
        split: "train", "validation" or "test".

    Returns:
        `SIZES[split]` rows, the same in every process and on every Python, with the columns of the real data: text and
        label; concepts and targets; subreddit, title, post and summary.

    Raises:
        ValueError: An unknown task or split.
    """
    begin, finish = _WRITERS[check_one_of("task_name", task_name, sorted(_WRITERS))]
    check_one_of("split", split, list(SIZES))
    draw = _Draw(zlib.crc32(f"{task_name} {split}".encode()))
    keys: set[str] = set()
    rows: list[Row] = []
    while len(rows) < SIZES[split]:
        key, plan = begin(draw)
        if key not in keys and _split_of(key) == split:
            keys.add(key)
            rows.append(finish(draw, key, plan))
    return rows
