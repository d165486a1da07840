"""Small models that are trained once and cached: weights in safetensors and a report in JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from textgym.storage import cache_dir, made_once


class Trained(NamedTuple):
    """A trained small model: its arrays, its evaluation, and a fingerprint of its recipe."""

    arrays: dict[str, np.ndarray]
    report: dict[str, Any]
    fingerprint: str


def load_or_train(
    name: str, recipe: Mapping[str, Any], train: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]
) -> Trained:
    """Load the model of a recipe from the cache folder, or train it and keep it there.

    Args:
        name: First part of the folder's name.
        recipe: Everything the weights depend on (fingerprints of the data included), as JSON values.
        train: Returns the arrays to keep and a JSON report of the evaluation on held-out data.

    Returns:
        The model. Its fingerprint is 16 hex digits of the hash of the recipe.
    """
    recipe = {**recipe, "threads": 1}  # sums depend on the number of threads, in the last digits
    fingerprint = _fingerprint(recipe)

    def make() -> Trained:
        import sklearn.linear_model  # noqa: F401  (limits apply only to libraries that are loaded)
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):
            arrays, report = train()
        return Trained(arrays, {"recipe": recipe, **report}, fingerprint)

    def keep(trained: Trained, folder: Path) -> None:
        save_file(trained.arrays, folder / "weights.safetensors")
        (folder / "report.json").write_text(json.dumps(trained.report, indent=2), encoding="utf-8")

    def load(folder: Path) -> Trained:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if _fingerprint(report["recipe"]) != fingerprint:
            raise ValueError("it was made by another recipe")
        return Trained(load_file(folder / "weights.safetensors"), report, fingerprint)

    return made_once(cache_dir() / "rewards" / f"{name}-{fingerprint}", make, keep, load)


def _fingerprint(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
