"""The results file: one JSON line per finished run. Reports read nothing else."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from textgym.checks import check
from textgym.storage import new_file

Record = dict[str, Any]

RESULTS = "results.jsonl"
NUMBER = (int, float)
# What every record has, with its type; some have more.
KEYS: dict[str, type | tuple[type, ...]] = {
    "task": str,
    "algo": str,
    "seed": int,
    "place": int,
    "profile": str,
    "source": str,
    "base": (str, NoneType),
    "final_reward": NUMBER,
    "best_reward": NUMBER,
    "reward_parts": dict,
    "metrics": dict,
    "metrics_left_out": dict,
    "policy_tokens": NUMBER,
    "guide_tokens": NUMBER,
    "guide_usage": (dict, NoneType),
    "episodes": int,
    "seconds": NUMBER,
    "hyperparameters": dict,
    "fingerprints": dict,
    "versions": dict,
    "evaluation": dict,
    "history": list,
    "samples": list,
    "rollouts": list,
    "finished": str,
}


def read_results(folder: str | Path) -> list[Record]:
    """Read the finished runs of a benchmark folder, in the order they finished.

    Returns:
        One mapping per run, with the keys `KEYS`; ``algo`` is the name of the row, ``place`` its index in the profile,
        ``hyperparameters["algorithm"]`` the algorithm that it runs, ``guide_usage`` the `textgym.guides.http.Usage` of
        the run's process, None if the guide has none. All but early ones have ``about``, what the task asks for and
        what its reward pays; a policy that others start from has ``validation_reward``. Where a task tests several
        texts per prompt there is ``pass_at``, from k (a string) to pass@k, and ``evaluation`` has ``successes``: how
        many of a prompt's ``texts_per_prompt`` have a reward of at least 1. Empty if no run has finished.

    Raises:
        ValueError: A line is no record of a run, or a run has two.

    Warns:
        UserWarning: The last line is cut, as by a full disk; its run is not finished.
    """
    path = Path(folder) / RESULTS
    if not path.exists():
        return []
    records: list[Record] = []
    lines: dict[tuple[str, str, int], int] = {}
    content, cut = _lines(path)
    for number, line in enumerate(content, start=1):
        try:
            record = json.loads(line)
            missing = [key for key in KEYS if key not in record]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no record of a run ({error}): delete the line") from error
        if missing:
            raise ValueError(f"{path} line {number} is no record of a run, it lacks {missing}: delete the line")
        if wrong := [key for key, kind in KEYS.items() if not isinstance(record[key], kind)]:
            raise ValueError(
                f"{path} line {number} is no record of a run, of a wrong type are {wrong}: delete the line"
            )
        run = record["task"], record["algo"], record["seed"]
        if (first := lines.setdefault(run, number)) != number:
            raise ValueError(f"{path} lines {first} and {number} are of the same run {run}: delete one of them")
        records.append(record)
    if cut:
        warnings.warn(f"{path} line {len(content) + 1} is cut: its run is not finished", UserWarning, stacklevel=2)
    return records


def _lines(path: Path) -> tuple[list[bytes], bytes]:
    """The lines of the file, and what follows the last of them: a line that is cut."""
    *lines, rest = path.read_bytes().split(b"\n")
    try:  # somebody may have edited the file
        json.loads(rest)
    except ValueError:
        return lines, rest
    return [*lines, rest], b""


class Runs:
    """Finished runs by task and row, tasks in order of appearance and rows in the profile's order."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self.tasks = list(dict.fromkeys(record["task"] for record in self.records))
        places = {record["algo"]: record["place"] for record in self.records}
        self.algos = sorted(places, key=places.__getitem__)
        self._groups: dict[tuple[str, str], list[Record]] = {}
        for record in sorted(self.records, key=lambda record: record["seed"]):
            self._groups.setdefault((record["task"], record["algo"]), []).append(record)

    @classmethod
    def read(cls, folder: str | Path) -> Runs:
        """Read a benchmark folder.

        Raises:
            ValueError: There is no such folder, it holds no finished run, or a line of its results is no record of one.
        """
        check("folder", str(folder), Path(folder).is_dir(), "a folder with the results of a benchmark")
        runs = cls(read_results(folder))
        if not runs.records:
            raise ValueError(f"{Path(folder) / RESULTS} holds no finished run, so there is nothing to report")
        return runs

    @property
    def training_hours(self) -> float:
        """Hours of training after the warm starts; a row that trains nothing records the seconds of its warm start."""
        # Only rows that train something have arguments of their policy.
        return sum(record["seconds"] for record in self.records if "policy" in record["hyperparameters"]) / 3600

    @property
    def several_seeds(self) -> bool:
        """Whether any row has runs with several seeds on a task."""
        return any(len(group) > 1 for group in self._groups.values())

    def of(self, task: str, algo: str) -> list[Record]:
        """The runs of one row on one task, by seed."""
        return self._groups.get((task, algo), [])

    def groups(self) -> list[tuple[str, str, list[Record]]]:
        """Every (task, row, runs) that has a run."""
        pairs = itertools.product(self.tasks, self.algos)
        return [(task, algo, self.of(task, algo)) for task, algo in pairs if self.of(task, algo)]


def append_result(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Add a finished run, in the place of a line that is cut.

    Raises:
        ValueError: A number is not finite, or JSON cannot hold a value.
    """
    path = Path(folder) / RESULTS
    try:
        line = json.dumps(record, default=_plain, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the record of {record.get('task')}, {record.get('algo')} cannot be written: {error}"
        ) from error
    before = _lines(path)[0] if path.exists() else []
    with new_file(path) as temporary:
        temporary.write_bytes(b"".join(part + b"\n" for part in [*before, line.encode()]))


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """Arrays, NumPy scalars and paths as values that JSON can hold."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON: {value!r}")
