"""Where textgym keeps what it makes, and files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

if sys.platform != "win32":
    import fcntl

Made = TypeVar("Made")


def cache_dir() -> Path:
    """The folder for whatever textgym trains and keeps: $TEXTGYM_CACHE, else ~/.cache/textgym."""
    return Path(os.environ.get("TEXTGYM_CACHE") or Path.home() / ".cache" / "textgym").expanduser()


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file under a temporary name beside `path`; it takes the place of `path` when the block ends.

    If the block fails or the process dies, `path` is what it was. Folders on the way are made. The file has the
    permissions of any new file.
    """
    with _temporary(path) as temporary:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            yield temporary
            temporary.chmod(mode)  # some libraries write files that nobody else can read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; it takes the place of `path` when the block ends.

    If the block fails or the process dies, `path` is what it was; where the file system can exchange two folders, there
    is no moment without one. Elsewhere `restore` finds it again. Folders on the way are made. The contents have the
    permissions of any new file or folder.
    """
    with _temporary(path) as temporary:
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            yield temporary
            for part in temporary.rglob("*"):
                part.chmod(mode if part.is_dir() else mode & 0o666)
            _put(temporary, Path(path))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def restore(path: str | os.PathLike) -> None:
    """Put a folder back that `new_folder` had moved away when its process died, and remove what else it left.

    To be called before a folder is read that may have been written so.
    """
    path = Path(path)
    if _leftovers(path):
        with contextlib.suppress(OSError), _temporary(path):  # nothing can be removed where nothing can be written
            pass
        _put_back(path)


def made_once(
    folder: Path,
    make: Callable[[], Made],
    keep: Callable[[Made, Path], None],
    load: Callable[[Path], Made],
    otherwise: Path | None = None,
) -> Made:
    """Load what a folder of the cache holds, or make it: of several processes one does, and the others wait for it.

    What cannot be loaded is made again, with a warning. So is what cannot be kept: a cache that is full or cannot be
    written stops nothing.

    Args:
        folder: The folder, whose name says everything that its contents depend on.
        make: Makes the object.
        keep: Writes the object into an empty folder.
        load: Reads it again.
        otherwise: The folder to take where `folder` cannot be written; None: the object is for this process only.

    Raises:
        OSError: Neither `folder` nor `otherwise` can be written.
    """
    try:
        return _made_in(folder, make, keep, load)
    except _NotKeptError as error:
        make, reason = error.make, error.__cause__
    place = "by this process alone" if otherwise is None else f"in {otherwise}"
    warnings.warn(
        f"{folder} cannot be written, so that what belongs there is kept {place}: {reason}; the environment "
        "variable TEXTGYM_CACHE names another cache",
        UserWarning,
        stacklevel=2,
    )
    if otherwise is None:
        return make()
    try:
        return _made_in(otherwise, make, keep, load)
    except _NotKeptError as error:
        reason = error.__cause__
        raise OSError(f"neither {folder} nor {otherwise} can be written: {reason}") from reason


class _NotKeptError(Exception):
    """A folder cannot be written, for the reason that is its cause."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make  # what was to be kept; makes nothing again that is made


def _made_in(
    folder: Path, make: Callable[[], Made], keep: Callable[[Made, Path], None], load: Callable[[Path], Made]
) -> Made:
    if folder.is_dir():  # also where nothing can be written
        with contextlib.suppress(Exception):
            return load(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock")).acquire()
    except OSError as error:
        raise _NotKeptError(make) from error
    with lock:
        if folder.is_dir():  # by now
            try:
                return load(folder)
            except Exception as error:
                warnings.warn(f"{folder} is damaged and is made again: {error}", UserWarning, stacklevel=3)
        made = make()
        try:
            with new_folder(folder) as new:
                keep(made, new)
        except Exception as error:  # libraries have their own for a full disk
            raise _NotKeptError(lambda: made) from error
        return load(folder)


@contextlib.contextmanager
def readable(file: str | os.PathLike) -> Iterator[None]:
    """Name the file and say what to do if the block, which reads it, fails.

    Raises:
        ValueError: The block raised an error.
    """
    try:
        yield
    except Exception as error:  # every library has its own for a file that is cut, or is something else
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"{file} is damaged or was written by something else ({type(error).__name__}: {reason}); take a whole copy "
            "of its folder, or delete the folder and make it again"
        ) from error


_OLD = "-old"
_AT_CWD = -100  # of Linux's fcntl.h
_EXCHANGE = 2  # Linux's RENAME_EXCHANGE and macOS' RENAME_SWAP


@contextlib.contextmanager
def _temporary(path: str | os.PathLike) -> Iterator[Path]:
    """A new name beside `path`, whose parent folders are made; what dead processes left under such names is removed.

    Who writes holds a shared lock on the parent folder: whoever can have it alone knows that all others are dead.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    if sys.platform == "win32":  # which has no locks of folders
        yield name
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # others write there, or the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _put_back(path)
            for leftover in _leftovers(path):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield name
    finally:
        os.close(descriptor)


def _put_back(path: Path) -> None:
    """Rename what `_put` had moved away, if there is nothing in its place."""
    for old in _leftovers(path):
        if not path.exists() and old.name.startswith(f".{path.name}-") and old.name.endswith(_OLD):
            old.rename(path)


def _leftovers(path: Path) -> list[Path]:
    """Temporary files and folders beside `path`, and those that were made to take the place of one of them."""
    name = re.compile(rf"\.+{re.escape(path.name)}(-[0-9a-f]{{16}})+({_OLD})?")
    if not path.parent.is_dir():
        return []
    with os.scandir(path.parent) as entries:
        return [Path(entry) for entry in entries if name.fullmatch(entry.name)]


def _put(new: Path, path: Path) -> None:
    """Put a folder in the place of another or of nothing; the other is then where it was."""
    if path.exists() and _exchange(new, path):
        return
    old = new.with_name(new.name + _OLD)
    while True:
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
            break
        except OSError:
            if not path.exists():
                raise
            # A reader has put the old one back.
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; whether it was done."""
    if sys.platform == "win32":
        return False
    libc, names = ctypes.CDLL(None), (os.fsencode(first), os.fsencode(second))
    if hasattr(libc, "renameat2"):
        return libc.renameat2(_AT_CWD, names[0], _AT_CWD, names[1], _EXCHANGE) == 0
    if hasattr(libc, "renamex_np"):
        return libc.renamex_np(*names, _EXCHANGE) == 0
    return False
