"""The data of the three tasks: the mini edition, folders of Parquet files, and the hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from textgym.data import sources
from textgym.data.mini import SIZES, mini_rows
from textgym.data.sources import load_split, resolve_source
from textgym.storage import cache_dir
from textgym.tasks import TASKS

SHARED = Path(__file__).parents[2] / "shared" / "data"
COLUMNS = {
    "imdb": {"text", "label"},
    "commongen": {"concepts", "targets"},
    "tldr": {"subreddit", "title", "post", "summary"},
}
# Words that a summary may use for its joints; all others are facts and must stand in the post.
JOINTS = {
    "wonder",
    "wrong",
    "if",
    "should",
    "but",
    "and",
    "is",
    "because",
    "stop",
    "asked",
    "into",
    "while",
    "who",
    "by",
} | {"to", "it", "problem", "paid", "when", "am", "for", "with", "her", "him", "now", "the", "that", "i"}
real = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def prompts(task_name: str, rows: list) -> list[str]:
    return ["".join(TASKS[task_name].prompt_of(row)) for row in rows]


# The mini edition


@pytest.mark.parametrize("task_name", TASKS)
def test_mini_splits_are_disjoint(task_name):
    rows = {split: mini_rows(task_name, split) for split in SIZES}
    texts = {split: prompts(task_name, rows[split]) for split in SIZES}
    for split, size in SIZES.items():
        assert len(set(texts[split])) == len(rows[split]) == size  # nor twice in one split
        assert all(set(row) == COLUMNS[task_name] for row in rows[split])
    assert len(set().union(*texts.values())) == sum(SIZES.values())


def test_mini_is_the_same_in_every_process_and_needs_no_datasets():
    code = (
        "import sys; from textgym.data.sources import load_split; from textgym.tasks import TASKS\n"
        "print([load_split(name, 'test', 'mini').fingerprint for name in TASKS], 'datasets' in sys.modules)"
    )
    here = str([load_split(name, "test", "mini").fingerprint for name in TASKS]) + " False"
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, check=True
        )
        assert run.stdout.strip() == here


@pytest.mark.parametrize("task_name", TASKS)
def test_mini_is_written_in_a_small_vocabulary_of_varied_texts(task_name):
    rows = mini_rows(task_name, "train")
    text = json.dumps(rows).replace("\\n", " ")
    assert 200 < len(words(text)) < 600
    assert not re.search(r"[{}%±∓]|  |\.\.| ,", " ".join(prompts(task_name, rows)))  # no hole in the grammar
    references = [reference for row in rows for reference in TASKS[task_name].references_of(row)]
    assert len(set(references)) > 0.85 * len(references)


def test_mini_reviews_tell_their_label_but_their_first_half_does_not():
    """A bag-of-words model reads the label from a review; from its first half it guesses much worse."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = (mini_rows("imdb", split) for split in ("train", "test"))
    accuracy = {}
    for part, text in {"whole": [r["text"] for r in train], "half": prompts("imdb", train)}.items():
        model = make_pipeline(CountVectorizer(binary=True), LogisticRegression(C=0.1))
        model.fit(text, [row["label"] for row in train])
        held_out = [r["text"] for r in test] if part == "whole" else prompts("imdb", test)
        accuracy[part] = model.score(held_out, [row["label"] for row in test])
    assert accuracy["whole"] > 0.9
    assert 0.55 < accuracy["half"] < 0.85
    assert 0.45 < sum(row["label"] for row in train) / len(train) < 0.55
    assert all(40 <= len(row["text"].split()) <= 150 for row in train)


def test_mini_targets_use_every_concept():
    stem = re.compile(r"(?:[^aeiou])?(?:e|y|f)?$")  # carry/carries, smile/smiling, leaf/leaves
    irregular = {"man": "men", "woman": "women", "child": "children"}
    for row in mini_rows("commongen", "train"):
        assert 3 <= len(row["concepts"]) == len(set(row["concepts"])) <= 5
        assert 2 <= len(row["targets"]) == len(set(row["targets"]))
        for target in row["targets"]:
            for concept in row["concepts"]:
                root = stem.sub("", concept) if len(concept) > 3 else concept
                assert any(word.startswith(root) or word == irregular.get(concept) for word in words(target)), row
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", target.lower()), target


def test_mini_summaries_state_what_the_post_says():
    for row in mini_rows("tldr", "train"):
        assert words(row["summary"]) - JOINTS <= words(row["post"]), row
        assert len(row["summary"].split()) < 0.9 * len(row["post"].split()) + 12


# Sources


def test_cache_dir_and_source_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("TEXTGYM_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "textgym"
    monkeypatch.delenv("TEXTGYM_SOURCE", raising=False)
    assert resolve_source(None) == "mini"
    monkeypatch.setenv("TEXTGYM_SOURCE", str(tmp_path))
    assert resolve_source(None) == str(tmp_path)
    assert resolve_source("hub") == "hub"
    monkeypatch.setenv("TEXTGYM_SOURCE", "nowhere")
    with pytest.raises(ValueError, match=r"TEXTGYM_SOURCE must be .* got 'nowhere'"):
        resolve_source(None)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="source must be 'mini', 'hub' or a folder that exists, got 'no/such'"):
        load_split("imdb", "train", "no/such")
    with pytest.raises(ValueError, match=r"source must be .* got int: 3"):
        resolve_source(3)
    with pytest.raises(ValueError, match=r"split must be one of \['train', 'validation', 'test'\], got 'dev'"):
        load_split("imdb", "dev", "mini")
    with pytest.raises(ValueError, match="task_name must be one of"):
        load_split("poems", "train", "mini")


