"""Where textgym keeps what it makes, and files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The folder for whatever textgym trains and keeps: $TEXTGYM_CACHE, else ~/.cache/textgym."""
    return Path(os.environ.get("TEXTGYM_CACHE") or Path.home() / ".cache" / "textgym").expanduser()


def _temporary(path: str | os.PathLike) -> tuple[Path, Path]:
    """The path, whose parent folders are made, and a new name beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, path.with_name(f".{path.name}-{secrets.token_hex(8)}")


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file under a temporary name beside `path`; it takes the place of `path` when the block ends.

    If the block fails, `path` is what it was. Folders on the way are made.
    """
    path, temporary = _temporary(path)
    temporary.touch(exist_ok=False)  # with the permissions of any new file, unlike those of mkstemp
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike, *, keep_existing: bool = False) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; it takes the place of `path` when the block ends.

    If the block fails, `path` is what it was. Folders on the way are made.

    Args:
        path: The folder to make or replace.
        keep_existing: Leave a folder that is there by the end of the block, as where several processes make the same.
    """
    path, temporary = _temporary(path)
    temporary.mkdir()  # with the permissions of any new folder, unlike those of mkdtemp
    old = temporary.with_name(temporary.name + "-old")
    try:
        yield temporary
        if path.is_dir() and keep_existing:
            return
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if not path.exists() and old.exists():
                old.rename(path)
            if not (keep_existing and path.is_dir()):  # another process has just made it
                raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
