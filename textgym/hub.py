"""The folder of a model, or its repository on the Hugging Face hub: its files, and loading what they hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import cached_file


def load_pretrained(kind: Any, path: str | os.PathLike, *, trust_remote_code: bool = False, **arguments: Any) -> Any:
    """Load a model, tokenizer or configuration of transformers; nothing is loaded in another way.

    Args:
        kind: The class, such as `transformers.AutoTokenizer`.
        path: Hub id or folder.
        trust_remote_code: Whether Python code that lies beside it may run. It is never left open, because transformers
            would then ask on the terminal, for as long as nobody answers.
        **arguments: Others of `from_pretrained` of that class. Weights are read from safetensors, which cannot hold
            code, or from a GGUF file.

    Raises:
        OSError: There is nothing at `path`, or no weights in safetensors.
        ValueError: What is there cannot be read, or only by its own code.
    """
    if hasattr(kind, "_model_mapping") and "gguf_file" not in arguments:  # the automatic classes of models
        arguments["use_safetensors"] = True
    return kind.from_pretrained(os.fspath(path), trust_remote_code=trust_remote_code, **arguments)


def base_of(path: str | os.PathLike) -> str | os.PathLike:
    """The folder or hub id with a model's configuration: of adapters alone, that of the model they name."""
    adapters = file_beside(path, "adapter_config.json")
    if adapters is None or file_beside(path, "config.json") is not None:
        return path
    return json.loads(Path(adapters).read_text(encoding="utf-8"))["base_model_name_or_path"]


def local_folder(path: str | os.PathLike) -> Path:
    """The folder `path`, or that of the hub's repository of this name, downloaded; `path` if there is neither."""
    folder = Path(path).expanduser()
    if folder.exists() or not isinstance(path, str) or path.count("/") != 1:
        return folder
    try:
        return Path(snapshot_download(path))
    except (OSError, ValueError):  # of the hub, which is not there or has no such repository, and of no name for one
        return folder


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
