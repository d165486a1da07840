"""A server that lies, stalls, breaks off and repeats the key: a guide stays within its bounds, and says what it got."""

import contextlib
import copy
import gc
import gzip
import html
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from base64 import b64encode
from dataclasses import asdict
from urllib.parse import quote

import pytest
from fake_server import FakeServer, request, requests, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from textgym.guides.answers import Answer, read_answer
from textgym.guides.api_key import Redactor
from textgym.guides.http import Budget, BudgetExceeded, HTTPGuide

pytest.importorskip("httpx2")
KEY = "sk-ThisMustNeverBeSeen-0123456789"
NOW = {"retry-after-ms": "1"}


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


def completion(text=" red sun", reason="stop", **usage):
    """An answer; without `usage` it has none."""
    return {"choices": [{"text": text, "index": 0, "finish_reason": reason}], **({"usage": usage} if usage else {})}


def with_usage(prompt_tokens, completion_tokens=2):
    return {**completion(), "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


def make(server, **arguments):
    return HTTPGuide("words", **{"base_url": server.url, "max_retries": 0, **arguments})


# What servers make of the header with which they got the key: a status, and a payload.
ECHOES = {
    "plain": lambda key: (401, {"error": {"message": f"{key} is wrong"}}),
    "whole header": lambda key: (401, {"error": {"message": f"Bearer {key}"}}),
    "no JSON": lambda key: (500, f"<html>{key}</html>"),
    "no completion": lambda key: (200, {"oops": key}),
    "in a name": lambda key: (200, {key: 1}),
    "half of it": lambda key: (401, {"error": {"message": f"{key[:12]}..."}}),
    "masked": lambda key: (401, {"error": {"message": f"{key[:9]}****{key[-9:]}"}}),
    "cut by the quotation": lambda key: (200, {"oops": "x" * 175 + key}),
    "capitals": lambda key: (401, {"error": {"message": key.upper()}}),
    "small letters": lambda key: (401, {"error": {"message": key.lower()}}),
    "backwards": lambda key: (401, {"error": {"message": key[::-1]}}),
    "JSON escapes": lambda key: (401, '{"error": {"message": "' + "".join(f"\\u{ord(c):04x}" for c in key) + '"}}'),
    "escapes outside of JSON": lambda key: (500, "<p>" + "".join(f"\\x{ord(c):02x}" for c in key)),
    "HTML entities": lambda key: (500, "<p>" + "".join(f"&#{ord(c)};" for c in key)),
    "HTML": lambda key: (500, html.escape(key)),
    "percent signs": lambda key: (500, "".join(f"%{ord(c):02x}" for c in key)),
    "URL": lambda key: (500, quote(key)),
    "hexadecimal": lambda key: (401, {"error": {"message": key.encode().hex()}}),
    "base64": lambda key: (401, {"error": {"message": b64encode(f"Bearer {key}".encode()).decode()}}),
    "base64 of two": lambda key: (401, {"error": {"message": b64encode(f"me:{key}".encode()).decode()}}),
    "error as a string": lambda key: (400, {"error": key}),
    "twice": lambda key: (400, {"error": f"{key}{key} and {key}"}),
    "in the completion": lambda key: (200, completion(f" {key} and more", prompt_tokens=3, completion_tokens=2)),
    "as a reason": lambda key: (200, completion(" sun", key, prompt_tokens=3, completion_tokens=2)),
    "as a count": lambda key: (200, with_usage(key)),
}


def echo(form, header=None):
    """What the server does: send the key back."""

    def reply(handler):
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        status, payload = ECHOES[form](key)
        payload = payload if isinstance(payload, str) else json.dumps(payload)
        handler.send_response(status, key)  # as a reason, which is logged
        handler.send_header("X-Your-Key", key)
        handler.send_header("Location", f"http://elsewhere/{key}")
        handler.send_header("Content-Length", str(len(payload)))
        handler.end_headers()
        handler.wfile.write(payload.encode())

    return reply


def forms_of(key):
    """Texts that would give it away, in small letters: pieces, and other digits."""
    whole = key.lower()
    forms = [whole[i : i + 10] for i in range(0, len(whole) - 9)] + [whole[::-1][i : i + 10] for i in range(20)]
    escaped = "".join(f"\\u{ord(c):04x}" for c in key[5:15])
    entities, percents = "".join(f"&#{ord(c)};" for c in key[5:15]), "".join(f"%{ord(c):02x}" for c in key[5:15])
    base64 = [b64encode(f"{before}{key}".encode()).decode()[16:36].lower() for before in ("", "me:", "Bearer ")]
    return [*forms, key.encode().hex()[4:24], escaped, entities, percents, *base64]


@pytest.mark.parametrize("form", ECHOES)
@pytest.mark.parametrize(
    "key", [KEY, f"\n {KEY}\r\n", KEY[:14] + "\"'\\{}<&%" + KEY[14:]], ids=["plain", "space", "signs"]
)
def test_the_key_is_in_nothing_that_leaves(server, words_tokenizer, tmp_path, monkeypatch, caplog, form, key):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.always = echo(form)
    guide = make(server, cache=tmp_path)
    seen = [repr(guide), guide.fingerprint, repr(vars(guide)), repr(vars(copy.deepcopy(guide)))]
    try:
        written = guide.complete([request()], words_tokenizer)
        seen += [repr(written), words_tokenizer.decode(written[0].token_ids)]
    except RuntimeError as error:
        assert ECHOES[form](key)[0] != 200 or form in ("no completion", "in a name", "cut by the quotation")
        seen += [str(error), repr(error), "".join(traceback.format_exception(error))]
        while error is not None:
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if "textgym" in frame.f_code.co_filename:
                    seen.append(repr(frame.f_locals))
            error = error.__cause__ or error.__context__
    assert server.headers[0]["authorization"] == f"Bearer {key.strip()}"
    seen += [
        caplog.text,
        repr([vars(record) for record in caplog.records]),
        repr(guide.usage),
        pickle.dumps(guide).decode("latin-1"),
    ]
    seen += [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    assert "HTTP Request" in caplog.text
    for text in seen:
        assert not [piece for piece in forms_of(key.strip()) if piece in text.lower()]


@pytest.mark.parametrize(
    "key", [f"{KEY}\x01", f"{KEY[:9]}\r\nX: {KEY[9:]}", f"{KEY}é", f"“{KEY}”", f"\ufeff{KEY}", f"{KEY}\x7f"]
)
def test_a_key_that_can_be_none_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ValueError, match="MY_KEY must hold printable ASCII characters") as raised:
        HTTPGuide("words", base_url="https://example.com/v1", api_key_env="MY_KEY")
    assert not [piece for piece in forms_of(KEY) if piece in "".join(traceback.format_exception(raised.value)).lower()]
    monkeypatch.setenv("MY_KEY", " \n")
    with pytest.raises(ValueError, match="MY_KEY is not set"):
        HTTPGuide("words", base_url="https://example.com/v1", api_key_env="MY_KEY")


def test_a_password_in_a_url_is_not_shown():
    for url in ("http://me:secret@localhost/v1", "htp://me:secret@localhost/v1", "http://me:secret@localhost:x/v1"):
        with pytest.raises(ValueError, match="base_url must have no user") as raised:
            HTTPGuide("words", base_url=url)
        assert "secret" not in str(raised.value)
    for url in ("http://localhost/v1\n", "http://localhost/\x1b[2J", "http://löcalhost/v1"):
        with pytest.raises(ValueError, match="base_url must be a URL such as") as raised:
            HTTPGuide("words", base_url=url)
        assert str(raised.value).isprintable()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.integers(0, len(KEY)), st.integers(0, len(KEY)))
