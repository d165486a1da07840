"""The base class of the metrics of this package."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import evaluate
from datasets import Features, List, Value

#: The columns that a metric can read, each N long: its feature, and its description.
INPUTS: Mapping[str, tuple[Any, str]] = {
    "prompts": (Value("string"), "N prompts."),
    "predictions": (Value("string"), "N texts written after the prompts."),
    "references": (
        List(Value("string")),
        "For each text its references, any number of them; a string is one. Texts without references are left out.",
    ),
    "prompt_ids": (List(Value("int64")), "N sequences of token ids without padding."),
    "prediction_ids": (List(Value("int64")), "N sequences of token ids without padding, which may be empty."),
}


class TextMetric(evaluate.Metric):
    """A metric of N texts that needs no network and leaves no files.

    Attributes:
        inputs: The columns that it reads, of `INPUTS`; it ignores the others.
        needs: Arguments of the class that an evaluation gives, and from what (see `textgym.metrics.register`).
        paper: Its source.
        signature: What its numbers depend on apart from the texts; numbers of equal signatures are comparable.
    """

    inputs: ClassVar[tuple[str, ...]]
    needs: ClassVar[Mapping[str, str]] = {}
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
        # evaluate would make this folder and, since data is kept in memory, leave it empty.
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
        # evaluate passes on every column that is not a feature.
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
        """Return numbers by name for N > 0 texts, each with references where `inputs` has them."""
        raise NotImplementedError
