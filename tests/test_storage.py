"""Files and folders appear whole or not at all, whenever a process dies, and what several need is made once."""

from __future__ import annotations

import os
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from killing import dies_at, forked

from textgym import storage
from textgym.storage import made_once, new_file, new_folder, readable, restore


def tree(folder: Path) -> dict[str, str]:
    """The files below a folder and what they hold."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_appears_when_the_block_ends_and_not_if_it_fails(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with new_file(path) as file:
        file.write_text("old")
        assert not path.exists()

    def fail():
        with new_file(path) as file:
            file.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_threads_write_with_the_permissions_of_the_process(tmp_path):
    def write(number: int) -> None:
        with new_file(tmp_path / str(number % 3)) as file:
            file.write_text(str(number))

    old = os.umask(0o027)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(200)))
        assert os.umask(0o027) == 0o027, "the umask of the process is left alone"
    finally:
        os.umask(old)
    files = list(tmp_path.iterdir())
    assert sorted(file.name for file in files) == ["0", "1", "2"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}


def test_what_libraries_write_for_themselves_alone_has_the_permissions_of_the_process(tmp_path):
    def private(path: Path) -> None:
        path.unlink(missing_ok=True)
        os.close(os.open(path, os.O_CREAT, 0o600))

    old = os.umask(0o002)
    try:
        with new_file(tmp_path / "file") as file:
            private(file)
        with new_folder(tmp_path / "folder") as folder:
            (folder / "deep").mkdir(mode=0o700)
            private(folder / "deep" / "file")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "file", *tmp_path.rglob("folder/**")]}
    assert {name: oct(mode) for name, mode in modes.items()} == {"file": "0o664", "folder": "0o775", "deep": "0o775"}
    assert stat.S_IMODE((tmp_path / "folder" / "deep" / "file").stat().st_mode) == 0o664


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "folder"
    for text in ("1", "2"):
        with new_folder(path) as folder:
            (folder / text).write_text(text)
    with pytest.raises(KeyError), new_folder(path) as folder:
        raise KeyError
    assert tree(path) == {"2": "2"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_process_that_dies_at_any_call_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch, exchanges):
    path, seen = tmp_path / "folder", set()
    if not exchanges:  # as on a file system that cannot
        monkeypatch.setattr(storage, "_exchange", lambda first, second: False)

    def write(text: str) -> None:
        with new_folder(path) as folder:
            with new_folder(folder) as inner:  # as a policy writes itself into a checkpoint
                (inner / "a").write_text(text)
            (folder / "deep").mkdir()
            (folder / "deep" / "b").write_text(text)

    for number in count():
        write("old")
        died = dies_at(number, lambda: write("new"))
        there = path.exists()
        restore(path)
        assert list(tmp_path.iterdir()) == [path], "leftovers are cleared"
        found = tree(path)
        assert found in ({"a": "old", "deep/b": "old"}, {"a": "new", "deep/b": "new"})
        seen.add((there, found["a"]))
        if not died:
            break
    assert number > 20
    assert seen == {(True, "old"), (True, "new")} | (set() if exchanges else {(False, "old")})


def test_a_process_that_dies_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path):
    path, seen = tmp_path / "file", set()

    def write(text: str) -> None:
        with new_file(path) as file:
            file.write_text(text)

    for number in count():
        write("old")
        assert list(tmp_path.iterdir()) == [path], "leftovers are cleared"
        died = dies_at(number, lambda: write("new"))
        seen.add(path.read_text())
        if not died:
            break
    assert seen == {"old", "new"}


def test_what_a_living_process_writes_is_no_leftover(tmp_path):
    with new_folder(tmp_path / "folder") as slow:
        with forked(lambda: new_folder(tmp_path / "folder").__enter__()) as pid:  # dies with its folder
            os.waitpid(pid, 0)
        with new_folder(tmp_path / "folder") as fast:
            (fast / "by").write_text("fast")
        (slow / "by").write_text("slow")
    assert tree(tmp_path / "folder") == {"by": "slow"}


# What is made once


def keep(text: str, folder: Path) -> None:
    (folder / "text").write_text(text)


def load(folder: Path) -> str:
    text = (folder / "text").read_text()
    if text != "made":
        raise EOFError("cut")
    return text


def make_in(folder: Path, log: Path, seconds: float = 0.0) -> str:
    """What `made_once` returns; every process that makes it leaves a line."""

    def make() -> str:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return "made"

    return made_once(folder, make, keep, load)


def test_of_many_processes_one_makes_and_all_have_it(tmp_path):
    folder, log = tmp_path / "cache" / "thing", tmp_path / "log"
    pids = []
    for _ in range(6):
        with forked(lambda: make_in(folder, log, 0.05)) as pid:
            pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    assert len(log.read_text().splitlines()) == 1
    assert make_in(folder, log) == "made"
    assert len(log.read_text().splitlines()) == 1


def test_where_the_maker_dies_the_next_one_makes_it_and_clears_what_is_left(tmp_path):
    folder, log = tmp_path / "cache" / "thing", tmp_path / "log"
    with forked(lambda: make_in(folder, log, 60)) as first, forked(lambda: make_in(folder, log)) as second:
        while not log.exists():
            time.sleep(0.01)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        assert os.waitpid(second, 0)[1] == 0
    assert len(log.read_text().splitlines()) == 2
    for number in count():
        (folder / "text").write_text("damaged")
        with pytest.warns(UserWarning, match=f"{folder} is damaged and is made again: cut"):
            assert make_in(folder, log) == "made"
        assert {path.name for path in folder.parent.iterdir()} == {"thing", ".thing.lock"}
        (folder / "text").unlink()
        if not dies_at(number, lambda: made_once(folder, lambda: "made", keep, load)):
            break


@pytest.mark.parametrize("how", ["no folder", "full", "read-only"])
def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, how):
    cache, log = tmp_path / "cache", tmp_path / "log"

    def full(*_):
        raise RuntimeError("No space left on device")  # in the words of a library

    if how == "no folder":
        cache.write_text("a file")
    elif how == "read-only":
        cache.mkdir()
        real = os.open

        def refuse(path, flags, *rest, **options):
            if str(path).startswith(str(cache)) and flags & (os.O_CREAT | os.O_RDWR):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", refuse)
    made = []

    def make() -> str:
        made.append(1)
        return "made"

    with pytest.warns(UserWarning, match="thing cannot be written, so that what belongs there is kept by this process"):
        assert made_once(cache / "thing", make, full if how == "full" else keep, load) == "made"
    assert len(made) == 1, "what was made is not lost"
    other = tmp_path / "other" / "thing"
    if how != "full":
        with pytest.warns(UserWarning, match=f"is kept in {other}"):
            assert made_once(cache / "thing", make, keep, load, otherwise=other) == "made"
        assert tree(other) == {"text": "made"}
        assert make_in(other, log) == "made"
        assert not log.exists()
        (tmp_path / "another").touch()
        nowhere = tmp_path / "another" / "thing"
        with (
            pytest.warns(UserWarning, match=f"is kept in {nowhere}"),
            pytest.raises(OSError, match=f"neither {cache / 'thing'} nor {nowhere} can be written: .*File exists"),
        ):
            made_once(cache / "thing", make, keep, load, otherwise=nowhere)


def test_a_damaged_file_is_named_with_what_to_do(tmp_path):
    with (
        pytest.raises(ValueError, match=r"x/file is damaged .*\(KeyError: 'a'\); take a whole copy of its folder, or"),
        readable(Path("x/file")),
    ):
        {}["a"]
