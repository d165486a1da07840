"""A measurement: something of ours beside a reference, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple


class Measurement(NamedTuple):
    """Something of ours beside a reference, if there is one: each does some work and returns its amount."""

    name: str
    unit: str  # "s": the time of one run; "MiB": the number that a run returns; anything else: work per second
    ours: Callable[[], float]
    reference: Callable[[], float] | None
    reference_name: str
    settings: str = ""  # precision, trunk and group size, if they matter


def measure(measurement: Measurement, rounds: int) -> dict[str, Any]:
    """Run both in turns, after one run of each that does not count, and take medians.

    Returns:
        "name", "value", "unit", "reference", "reference_value", "ratio" (above 1 if ours is faster or smaller), and
        "settings".
    """
    functions = [function for function in (measurement.ours, measurement.reference) if function is not None]
    for function in functions:
        function()
    figures: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, values in zip(functions, figures, strict=True):
            started = time.perf_counter()
            work = function()
            seconds = time.perf_counter() - started
            values.append({"s": seconds, "MiB": work}.get(measurement.unit, work / seconds))
    value, reference = median(figures[0]), None if measurement.reference is None else median(figures[1])
    ratio = None if reference is None else value / reference
    if ratio is not None and measurement.unit in ("s", "MiB"):
        ratio = 1 / ratio
    return {
        "name": measurement.name,
        "value": value,
        "unit": measurement.unit,
        "reference": measurement.reference_name,
        "reference_value": reference,
        "ratio": ratio,
        "settings": measurement.settings,
    }
