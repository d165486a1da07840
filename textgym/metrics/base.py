"""What all metrics share: what they read, and that they leave nothing on disk."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import evaluate
from datasets import Features, List, Value

#: What a metric can read, each N long: its feature, and what it is.
INPUTS: Mapping[str, tuple[Any, str]] = {
    "prompts": (Value("string"), "N prompts."),
    "predictions": (Value("string"), "N texts that were written after the prompts."),
    "references": (
        List(Value("string")),
        "For each text its references, any number of them; a string is one. Texts without any are left out.",
    ),
    "prompt_ids": (List(Value("int64")), "N sequences of token ids without padding."),
    "prediction_ids": (List(Value("int64")), "N sequences of token ids without padding, which may be empty."),
}


class Metric(evaluate.Metric):
    """A metric of N texts.

    Attributes:
        inputs: What it reads, of `INPUTS`.
        paper: Its source.
        signature: What the numbers hang on beside the texts; those of two metrics with equal ones compare.
    """

    inputs: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]
    signature: str

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)),
            citation=self.paper,
            inputs_description="\nArgs:\n" + "".join(f"    {name}: {INPUTS[name][1]}\n" for name in self.inputs),
            features=Features({name: INPUTS[name][0] for name in self.inputs}),
        )

    def _build_data_dir(self) -> str:
        # The folder would be made, and as data is kept in memory it would stay, empty.
        return self._data_dir_root

    def add(
        self, *, prediction: str | None = None, reference: str | Sequence[str] | None = None, **columns: Any
    ) -> None:
        """Add one text."""
        columns |= {"predictions": prediction, "references": reference}
        self.add_batch(**{name: [value] for name, value in columns.items() if value is not None})

    def add_batch(
        self,
        *,
        predictions: Sequence[str] | None = None,
        references: Sequence[str | Sequence[str]] | None = None,
        **columns: Any,
    ) -> None:
        """Add N texts."""
        columns |= {"predictions": predictions, "references": references}
        missing = [name for name in self.inputs if columns.get(name) is None]
        if missing:
            raise ValueError(f"{self.name} reads {list(self.inputs)}, and was not given {missing}")
        if references is not None:
            columns["references"] = [[texts] if isinstance(texts, str) else [*texts] for texts in references]
        surplus = INPUTS.keys() - self.inputs
        super().add_batch(**{name: column for name, column in columns.items() if name not in surplus})

    def _finalize(self) -> None:
        if self.writer is None:
            raise ValueError(f"{self.inputs[0]} must be given to compute, or to add_batch before it")
        super()._finalize()

    def _compute(self, **columns: Any) -> dict[str, float]:
        # evaluate hands on whatever is not a feature.
        unknown = sorted(columns.keys() - INPUTS.keys())
        if unknown:
            raise ValueError(f"{self.name} reads {list(self.inputs)}, got {unknown}")
        columns = {name: columns[name] for name in self.inputs}
        if "references" in columns:
            rows = [row for row, texts in enumerate(columns["references"]) if texts]
            if not rows:
                raise ValueError("references must hold a text for at least one prediction, got none")
            columns = {name: [column[row] for row in rows] for name, column in columns.items()}
        if not len(columns[self.inputs[0]]):
            raise ValueError(f"{self.inputs[0]} must hold at least one text, got none")
        return {name: float(value) for name, value in self._scores(**columns).items()}

    def _scores(self, *args: Any, **columns: Any) -> Mapping[str, float]:
        """The numbers by name, of N > 0 texts, which all have references where these are read."""
        raise NotImplementedError