def test_what_is_no_key_is_left_as_it_is(before, after, start, end):
    redact = Redactor(KEY)
    piece = KEY[start:end]
    text = f"{before}|{piece}|{after}"  # no letter of the key beside it
    assert redact(text) == (text if len(piece) < 16 else f"{before}|***|{after}")
    assert Redactor(None)(text) == Redactor("none")(text) == text
    shown = redact.quote(text)
    assert shown.isprintable()
    assert len(piece) < 8 or piece not in shown
    placeholder = Redactor("sk-no-key-required")
    assert placeholder(" a word is required") == " a word is required"
    assert placeholder(" sk-no-key-required") == " ***"


# Answers with status 200 that are no completions.
BAD = {
    "HTML": "<html>",
    "nothing": "",
    "garbage": "{not json",
    "list": [],
    "null": "null",
    "string": '"x"',
    "number": "5",
    "error object": {"error": {"message": "overloaded"}},
    "no choices": {"choices": [], "usage": {"prompt_tokens": 1}},
    "null choices": {"choices": None},
    "choices of strings": {"choices": ["abc"]},
    "choices of nulls": {"choices": [None]},
    "choices as an object": {"choices": {"0": {}}},
    "no text": {"choices": [{"finish_reason": "stop"}]},
    "number as text": completion(5),
    "list as text": completion(["a"]),
    "object as text": completion({"a": 1}),
    "deep": "[" * 200_000,
    "deep and closed": "[" * 100_000 + "]" * 100_000,
    "no UTF-8": b'{"choices":[{"text":"\xff\xfe\x80"}]}',
    "count of 5,000 digits": '{"choices":[{"text":" a"}],"usage":{"prompt_tokens":' + "9" * 5000 + "}}",
    "escapes": "\x1b]0;owned\x07\x1b[2J\u202e",
    "NUL": "\0\0\0",
    "endless": "x" * (2**16),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_tried_again_and_then_an_error(server, words_tokenizer, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("textgym.guides.server._FIRST_WAIT", 0.001)
    guide = make(server, max_retries=1, cache=tmp_path)
    server.plan = [(200, {}, BAD[kind])]
    [fine] = guide.complete([request(limit=1)], words_tokenizer)
    assert len(fine.token_ids) == 1
    assert (guide.usage.calls, guide.usage.failures) == (2, 1)
    server.plan = [(200, {}, BAD[kind])] * 2
    with pytest.raises(RuntimeError, match=r"must answer with a completion, got ['\"].*, 2 tries") as raised:
        guide.complete([request(limit=1, seed=1)], words_tokenizer)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1200, "of escapes; 200 characters otherwise"
    again = make(server, cache=tmp_path)
    again.complete([request(limit=1), request(limit=1, seed=1)], words_tokenizer)
    assert (again.usage.cache_hits, again.usage.calls) == (1, 1), "what is bad is not kept"


ANY = st.characters(exclude_categories=())  # with half surrogate pairs
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(ANY, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "text": VALUES | st.text(ANY),
        "message": VALUES | st.fixed_dictionaries({"content": st.text()}),
        "finish_reason": VALUES | st.sampled_from(["stop", "length"]),
        "logprobs": VALUES | st.fixed_dictionaries({"token_logprobs": st.lists(st.floats() | st.none(), max_size=4)}),
        "prompt_logprobs": VALUES | st.lists(st.fixed_dictionaries({"7": st.just({"logprob": -0.5})}), max_size=4),
    },
)
REPLIES = VALUES | st.fixed_dictionaries(
    {"choices": VALUES | st.lists(FIELDS, min_size=1, max_size=2)},
    optional={"usage": VALUES | st.dictionaries(st.sampled_from(["prompt_tokens", "completion_tokens"]), VALUES)},
)


@settings(max_examples=400, deadline=None)
@given(REPLIES, st.booleans())
def test_whatever_a_server_answers_is_read_or_refused(reply, scored):
    plain = {"model": "words", "prompt": "red sun" * 9, "max_tokens": 6}
    body = {**plain, "prompt": [7, 7, 7], "echo": True} if scored else plain
    try:
        answer = read_answer(json.loads(json.dumps(reply)), body, Redactor(KEY))
    except (AttributeError, LookupError, TypeError, ValueError):
        return
    answer.text.encode()
    assert answer.finish_reason in (None, "stop", "length", "content_filter")
    assert (3 if scored else 1) <= answer.prompt_tokens < 10**7
    assert 0 <= answer.completion_tokens < 10**7
    assert answer.log_probs is None or (scored and len(answer.log_probs) == 2)
    assert Answer(**json.loads(json.dumps(asdict(answer)))) == answer


def test_what_an_answer_may_lack(server, words_tokenizer, tmp_path):
    guide = make(server, cache=tmp_path)
    for seed, (answer, text) in enumerate(
        (
            (completion(), " red sun"),
            ({"choices": [{"text": " red sun"}]}, " red sun"),
            (completion(" red\ud800 sun"), " red\ufffd sun"),
            (completion("\udc00"), "\ufffd"),
            (completion(" a\0b\x1b[31m"), " a\0b\x1b[31m"),
            (completion(None), ""),
            (completion(" red sun", ["x"]), " red sun"),
            (completion(" red<|endoftext|> sun"), " red<|endoftext|> sun"),
            (completion("<|pad|>"), "<|pad|>"),
        )
    ):
        server.plan = [(200, {}, answer)]
        for _ in range(2):  # the second is the cache's
            [written] = guide.complete([request(seed=seed, limit=40)], words_tokenizer)
            ids = list(written.token_ids)
            assert words_tokenizer.decode(ids).lstrip() == text.lstrip()
            assert not {0, 1} & set(ids), "a special token's name is text"
    assert guide.usage.cache_hits == guide.usage.calls == 9


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["another port", "/v1/completions", "file:///etc/passwd", "//elsewhere/"])
def test_prompts_go_nowhere_else(server, words_tokenizer, monkeypatch, status, place):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other = FakeServer()
    server.always = (status, {"Location": f"{other.url}/completions" if place == "another port" else place}, "")
    with contextlib.closing(other.socket), pytest.raises(RuntimeError, match=f"answered {status} .*it redirects to"):
        make(server, max_retries=3).complete([request()], words_tokenizer)
    assert len(server.bodies) == 1
    assert not other.bodies


