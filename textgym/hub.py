"""Files in the folder of a model or in its repository on the Hugging Face hub."""

from __future__ import annotations

import os

from transformers.utils import cached_file


def file_beside(path: str | os.PathLike, name: str) -> str | None:
    """Return the path of the file of this name in a model's folder or repository `path`; None where there is none."""
    try:
        return cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # a wrong path is an error when the model is loaded
        return None
