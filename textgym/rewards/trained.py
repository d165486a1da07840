"""Small models that are trained once and kept: weights in safetensors and a report in JSON, found by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from textgym.storage import cache_dir


class Trained(NamedTuple):
    """A trained small model: its arrays, what was measured on it, and what identifies it."""

    arrays: dict[str, np.ndarray]
    report: dict[str, Any]
    fingerprint: str


def load_or_train(
    name: str, recipe: Mapping[str, Any], train: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]
) -> Trained:
    """Load the model that a recipe makes from the cache directory, or train it and keep it there.

    Args:
        name: First part of the folder's name.
        recipe: Everything the weights depend on (fingerprints of the data included), as JSON values.
        train: Returns the arrays to keep and a JSON report of what was measured on held-out data.

    Returns:
        The model; its fingerprint is 16 hex digits of the recipe's hash.
    """
    recipe = {**recipe, "threads": 1}  # of how many threads sums are made can be seen in their last digits
    fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir() / "rewards" / f"{name}-{fingerprint}"
    if not folder.is_dir():
        import sklearn.linear_model  # noqa: F401  (only libraries that are loaded already are limited)
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):
            arrays, report = train()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{name}-", ignore_cleanup_errors=True
        ) as temporary:
            save_file(arrays, os.path.join(temporary, "weights.safetensors"))
            with open(os.path.join(temporary, "report.json"), "w", encoding="utf-8") as file:
                json.dump({"recipe": recipe, **report}, file, indent=2)
            try:
                os.rename(temporary, folder)
            except OSError:
                # Another process finished the same training first; its model is as good as this one.
                if not folder.is_dir():
                    raise
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Trained(load_file(folder / "weights.safetensors"), report, fingerprint)
