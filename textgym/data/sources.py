"""The sources of a task's samples: the mini edition, the Hugging Face hub, or a folder of Parquet files.

`datasets` is imported for real data only.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgym.checks import check_one_of
from textgym.data.mini import mini_rows
from textgym.data.splits import SPLITS, Row, Split, SplitName

if TYPE_CHECKING:
    import datasets

_HUB_IDS = {"imdb": "stanfordnlp/imdb", "commongen": "allenai/common_gen", "tldr": "trl-lib/tldr"}
_HUB_COLUMNS = {
    "imdb": ["text", "label"],
    "commongen": ["concept_set_idx", "concepts", "target"],
    "tldr": ["prompt", "completion"],
}
# Columns that are not texts, and what may be missing: the hub keeps some test targets to itself.
_KINDS = {"label": "int", "concept_set_idx": "int", "concepts": "list"}
_MAY_BE_NULL = ("target", "summary", "completion")
_FOLDER_COLUMNS = _HUB_COLUMNS | {"tldr": ["subreddit", "title", "post", "summary"]}
_HUB_POST = re.compile(
    r"SUBREDDIT: r/(?P<subreddit>.*?)\n+TITLE: (?P<title>.*?)\n+POST: (?P<post>.*?)\s*TL;DR:\s*", re.DOTALL
)
# One of so many reviews of the train file belongs to the validation split: about 5%.
_IMDB_VALIDATION_EVERY = 20


def resolve_source(source: str | os.PathLike | None) -> str:
    """Return the environment's argument `source` as "mini", "hub" or the path of a folder.

    Args:
        source: One of these; None reads the environment variable TEXTGYM_SOURCE, and is "mini" where it is not set.

    Raises:
        ValueError: `source` is neither, or the folder does not exist.
    """
    argument = "the environment variable TEXTGYM_SOURCE" if source is None else "source"
    source = (os.environ.get("TEXTGYM_SOURCE") or "mini") if source is None else source
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source must be 'mini', 'hub', a folder or None, got {type(source).__name__}: {source!r}")
    if source in ("mini", "hub"):
        return str(source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{argument} must be 'mini', 'hub' or a folder that exists, got {str(source)!r}")
    return str(folder)


def load_split(task_name: str, split: SplitName, source: str | os.PathLike | None = None) -> Split:
    """Load one split of one of the three tasks.

    Rows are read-only: calls may share them. The fingerprint depends on the rows alone, so the hub and a folder with
    the same samples have the same one.

    Args:
        task_name: "imdb" (columns text, label), "commongen" (concepts, targets: one row per concept set) or "tldr"
            (subreddit, title, post, summary).
        split: "train", "validation" or "test". IMDB has no validation file: its validation split is about 5% of the
            train file, chosen by a hash of the text. Reviews of the test file are dropped from both.
        source: See `resolve_source`.

    Raises:
        ValueError: An unknown task, split or source, missing data, or missing columns.

    Warns:
        UserWarning: Rows without a reference text (the test split of ``allenai/common_gen``).
    """
    check_one_of("task_name", task_name, sorted(_READERS))
    check_one_of("split", split, SPLITS)
    source = resolve_source(source)
    files = sorted(Path(source, task_name).glob("*.parquet"))
    return _load_split(task_name, split, source, tuple(file.stat().st_mtime_ns for file in files))


# An environment, its tokenizer, its reward and an algorithm all load the same split.
@functools.cache
def _load_split(task_name: str, split: SplitName, source: str, modified: tuple[int, ...]) -> Split:
    return Split.of(mini_rows(task_name, split) if source == "mini" else _READERS[task_name](split, source))


def _read(task_name: str, file: SplitName, source: str) -> datasets.Dataset:
    """Load the columns that we use from a file of the hub or of a folder."""
    import datasets

    if source == "hub":
        place = f"the hub's {_HUB_IDS[task_name]} ({file})"
        columns = _HUB_COLUMNS[task_name]
        arguments: dict[str, Any] = {"path": _HUB_IDS[task_name], "split": file}
    else:
        path = Path(source) / task_name / f"{file}.parquet"
        columns = _FOLDER_COLUMNS[task_name]
        if not path.is_file():
            raise ValueError(
                f"source={source!r} has no {file} data for {task_name}: expected {path} with columns {columns}"
            )
        place = str(path)
        arguments = {"path": "parquet", "data_files": glob.escape(place), "split": "train"}
    try:
        dataset = datasets.load_dataset(**arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = "; without network, give source= a folder with Parquet files" if source == "hub" else ""
        raise ValueError(f"source={source!r}: cannot load {place}: {error}{hint}") from error
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"source={source!r}: {place} must have columns {columns}, {missing} are missing among "
            f"{dataset.column_names}"
        )
    dataset = dataset.select_columns(columns)
    _check_columns(dataset, f"source={source!r}: {place}")
    return dataset


def _check_columns(dataset: datasets.Dataset, place: str) -> None:
    """Refuse columns of another kind, nulls, bytes that are no text, and labels that are no classes.

    Raises:
        ValueError: The message names the column.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = {"text": pa.types.is_string, "int": pa.types.is_integer, "list": pa.types.is_list}
    for column in dataset.column_names:
        values, kind = dataset.data.column(column), _KINDS.get(column, "text")
        type_ = values.type
        wanted = kinds[kind](type_) or (kind == "text" and pa.types.is_large_string(type_))
        inside = type_.value_type if pa.types.is_list(type_) else type_
        if not wanted or (kind == "list" and not pa.types.is_string(inside)):
            what = {"text": "text", "int": "integers", "list": "lists of text"}[kind]
            raise ValueError(f"{place} must have {what} in column {column!r}, got {type_}")
        try:
            for chunk in values.chunks:
                chunk.validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{place} must have text in UTF-8 in column {column!r}: {error}") from error
        nulls = values.null_count + (sum(list_.values.null_count for list_ in values.chunks) if kind == "list" else 0)
        if nulls and column not in _MAY_BE_NULL:
            raise ValueError(f"{place} must have no nulls in column {column!r}, got {nulls}")
        if kind == "list" and len(values) and pc.min(pc.list_value_length(values)).as_py() < 1:
            raise ValueError(f"{place} must have no empty lists in column {column!r}")
        if column == "label" and len(values):
            classes = sorted(pc.unique(values).to_pylist())
            if not {*classes} <= {0, 1}:
                raise ValueError(f"{place} must have labels 0 and 1 in column {column!r}, got {classes[:10]}")


