"""What a guide returns is read as what it is, or refused; nothing is taken for something else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.completions import complete
from textgym.guides import CallableGuide, Completion, GuideRequest
from textgym.tokenization import (
    NO_CONTEXT,
    StopCriteria,
    beginning,
    encode,
    encode_continuations,
    train_tokenizer,
)

TOKENIZER = train_tokenizer([" ".join(WORDS), " " + " ".join(reversed(WORDS))] * 3)
ENDS = StopCriteria(TOKENIZER)


def ask(returned, count=1, limit=8):
    requests = [GuideRequest("red sun", (2, 3), "", (), limit, seed) for seed in range(count)]
    return complete(CallableGuide(lambda _: returned), requests, [NO_CONTEXT] * count, TOKENIZER, ENDS)


SUN = encode(TOKENIZER, [" sun"])[0]
SIZE = len(TOKENIZER)

READ = {
    "text": " sun",
    "a completion": Completion(text=" sun"),
    "ids and EOS": [*SUN, 0],
    "a tuple": (*SUN, 0),
    "an array": np.array([*SUN, 0]),
    "small integers of NumPy": [np.int16(token) for token in (*SUN, 0)],
    "unsigned": np.array([*SUN, 0], np.uint16),
    "a tensor": torch.tensor([*SUN, 0]),
    "a completion of a tensor": Completion(token_ids=torch.tensor(SUN)),
    "a range": range(SUN[0], SUN[0] + 1),
}


@pytest.mark.parametrize("kind", READ)
def test_what_is_read(kind):
    [(ids, ended)] = ask([READ[kind]])
    assert ids == ([*SUN, 0] if ended else SUN)
    assert all(type(token) is int for token in ids)
    assert ended == (kind != "a range")
    assert ask((READ[kind],)) == [(ids, ended)]


REFUSED_FOR_ONE = {
    "bytes": b" sun",
    "bytearray": bytearray(b" sun"),
    "memoryview": memoryview(b" sun"),
    "None": None,
    "an int": 5,
    "a float": 5.0,
    "a bool": True,
    "floats": [5.0, 6.0],
    "an array of floats": np.array([5.0]),
    "a tensor of floats": torch.tensor([5.0]),
    "nan": [float("nan")],
    "bools": [True, False],
    "an array of bools": np.array([True]),
    "digits": ["5", "6"],
    "a list of words": [" sun", " moon"],
    "a list of ids": [[5, 6]],
    "two dimensions": np.array([[5, 6]]),
    "no dimension": np.array(5),
    "a set": {5, 6},
    "a mapping": {5: 6},
    "a generator": (token for token in [5]),
    "an object": object(),
    "nulls": [None],
    "negative": [-1],
    "beyond the vocabulary": [SIZE],
    "far beyond": [2**70],
    "a mapping with text": {"text": " sun"},
    "neither": Completion(),
    "text as bytes": Completion(text=b" sun"),
    "text as a list": Completion(text=[" sun"]),
    "text as a number": Completion(text=5),
    "ids as a string": Completion(token_ids="56"),
    "ids as bytes": Completion(token_ids=b"56"),
    "ids as floats": Completion(token_ids=[5.0]),
    "finished as a string": Completion(text=" sun", finished="no"),
    "finished as None": Completion(text=" sun", finished=None),
    "finished as a number": Completion(text=" sun", finished=1),
    "half a surrogate pair": " sun\ud800",
    "the other half": Completion(text="\udc00 sun"),
}


@pytest.mark.parametrize("kind", REFUSED_FOR_ONE)
def test_what_is_refused(kind):
    with pytest.raises(ValueError, match=r"guide must return|Completion.finished must be True or False") as raised:
        ask([REFUSED_FOR_ONE[kind]])
    assert len(str(raised.value)) < 400
    str(raised.value).encode()


REFUSED_FOR_THREE = {
    "one string": " ab",
    "a long string": " red sun",
    "bytes": b"abc",
    "a mapping": {0: " a", 1: " b", 2: " c"},
    "a set": {" a", " b", " c"},
    "a generator": (text for text in [" a", " b", " c"]),
    "one completion": Completion(text=" a"),
    "None": None,
    "a number": 3,
    "too few": [" a", " b"],
    "too many": [" a"] * 4,
    "none": [],
}


@pytest.mark.parametrize("kind", REFUSED_FOR_THREE)
def test_three_requests_have_three_completions(kind):
    with pytest.raises(ValueError, match=r"guide must return (a list with )?one completion per request"):
        ask(REFUSED_FOR_THREE[kind], count=3)


@pytest.mark.parametrize(
    "text", ["<|endoftext|>", " red<|endoftext|> sun", "<|pad|> sun", " <|endoftext|><|pad|>", " a <|endoftext|"]
)
def test_the_name_of_a_special_token_is_text(text):
    """It is the real token only in the template of an environment and where `stop` names it."""
    [(ids, ended)] = ask([text], limit=60)
    assert ended
    assert not {0, 1} & set(ids[:-1])
    assert TOKENIZER.decode(ids[:-1]).strip() == text.strip()
    assert encode_continuations(TOKENIZER, [""], [text])[0] == ids[:-1]
    assert encode(TOKENIZER, ["<|endoftext|>"]) == [[0]], "and the tokenizer is as it was"


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.sampled_from([*WORDS, "unheard", "é", "\U0001f600", "<|endoftext|>", "\n\n", "aaaaaaaaaaaaaaa"])),
    limit=st.integers(1, 12),
)
def test_a_beginning_has_the_first_tokens(words, limit):
    text = "".join(f" {word}" for word in words * 20)
    begun = beginning(TOKENIZER, text, limit)
    assert text.startswith(begun)
    assert encode(TOKENIZER, [begun], literal=True)[0][:limit] == encode(TOKENIZER, [text], literal=True)[0][:limit]


@pytest.mark.parametrize("letter", [" red sun", "a", " ", "\n", "\U0001f600", "<|endoftext|>"])
def test_a_huge_text_is_cut_before_it_is_encoded(letter, monkeypatch):
    encoded = []
    call = type(TOKENIZER).__call__
    count = lambda self, texts, **how: encoded.append(sum(map(len, texts))) or call(self, texts, **how)  # noqa: E731
    monkeypatch.setattr(type(TOKENIZER), "__call__", count)
    [(ids, ended)] = ask([letter * 10_000_000], limit=6)
    assert len(ids) == 6
    assert not ended
    assert max(encoded) < 1000
