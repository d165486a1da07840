"""Pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np

from textgym.packages import require

require("plots", "drawing", "matplotlib")

from matplotlib.figure import Figure  # noqa: E402

# Panels: their title, and the numbers of a record that they draw.
PANELS = {
    "reward": ("reward", "reward_without_prefix", "eval/reward"),
    "loss": ("loss", "validation_loss"),
    "KL to the start, nats a text": ("kl",),
    "tokens of a text": ("length", "eval/length"),
    "the guide's share of the tokens": ("guide_share",),
}


class Picture(Figure):
    """A figure that a notebook shows where it is the value of a cell, without ``%matplotlib inline``."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def plot_history(history: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw what a history has, by episodes.

    Args:
        history: Records of iterations (see `agents.algorithm.Algorithm.history`).
        title: Stands above the picture.

    Raises:
        ValueError: The history is empty.
    """
    if not history:
        raise ValueError("history is empty: nothing has been learned yet")
    records = [{**record, "guide_share": _guide_share(record)} for record in history]
    panels = {
        name: [key for key in keys if any(key in record for record in records)]
        for name, keys in PANELS.items()
        if name != "loss" or not any("reward" in record for record in records)
    }
    panels = {name: keys for name, keys in panels.items() if keys}
    figure = Picture(figsize=(3.4 * len(panels), 3), layout="constrained")
    figure.suptitle(title)
    for axes, (name, keys) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for key in keys:
            points = [(record["num_episodes"], record[key]) for record in records if key in record]
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if len(points) < 30 else "", markersize=3)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("episodes")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize="small")
    return figure


def _guide_share(record: Mapping[str, Any]) -> float:
    guide = record.get("guide_tokens", 0)
    return guide / max(guide + record.get("policy_tokens", 0), 1)