def drip(handler, seconds=3.0):
    """Send a byte each twentieth of a second."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(int(seconds * 20)):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_headers(handler):
    for letter in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10:
        handler.wfile.write(bytes([letter]))
        handler.wfile.flush()
        time.sleep(0.05)


def reset(handler):
    handler.connection.close()


def break_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')


def no_http(handler):
    handler.wfile.write(b"\0\0garbage\r\n\r\n")


@pytest.mark.parametrize(
    ("does", "kind"),
    [
        (drip, TimeoutError),
        (drip_headers, TimeoutError),
        (lambda handler: time.sleep(2), TimeoutError),
        (reset, ConnectionError),
        (break_off, ConnectionError),
        (no_http, ConnectionError),
        ((200, {"Content-Encoding": "gzip"}, "no gzip"), ConnectionError),
    ],
)  # fmt: skip
def test_timeout_is_a_bound_on_an_answer_in_all(server, words_tokenizer, does, kind):
    server.always = does
    guide = make(server, timeout=0.2, budget=Budget(prices=(1.0, 10.0)))
    started = time.monotonic()
    with pytest.raises(kind, match="1 tries"):
        guide.complete([request("red sun and one blue tree more")], words_tokenizer)
    assert time.monotonic() - started < 1.5
    usage = guide.usage
    assert (usage.calls, usage.failures, usage.prompt_tokens, usage.completion_tokens) == (1, 1, 8, 6), (
        "may be paid for"
    )
    assert usage.cost == 68


@pytest.mark.parametrize(
    "pack", [lambda body: (200, {}, body), lambda body: (200, {"Content-Encoding": "gzip"}, gzip.compress(body, 1))]
)
def test_a_huge_answer_is_cut_or_refused(server, words_tokenizer, pack, monkeypatch):
    """A long one is cut before it is encoded: 20 MB of words would take a minute. More is not read."""
    monkeypatch.setattr("textgym.guides.server._MOST_BYTES", 1 << 25)
    guide, encoded = make(server), []
    encode = type(words_tokenizer).__call__
    monkeypatch.setattr(
        type(words_tokenizer), "__call__", lambda *a, **k: encoded.append(sum(map(len, a[1]))) or encode(*a, **k)
    )
    server.always = pack(json.dumps(completion(" red sun" * (20 << 17))).encode())
    [written] = guide.complete([request()], words_tokenizer)
    assert words_tokenizer.decode(written.token_ids) == " red sun red sun red sun"
    assert max(encoded) < 1000
    server.always = pack(json.dumps(completion(" red sun" * (40 << 17))).encode())
    with pytest.raises(RuntimeError, match=r"must answer with a completion, got .{200,300}, 1 tries$"):
        guide.complete([request(seed=1)], words_tokenizer)


def test_interrupting_a_hanging_guide_ends_it(server):
    code = (
        # Processes that pytest starts in the background ignore the signal, and so do their children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from transformers import PreTrainedTokenizerFast; from textgym.guides import GuideRequest;"
        "from textgym.guides.http import HTTPGuide;"
        "guide = HTTPGuide('m', base_url=sys.argv[1], timeout=60);"
        "print('asking', flush=True);"
        "guide.complete([GuideRequest('red', (2,), '', (), 6, seed) for seed in range(40)], None)"
    )
    server.always = lambda handler: time.sleep(4)
    process = subprocess.Popen([sys.executable, "-c", code, server.url], stdout=-1, stderr=-1)
    process.stdout.readline()
    while len(server.bodies) < 16:
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert time.monotonic() - started < 2
    assert said.endswith(b"KeyboardInterrupt\n")


COUNTS = {
    "none": None,
    "null": {"prompt_tokens": None, "completion_tokens": None},
    "negative": {"prompt_tokens": -1_000_000, "completion_tokens": -5},
    "zero": {"prompt_tokens": 0, "completion_tokens": 0},
    "strings": {"prompt_tokens": "x", "completion_tokens": "7"},
    "fractions": {"prompt_tokens": 0.1, "completion_tokens": 1.5},
    "infinite": {"prompt_tokens": float("inf"), "completion_tokens": float("-inf")},
    "nan": {"prompt_tokens": float("nan"), "completion_tokens": float("nan")},
    "huge": {"prompt_tokens": 10**400, "completion_tokens": 10**12},
    "booleans": {"prompt_tokens": True, "completion_tokens": False},
    "list": [],
    "lists": {"prompt_tokens": [], "completion_tokens": {}},
}


@pytest.mark.parametrize("kind", COUNTS)
def test_a_server_cannot_lower_a_budget(server, words_tokenizer, kind):
    """Each call reads 250 bytes, at least 7 tokens, and is asked for 6."""
    server.always = (200, {}, completion(" red sun" * 20) | ({} if COUNTS[kind] is None else {"usage": COUNTS[kind]}))
    text = "red sun and blue moon and" * 10
    guide = make(server, budget=Budget(tokens=500, cost=1e6, prices=(1.0, 1.0)), concurrency=1)
    with pytest.raises(BudgetExceeded, match=r"of 500 tokens"):
        guide.complete([request(text, seed=seed, limit=6) for seed in range(100)], words_tokenizer)
    calls, usage = guide.usage.calls, guide.usage
    assert calls == len(server.bodies) <= 500 // (7 + 5) + 1
    assert usage.cost == usage.prompt_tokens + usage.completion_tokens < 1000
    if kind not in ("zero",):
        assert (usage.prompt_tokens, usage.completion_tokens) == (63 * calls, 6 * calls), "what was sent and asked for"


def test_a_budget_of_calls_counts_every_request(server, words_tokenizer):
    server.always = (500, NOW, {"error": {"message": "oops"}})
    guide = make(server, budget=Budget(calls=4), max_retries=9)
    with pytest.raises(BudgetExceeded, match="4 of 4 calls"):
        guide.complete([request()], words_tokenizer)
    unguided = make(server, budget=Budget(calls=4, when_spent="unguided"), max_retries=9)
    assert unguided.complete([request()], words_tokenizer)[0].token_ids == ()
    assert len(server.bodies) == 8 == guide.usage.calls + unguided.usage.failures
    assert guide.usage.prompt_tokens == guide.usage.completion_tokens == 0, "a server that refuses has read nothing"


@pytest.mark.parametrize("asked", ["-5", "abc", "0", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "", "-inf"])
def test_a_wait_that_is_none_is_ours(server, words_tokenizer, asked, monkeypatch):
    monkeypatch.setattr("textgym.guides.server._FIRST_WAIT", 0.001)
    server.plan = [(429, {"Retry-After": asked}, {})]
    make(server, max_retries=1).complete([request(limit=1)], words_tokenizer)
    assert server.times[1] - server.times[0] < 1


@pytest.mark.parametrize("asked", ["1e9", "inf", "999999", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_a_wait_of_hours_is_an_error(server, words_tokenizer, asked):
    server.plan = [(429, {"Retry-After": asked}, {})]
    with pytest.raises(RuntimeError, match=r"answered 429 .*1 tries"):
        make(server, max_retries=5).complete([request(limit=1)], words_tokenizer)


def test_concurrency_is_a_bound_whoever_asks(server, words_tokenizer):
    server.delay = 0.02
    guide = make(server, concurrency=3)
    asked = [[request(seed=100 * k + i, limit=1) for i in range(12)] for k in range(4)]
    twins = (guide, guide, copy.deepcopy(guide), copy.deepcopy(guide))
    threads = [
        threading.Thread(target=twin.complete, args=(some, words_tokenizer))
        for twin, some in zip(twins, asked, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.bodies) == guide.usage.calls == 48
    assert server.busiest == 3


def test_answers_that_came_are_kept_when_another_fails(server, words_tokenizer, tmp_path):
    server.plan = [(200, {}, completion(" red sun", prompt_tokens=1, completion_tokens=1))] * 5 + [
        (400, {}, {"error": "no"})
    ]
    guide = make(server, cache=tmp_path, concurrency=1)
    with pytest.raises(RuntimeError, match="answered 400"):
        guide.complete([request(seed=seed, limit=1) for seed in range(30)], words_tokenizer)
    assert len(server.bodies) == 6, "no call begins after a failure"
    again = make(server, cache=tmp_path)
    again.complete([request(seed=seed, limit=1) for seed in range(5)], words_tokenizer)
    assert (again.usage.calls, again.usage.cache_hits) == (0, 5)


def test_a_forked_process_and_a_forgotten_guide(server, words_tokenizer):
    guide = make(server)
    expected = guide.complete(requests(3), words_tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if guide.complete(requests(3), words_tokenizer) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert guide.complete(requests(3), words_tokenizer) == expected
    threads, filters = threading.active_count(), logging.getLogger("httpx2").filters
    for _ in range(20):
        make(server).complete([request(limit=1)], words_tokenizer)
    assert threading.active_count() <= threads + 8, "all guides share a thread; the others are the server's"
    gc.collect()
    assert len([one for one in filters if isinstance(one, Redactor)]) == 1, "of the guide that is still there"
