"""Pictures, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from textgym.packages import require
from textgym.storage import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    require("plots", "drawing", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
