"""What was paid for is kept, found again, and never a reason to stop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
from fake_server import request, serving

from textgym.guides.answers import Answer
from textgym.guides.completion_cache import CompletionCache
from textgym.guides.http import HTTPGuide

pytest.importorskip("httpx2")
ANSWER = Answer(" red sun", "stop", 3, 2)


def asked(number=0):
    return {"model": "words", "prompt": f"red sun {number}", "seed": number, "stop": ["\n"], "temperature": 1.0}


def entry(answer, of=None):
    """An entry as it is kept: the digest of a request, an answer, and the digest of both."""
    key = hashlib.sha256(json.dumps(of or asked(), sort_keys=True).encode()).digest()
    return key, answer, hashlib.sha256(key + answer).digest()[:16]


def change(cache, sql, *values):
    with contextlib.closing(sqlite3.connect(cache.file)) as connection, connection:
        connection.execute(sql, values)


def old_entry(folder, text, of=None):
    """A file of an earlier version."""
    name = hashlib.sha256(json.dumps(of or asked(), sort_keys=True).encode()).hexdigest()
    file = folder / name[:2] / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return file


def test_what_is_kept_is_found_by_others(tmp_path):
    cache = CompletionCache(tmp_path / "deep" / "folder")
    assert cache.get(asked()) is None
    assert not (tmp_path / "deep").exists(), "a folder is made with the first answer"
    answers = [
        ANSWER,
        Answer("é\u4e2d\U0001f600\0\x1b\ufffd", None, 0, 0),
        Answer("", "length", 10**9, 1),
        Answer("x" * 100_000, "content_filter", 1, 1),
        Answer(" a", "stop", 3, 1, [-0.5, -1e-30, -7.125]),
    ]
    old = os.umask(0o027)
    try:
        for number, answer in enumerate(answers):
            cache.put(asked(number), answer)
    finally:
        os.umask(old)
    assert cache.file.stat().st_mode & 0o777 == 0o640
    for other in (cache, CompletionCache(tmp_path / "deep" / "folder"), pickle.loads(pickle.dumps(cache))):
        assert [other.get(asked(number)) for number in range(len(answers))] == answers
        assert other.get(asked(9)) is None
    cache.put(asked(), answers[1])
    assert cache.get(asked()) == answers[1]


FIELDS = asdict(ANSWER)
WRONG_FIELDS = {
    "text a number": {**FIELDS, "text": 5},
    "text null": {**FIELDS, "text": None},
    "text a list": {**FIELDS, "text": ["x"]},
    "half a surrogate pair": {**FIELDS, "text": "a\ud800"},
    "reason a list": {**FIELDS, "finish_reason": ["stop"]},
    "negative count": {**FIELDS, "prompt_tokens": -1},
    "count a string": {**FIELDS, "prompt_tokens": "3"},
    "count a fraction": {**FIELDS, "completion_tokens": 0.5},
    "count true": {**FIELDS, "completion_tokens": True},
    "infinite log-probability": {**FIELDS, "log_probs": [float("inf")]},
    "log-probabilities a string": {**FIELDS, "log_probs": "ab"},
    "log-probability null": {**FIELDS, "log_probs": [None]},
    "another field": {**FIELDS, "more": 1},
    "no field": {},
}  # fmt: skip
GARBAGE = {
    "nothing": b"",
    "cut": json.dumps(FIELDS).encode()[:20],
    "binary": b"\0\0\0",
    "list": b"[]",
    "null": b"null",
    "no UTF-8": b'{"text": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    **{name: json.dumps(fields).encode() for name, fields in WRONG_FIELDS.items()},
}


@pytest.mark.parametrize("kind", [*GARBAGE, "another request's", "changed", "number", "null digest"])
def test_a_damaged_entry_is_missing_and_replaced(tmp_path, kind):
    cache = CompletionCache(tmp_path)
    cache.put(asked(), ANSWER)
    put = "INSERT OR REPLACE INTO completions VALUES (?, ?, ?)"
    if kind in GARBAGE:
        change(cache, put, *entry(GARBAGE[kind]))
    elif kind == "another request's":
        cache.put(asked(1), Answer(" tree", "stop", 3, 1))
        row = cache._connected().execute("SELECT answer, digest FROM completions").fetchall()[1]
        change(cache, put, entry(b"")[0], *row)
    elif kind == "changed":
        change(cache, "UPDATE completions SET answer = replace(answer, 'sun', 'sea')")
    elif kind == "number":
        change(cache, "UPDATE completions SET answer = 5")
    else:
        change(cache, "UPDATE completions SET digest = 0")
    with pytest.warns(UserWarning, match=rf"{cache.file} has a damaged answer.*asked for again, and replaced"):
        assert cache.get(asked()) is None
    cache.put(asked(), ANSWER)
    assert cache.get(asked()) == ANSWER


@pytest.mark.parametrize("kind", [*GARBAGE, "another request's", "whole"])
def test_files_of_earlier_versions_are_read(tmp_path, kind):
    cache = CompletionCache(tmp_path)
    if kind == "whole":
        file = old_entry(tmp_path, json.dumps({"request": asked(), "answer": FIELDS}))
        assert cache.get(asked()) == ANSWER
        assert not cache.file.exists()
        return
    if kind in WRONG_FIELDS:
        file = old_entry(tmp_path, json.dumps({"request": asked(), "answer": WRONG_FIELDS[kind]}))
    elif kind in GARBAGE:
        file = old_entry(tmp_path, GARBAGE[kind])
    else:
        file = old_entry(tmp_path, json.dumps({"request": asked(1), "answer": FIELDS}))
    with pytest.warns(UserWarning, match=rf"{file} is damaged, or not the answer to its request"):
        assert cache.get(asked()) is None
    cache.put(asked(), ANSWER)
    assert cache.get(asked()) == ANSWER, "and the file is not read any more"


def test_a_poisoned_cache_of_an_earlier_version_fails_no_run(monkeypatch, tmp_path, words_tokenizer):
    with serving(monkeypatch) as server:
        guide = HTTPGuide("words", base_url=server.url, cache=tmp_path)
        body = guide._request(guide._body(request(limit=1), "", 1))
        old_entry(tmp_path, json.dumps({"request": body, "answer": {**FIELDS, "text": "\ud800"}}), body)
        with pytest.warns(UserWarning, match="is damaged"):
            written = guide.complete([request(limit=1)], words_tokenizer)
        again = HTTPGuide("words", base_url=server.url, cache=tmp_path)
        assert again.complete([request(limit=1)], words_tokenizer) == written
        assert (guide.usage.calls, again.usage.calls, again.usage.cache_hits) == (1, 0, 1)


def broken(kind, folder):
    """Make a cache's folder unusable; what makes it usable again."""
    file = folder / "completions.sqlite"
    if kind == "a file in its place":
        folder.parent.write_text("")
    elif kind == "no database":
        folder.mkdir(parents=True)
        file.write_text("something else" * 1000)
    elif kind == "another table":
        folder.mkdir(parents=True)
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE completions (x)")
    elif kind == "cut":
        cache = CompletionCache(folder)
        for number in range(200):
            cache.put(asked(number), ANSWER)
        cache._connected().close()
        file.write_bytes(file.read_bytes()[:9000])
    elif kind == "a folder":
        file.mkdir(parents=True)
    elif kind == "a link to nowhere":
        folder.parent.mkdir()
        folder.symlink_to("/nonexistent/place")
    elif kind == "a loop":
        folder.parent.mkdir()
        folder.symlink_to(folder)


