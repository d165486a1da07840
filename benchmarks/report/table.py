"""A table of text and intervals, and its Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report.intervals import Interval
from textgym.rendering import inert

Cell = str | Interval


@dataclass(frozen=True)
class Table:
    """A table whose first columns hold names and whose other columns hold numbers."""

    title: str
    note: str  # what its numbers are
    columns: Sequence[str]  # if the first one is "task", the page groups the rows by task
    rows: Sequence[Sequence[Cell]]
    names: int = 2  # number of columns that hold names
    formats: Mapping[str, str] = field(default_factory=dict)  # of a column's intervals; ".3f" where none is given
    # Columns whose intervals the page also draws, each with a value to mark by a line, or None.
    bars: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, title: str, note: str, rows: Sequence[Mapping[str, Cell]], **options: Any) -> Table:
        """A table of rows that map columns, the same in each, to cells; a column of nothing but "-" is left out."""
        columns = [column for column in (rows[0] if rows else ()) if any(row[column] != "-" for row in rows)]
        return cls(title, note, columns, [[row[column] for column in columns] for row in rows], **options)

    def texts(self, row: Sequence[Cell]) -> list[str]:
        """A row's cells as text."""
        return [
            format(cell, self.formats.get(column, ".3f")) if isinstance(cell, Interval) else cell
            for column, cell in zip(self.columns, row, strict=True)
        ]

    def markdown(self) -> str:
        """Markdown with aligned columns; only title and note if there are no rows."""
        note = inert(self.note).replace("\\`", "`")  # our own words have code in them
        heading = f"**{self.title}.** {note}"
        if not self.rows:
            return heading
        lines = [[inert(text) for text in line] for line in [self.columns, *map(self.texts, self.rows)]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * width if place < self.names else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
        rows = (
            " | ".join(
                cell.ljust(width) if place < self.names else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in (lines[0], rule, *lines[1:])
        )
        return "\n".join([heading, "", *(f"| {row} |" for row in rows)])