def _read_imdb(split: SplitName, source: str) -> list[Row]:
    test = _reviews("test", source)
    if split == "test":
        return test
    seen, wanted = {row["text"] for row in test}, split == "validation"
    train = _reviews("train", source)
    return [row for row in train if _is_validation(row["text"]) == wanted and row["text"] not in seen]


def _reviews(file: SplitName, source: str) -> list[Row]:
    """Return the reviews of a file as single paragraphs, without line-break tags."""
    reviews = _read("imdb", file, source)
    return [
        {"text": " ".join(text.replace("<br />", " ").split()), "label": label}
        for text, label in zip(reviews["text"][:], reviews["label"][:], strict=True)
    ]


def _is_validation(review: str) -> bool:
    return int.from_bytes(hashlib.sha1(review.encode()).digest()[:8]) % _IMDB_VALIDATION_EVERY == 0


def _read_commongen(split: SplitName, source: str) -> list[Row]:
    """Return one row per concept set, in the order of the file."""
    sentences = _read("commongen", split, source)
    sets: dict[int, dict[str, list[str]]] = {}
    for index, concepts, target in zip(*(sentences[column][:] for column in sentences.column_names), strict=True):
        row = sets.setdefault(index, {"concepts": concepts, "targets": []})
        if target:
            row["targets"].append(target)
    without = sum(not row["targets"] for row in sets.values())
    if without:
        warnings.warn(
            f"{without} of {len(sets)} concept sets of commongen's {split} split from source={source!r} have no target "
            "sentence (the hub keeps the test targets to itself): rewards, metrics and guides that need references "
            "cannot use them. Take split='validation', or a folder with targets.",
            UserWarning,
            stacklevel=4,
        )
    return list(sets.values())


def _read_tldr(split: SplitName, source: str) -> datasets.Dataset:
    posts = _read("tldr", split, source)
    return posts.with_transform(_parse_posts) if source == "hub" else posts


def post_prompt(row: Row) -> tuple[str, str, str]:
    """Return TL;DR's prompt, as (before, post, after), in the layout of Stiennon et al. 2020 (arXiv 2009.01325)."""
    return f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: ", row["post"], "\n\nTL;DR:"


def _parse_posts(batch: dict[str, list]) -> dict[str, list]:
    """Split the hub's prompts, which have the layout of `post_prompt`, into columns."""
    matches = [_HUB_POST.fullmatch(prompt) for prompt in batch["prompt"]]
    for prompt, match in zip(batch["prompt"], matches, strict=True):
        if match is None:
            raise ValueError(
                f"source='hub': a prompt of {_HUB_IDS['tldr']} must read 'SUBREDDIT: r/... TITLE: ... POST: ... "
                f"TL;DR:', got {prompt!r}"
            )
    columns = {name: [match[name] for match in matches if match] for name in ("subreddit", "title", "post")}
    return columns | {"summary": [text and text.strip() for text in batch["completion"]]}


_READERS = {"imdb": _read_imdb, "commongen": _read_commongen, "tldr": _read_tldr}