@pytest.mark.parametrize(
    "kind", ["a file in its place", "no database", "another table", "cut", "a folder", "a link to nowhere", "a loop"]
)
def test_a_cache_that_fails_warns_once_and_the_guide_goes_on(monkeypatch, tmp_path, words_tokenizer, kind):
    folder = tmp_path / "a" / "cache"
    broken(kind, folder)
    with serving(monkeypatch) as server, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        guide = HTTPGuide("words", base_url=server.url, cache=folder)
        for seed in range(4):
            assert guide.complete([request(seed=seed, limit=1)], words_tokenizer)[0].token_ids
        assert guide.usage.calls == 4
    said = [str(one.message) for one in warned if "cache:" in str(one.message)]
    assert len(said) == 1
    assert str(folder / "completions.sqlite") in said[0]


@pytest.fixture
def as_nobody():
    """A user whom permissions bind."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_a_folder_that_is_read_only_is_still_read(tmp_path, as_nobody):
    if os.getuid() == 0:
        os.seteuid(0)
        temporary = Path(tempfile.gettempdir()).resolve()
        for folder in (tmp_path, *(parent for parent in tmp_path.parents if temporary in parent.parents)):
            folder.chmod(0o755)
    cache = CompletionCache(tmp_path)
    cache.put(asked(), ANSWER)
    cache._connected().close()
    cache.file.chmod(0o444)
    tmp_path.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    cache = CompletionCache(tmp_path)
    assert cache.get(asked()) == ANSWER
    assert cache.get(asked(1)) is None
    with pytest.warns(UserWarning, match=r"cannot be written .*no more completions are kept"):
        cache.put(asked(1), ANSWER)
    cache.put(asked(1), ANSWER)
    assert (cache.get(asked()), cache.get(asked(1))) == (ANSWER, None)


def test_a_full_disk_loses_no_answer(monkeypatch, tmp_path, words_tokenizer):
    """A limit on the size of files fails like a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with serving(monkeypatch) as server, warnings.catch_warnings(record=True) as warned:
        server.answer = lambda text, body: (" red sun" + "x" * 3000, "stop")
        warnings.simplefilter("always")
        guide = HTTPGuide("words", base_url=server.url, cache=tmp_path, concurrency=4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            written = guide.complete([request(seed=seed, limit=2) for seed in range(60)], words_tokenizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert {words_tokenizer.decode(one.token_ids) for one in written} == {" red sun"}
        assert guide.usage.calls == 60
        said = [str(one.message) for one in warned if "cache:" in str(one.message)]
        assert len(said) == 1
        assert "cannot be written" in said[0]
        again = HTTPGuide("words", base_url=server.url, cache=tmp_path)
        assert again.complete([request(seed=seed, limit=2) for seed in range(60)], words_tokenizer) == written
        assert 0 < again.usage.cache_hits < 60


def test_a_kill_loses_nothing_that_was_kept(tmp_path):
    code = """if True:
        import sys
        from textgym.guides.answers import Answer
        from textgym.guides.completion_cache import CompletionCache
        cache = CompletionCache(sys.argv[1])
        for number in range(10**6):
            cache.put({"n": number}, Answer("x" * 500, "stop", 1, 1))
            print(number, flush=True)
    """
    for kill in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=-1, text=True)
        for _ in range(40 + 100 * kill):
            last = int(process.stdout.readline())
        process.kill()
        process.communicate()
        cache = CompletionCache(tmp_path)
        assert all(cache.get({"n": number}) for number in range(last + 1))


def test_threads_and_processes_share_a_folder(tmp_path):
    caches = [CompletionCache(tmp_path) for _ in range(4)]

    def work(cache):
        for number in range(100):
            assert cache.get(asked(number)) in (None, ANSWER)
            cache.put(asked(number), ANSWER)

    threads = [threading.Thread(target=work, args=(caches[k % 4],)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(cache._readable and cache._writable for cache in caches)
    child = os.fork()
    if child == 0:
        caches[0].put(asked(200), ANSWER)
        os._exit(0 if caches[0].get(asked(99)) == ANSWER else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert caches[0].get(asked(200)) == ANSWER


def test_size_and_speed(tmp_path):
    """Some of the 100,000 completions that must fit in 60 MB, and be found in about 0.1 ms each."""
    cache, count = CompletionCache(tmp_path), 5000
    text = " The film begins as a slow story about two brothers, and then it surprises everybody who watches it." * 2
    for number in range(count):
        cache.put(asked(number), Answer(text, "stop", 64, 48))
    started = time.perf_counter()
    for number in range(count):
        assert cache.get(asked(number))
    seconds = (time.perf_counter() - started) / count
    cache._connected().close()
    size = sum(file.stat().st_blocks * 512 for file in tmp_path.rglob("*") if file.is_file())
    assert size / count < 500
    assert seconds < 1e-3, "ten times what it takes, as other tests run beside this one"
