"""Files that lie beside a model, in a folder or on the Hugging Face hub."""

from __future__ import annotations

import os

from transformers.utils import cached_file


def file_beside(path: str | os.PathLike, name: str) -> str | None:
    """Where a file that may lie beside a model is, if it is there.

    Args:
        path: Hub id or folder of the model.
        name: The file's name.
    """
    try:
        return cached_file(
            path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # what is wrong with the path is said when the model is loaded
        return None
