"""Completions of a server on disk, so that the same request is never paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textgym.guides.answers import Answer

_TABLE = "CREATE TABLE IF NOT EXISTS completions (request BLOB PRIMARY KEY, answer BLOB NOT NULL, digest BLOB NOT NULL)"
_GET = "SELECT answer, digest FROM completions WHERE request = ?"
_PUT = "INSERT OR REPLACE INTO completions VALUES (?, ?, ?)"


class CompletionCache:
    """Answers by request, in an SQLite database in a folder that is made with the first answer.

    Several processes of a machine can share the folder. Of a request there is its SHA-256 digest, and another of the
    request and its answer: an answer that is damaged, or that belongs to another request, counts as missing, with a
    warning. JSON files, in which earlier versions kept each answer, are still read. No pickles are stored, so opening
    the folder of somebody else runs no code.

    A cache is no reason to stop: where it cannot be read or written, it says so once and goes on without.

    Raises:
        ValueError: `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cache must be a folder, got the file {str(folder)!r}")
        self._begin()

    def _begin(self) -> None:
        # By process. The connection of a parent is not closed in its fork.
        self._connections: dict[int, sqlite3.Connection] = {}
        self._lock = threading.Lock()
        self._readable = self._writable = True

    @property
    def file(self) -> Path:
        """The database."""
        return self.folder / "completions.sqlite"

    def get(self, request: Mapping[str, Any]) -> Answer | None:
        """Return the answer to a request (JSON values); None where there is none."""
        if not self._readable:
            return None
        key = _digest(request)
        try:
            if (row := self._row(key)) is None:
                return self._of_earlier_version(request, key)
        except (OSError, sqlite3.Error) as error:
            self._readable = self._writable = False
            self._warn(f"cannot be read ({error}), so all completions are asked for; if it is damaged, delete it")
            return None
        answer, digest = row
        try:
            if digest != _sealed(key, answer):
                raise ValueError("not the answer to this request")
            return Answer(**json.loads(answer))
        except (RecursionError, TypeError, ValueError):
            self._warn(f"has a damaged answer, to request {key.hex()}: it is asked for again, and replaced")
            return None

    def put(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Keep the answer to a request (JSON values)."""
        if not self._writable:
            return
        fields = {name: value for name, value in asdict(answer).items() if value is not None}
        key, written = _digest(request), json.dumps({"finish_reason": None, **fields}, ensure_ascii=False).encode()
        try:
            with self._lock:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._connected().execute(_PUT, (key, written, _sealed(key, written)))
        except (OSError, sqlite3.Error) as error:
            self._writable = False
            self._warn(f"cannot be written ({error}), so no more completions are kept")

    def _connected(self) -> sqlite3.Connection:
        if os.getpid() not in self._connections:
            self._connections[os.getpid()] = _open(self.file)
        return self._connections[os.getpid()]

    def _row(self, key: bytes) -> tuple[Any, Any] | None:
        if os.getpid() not in self._connections and not self.file.exists():
            return None
        with self._lock:
            return self._connected().execute(_GET, (key,)).fetchone()

    def _of_earlier_version(self, request: Mapping[str, Any], key: bytes) -> Answer | None:
        file = self.folder / key.hex()[:2] / f"{key.hex()}.json"
        try:
            kept = json.loads(file.read_bytes())
            if kept["request"] != request:
                raise ValueError("not the answer to this request")
            return Answer(**kept["answer"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (LookupError, RecursionError, TypeError, ValueError):
            self._warn(
                "is damaged, or not the answer to its request: it is asked for again, and not read any more", file
            )
            return None

    def _warn(self, what: str, file: Path | None = None) -> None:
        warnings.warn(f"cache: {file or self.file} {what}", stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _open(file: Path) -> sqlite3.Connection:
    how: dict[str, Any] = {"isolation_level": None, "check_same_thread": False, "timeout": 30.0}
    try:
        connection = sqlite3.connect(file, **how)
        # Readers and a writer do not wait for each other; what is written survives the end of the process.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(_TABLE)
    except sqlite3.OperationalError:  # the folder cannot be written to
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True, **how)
        connection.execute(_GET, (b"",))
    return connection


def _digest(request: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).digest()


def _sealed(key: bytes, answer: bytes) -> bytes:
    """Return the digest of an answer to the request of digest `key`."""
    return hashlib.sha256(key + answer).digest()[:16]
