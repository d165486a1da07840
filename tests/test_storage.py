"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from textgym.storage import new_file, new_folder


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


def test_a_folder_takes_the_place_of_another_or_leaves_it(tmp_path):
    path = tmp_path / "folder"
    for keep, text in ((False, "1"), (False, "2"), (True, "3")):
        with new_folder(path, keep_existing=keep) as folder:
            (folder / "file").write_text(text)
    assert (path / "file").read_text() == "2"
    with pytest.raises(KeyError), new_folder(path) as folder:
        raise KeyError
    assert (path / "file").read_text() == "2"
    assert list(tmp_path.iterdir()) == [path]