REVIEWS = {
    "train": {"text": [f"Review {i}.<br /><br />It was  fine, {i}." for i in range(200)] + ["Seen twice."]},
    "test": {"text": [f"Test review {i}.<br />Bad." for i in range(20)] + ["Seen<br />twice."]},
}
SENTENCES = {
    "concept_set_idx": [0, 0, 1],
    "concepts": [["ski", "mountain"], ["ski", "mountain"], ["dog", "run"]],
    "target": ["A man skis.", "Two ski down.", "Dogs run."],
}
POSTS = {
    "subreddit": ["pets", "AskReddit"],
    "title": ["My dog", "A title\nof two lines"],
    "post": ["It ate a sock.\n\nTITLE: none. POST: no.", "What now?"],
    "summary": ["Dog ate a sock.", "What now?"],
}


def write(folder: Path, task_name: str, split: str, columns: dict) -> None:
    (folder / task_name).mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / task_name / f"{split}.parquet")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, columns in REVIEWS.items():
        ones = [1] * len(columns["text"])
        write(tmp_path, "imdb", split, columns | {"label": ones, "rating": ones})
    write(tmp_path, "commongen", "validation", SENTENCES)
    write(tmp_path, "tldr", "train", POSTS | {"id": ["x", "y"]})
    return tmp_path


def check_reviews(source) -> None:
    splits = {split: load_split("imdb", split, source) for split in SIZES}
    texts = {split: [row["text"] for row in data.rows] for split, data in splits.items()}
    assert sorted(texts["train"] + texts["validation"]) == sorted(f"Review {i}. It was fine, {i}." for i in range(200))
    assert 1 <= len(texts["validation"]) <= 25
    assert texts["test"] == [f"Test review {i}. Bad." for i in range(20)] + ["Seen twice."]
    assert all(set(row) == COLUMNS["imdb"] for data in splits.values() for row in data.rows)
    assert len({data.fingerprint for data in splits.values()}) == 3


def test_folder(folder):
    check_reviews(folder)
    assert list(load_split("commongen", "validation", folder).rows) == [
        {"concepts": ["ski", "mountain"], "targets": ["A man skis.", "Two ski down."]},
        {"concepts": ["dog", "run"], "targets": ["Dogs run."]},
    ]
    posts = load_split("tldr", "train", folder)
    assert list(posts.rows) == datasets.Dataset.from_dict(POSTS).to_list()
    assert load_split("tldr", "train", folder).fingerprint == posts.fingerprint

    write(folder, "tldr", "train", POSTS | {"summary": ["Dog ate a sock.", "What then?"]})
    assert load_split("tldr", "train", folder).fingerprint != posts.fingerprint


def test_folder_says_what_it_lacks(folder):
    with pytest.raises(ValueError, match=r"has no test data for tldr: expected .*test\.parquet with .*'summary'"):
        load_split("tldr", "test", folder)
    write(folder, "tldr", "test", {"post": ["a"], "title": ["b"]})
    with pytest.raises(ValueError, match=r"test\.parquet must have columns .*\['subreddit', 'summary'\] are missing"):
        load_split("tldr", "test", folder)
    (folder / "tldr" / "validation.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"cannot load .*validation\.parquet"):
        load_split("tldr", "validation", folder)


@pytest.fixture
def hub(monkeypatch):
    """The hub's three repositories, in memory."""
    layout = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    posts = datasets.Dataset.from_dict(POSTS)
    repositories = {
        ("stanfordnlp/imdb", "train"): REVIEWS["train"] | {"label": [0] * 201},
        ("stanfordnlp/imdb", "test"): REVIEWS["test"] | {"label": [0] * 21},
        ("allenai/common_gen", "train"): SENTENCES,
        ("allenai/common_gen", "test"): SENTENCES | {"target": ["", "", ""]},
        ("trl-lib/tldr", "train"): {
            "prompt": [layout.format(**row) for row in posts],
            "completion": [" " + row["summary"] for row in posts],
        },
    }

    def load_dataset(path, split):
        if (path, split) not in repositories:
            raise datasets.exceptions.DatasetNotFoundError(f"no {split} in {path}")
        return datasets.Dataset.from_dict(repositories[path, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources._load_split.cache_clear()
    yield
    sources._load_split.cache_clear()


def test_hub(hub):
    check_reviews("hub")
    assert list(load_split("tldr", "train", "hub").rows) == datasets.Dataset.from_dict(POSTS).to_list()
    assert load_split("commongen", "train", "hub").rows[0]["targets"] == ["A man skis.", "Two ski down."]
    with pytest.raises(ValueError, match=r"source='hub': cannot load the hub's trl-lib/tldr \(test\).*a folder"):
        load_split("tldr", "test", "hub")


def test_hub_split_without_targets_says_so(hub):
    with pytest.warns(UserWarning, match="2 of 2 concept sets of commongen's test split .* no target"):
        split = load_split("commongen", "test", "hub")
    assert [TASKS["commongen"].references_of(row) for row in split.rows] == [(), ()]


@real
@pytest.mark.data
@pytest.mark.slow
def test_real_data():
    reviews = {split: [row["text"] for row in load_split("imdb", split, SHARED).rows] for split in SIZES}
    assert not set(reviews["test"]) & set(reviews["train"] + reviews["validation"])
    assert not set(reviews["validation"]) & set(reviews["train"])
    assert 0.04 < len(reviews["validation"]) / len(reviews["train"]) < 0.06
    assert not any("<br" in text for texts in reviews.values() for text in texts)
    assert [len(load_split("commongen", split, SHARED)) for split in ("train", "validation")] == [32_650, 993]
    assert all(row["targets"] for row in load_split("commongen", "test", SHARED).rows)
    assert [len(load_split("tldr", split, SHARED)) for split in SIZES] == [12_853, 1_000, 966]
