"""A split of a task's data: rows, and a fingerprint of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """One split of a task's data.

    Attributes:
        rows: The samples; ``rows[i]`` is a mapping from column to value.
        fingerprint: 16 hex digits that change when any sample does.
    """

    rows: Sequence[Row] | datasets.Dataset
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, rows: Sequence[Row] | datasets.Dataset) -> Split:
        """Return rows with a fingerprint of their content.

        Raises:
            ValueError: They are no sequence of mappings.
        """
        listed = isinstance(rows, Iterable) and hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
        if not listed or isinstance(rows, str | bytes | Mapping):
            raise ValueError(
                f"data must be rows, mappings from column to value, got {type(rows).__name__}: {rows!r:.200}"
            )
        digest = hashlib.sha256()
        for row in rows:
            if not isinstance(row, Mapping):
                raise ValueError(f"data must be rows, mappings from column to value, got a row {row!r:.200}")
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return cls(rows, digest.hexdigest()[:16])

    def part(self, count: int) -> Split:
        """Return so many rows, evenly spaced; all of them where there are no more."""
        if count >= len(self):
            return self
        return Split.of([self.rows[place * len(self) // count] for place in range(count)])
