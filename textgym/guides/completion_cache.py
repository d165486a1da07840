"""Completions of a server on disk, so that the same request is never paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textgym.storage import new_file


class CompletionCache:
    """Answers by request, in one JSON file each, in a folder that is made with the first answer.

    Several processes can share the folder: a file appears whole or not at all, and one that cannot be read counts as
    missing. No pickles are stored, so opening the folder of somebody else runs no code.

    Raises:
        ValueError: `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cache must be a folder, got the file {str(folder)!r}")

    def get(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the answer to a request (JSON values); None where there is none."""
        try:
            return json.loads(self._file(request).read_text(encoding="utf-8"))["answer"]
        except (FileNotFoundError, LookupError, TypeError, ValueError):
            return None

    def put(self, request: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Keep the answer to a request (JSON values)."""
        with new_file(self._file(request)) as file:
            file.write_text(json.dumps({"request": request, "answer": answer}), encoding="utf-8")

    def _file(self, request: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"
