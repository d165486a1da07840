"""The three tasks: layout of the prompt, what is truncated, references and limits."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from textgym.data.mini import SIZES
from textgym.data.sources import load_split
from textgym.engine import TextVectorEnv
from textgym.task import Task
from textgym.tasks import TASKS
from textgym.tokenization import encode_prompts, train_tokenizer

SHARED = Path(__file__).parents[2] / "shared"
BASE = SHARED / "models" / "base-7m"
POST = {"subreddit": "pets", "title": "My dog ate a sock", "post": "one two three " * 400, "summary": "The dog ate it."}


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte is a token, and so are frequent words."""
    return train_tokenizer(["SUBREDDIT: r/pets TITLE: one two three POST: TL;DR: generate a sentence with:"] * 2)


def test_tasks_are_light_to_import():
    code = "import sys, textgym.tasks; print({'torch', 'datasets', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("task_name", TASKS)
def test_names_resolve(task_name):
    task = TASKS[task_name]
    assert task.name == task_name
    assert task.reward in task.rewards


def test_a_metric_that_there_is_not_is_refused_by_the_task():
    with pytest.raises(ValueError, match=r"metrics must be of .*'rouge'.*, got \['beauty'\]"):
        dataclasses.replace(TASKS["imdb"], metrics=("rouge", "beauty"))


def test_a_review_is_its_prompt_and_its_reference():
    task = TASKS["imdb"]
    rows = task.split("test", "mini").rows
    for row in rows:
        before, prompt, after = task.prompt_of(row)
        (reference,) = task.references_of(row)
        assert (before, after) == ("", "")
        assert prompt + reference == row["text"]
        assert reference.startswith(" ")
        assert 0 <= len(reference.split()) - len(prompt.split()) <= 1
    assert {task.demonstration(row) for row in rows if row["label"] == 1} == {True}
    assert {task.demonstration(row) for row in rows if row["label"] == 0} == {False}


def test_a_concept_is_never_truncated(tokenizer):
    task = TASKS["commongen"]
    row = {"concepts": ["ski", "mountain", "skier"], "targets": ["A skier skis.", "Skis and a mountain."]}
    parts = task.prompt_of(row)
    assert "".join(parts) == "generate a sentence with: ski mountain skier"
    assert parts[1] == ""
    assert task.references_of(row) == ("A skier skis.", "Skis and a mountain.")
    with pytest.raises(ValueError, match="max_prompt_tokens=10 is too small"):
        encode_prompts(tokenizer, [parts], 10, "right")


@pytest.mark.parametrize("side", ["left", "right"])
def test_only_the_post_is_truncated(tokenizer, side):
    task = TASKS["tldr"]
    ((text, ids),) = encode_prompts(tokenizer, [task.prompt_of(POST)], 120, side)
    start, end = "SUBREDDIT: r/pets\n\nTITLE: My dog ate a sock\n\nPOST: ", "\n\nTL;DR:"
    assert len(ids) == 120
    assert text.startswith(start)
    assert text.endswith(end)
    rest = text.removeprefix(start).removesuffix(end)
    # The first token of the post holds the space before it, and stays.
    kept = len(rest) if side == "right" else next(i for i in range(9) if POST["post"].endswith(rest[i:]))
    assert POST["post"].startswith(rest[:kept])
    assert 0 < len(rest) < len(POST["post"])
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("task_name", TASKS)
def test_mini_prompts_fit(task_name):
    """With the tokenizer that the task trains, prompts and references of the mini edition fit (IMDB's are cut)."""
    task = TASKS[task_name]
    rows = task.split("train", "mini").rows[:2000]
    prompts = ["".join(task.prompt_of(row)) for row in rows]
    references = [" " + reference for row in rows for reference in task.references_of(row)]
    tokenizer = train_tokenizer(prompts + references)
    longest = max(map(len, tokenizer(prompts)["input_ids"]))
    assert longest <= task.max_prompt_tokens or task_name == "imdb"
    assert max(map(len, tokenizer(references)["input_ids"])) < task.max_new_tokens or task_name == "imdb"


@pytest.mark.data
@pytest.mark.skipif(not BASE.is_dir(), reason="needs ../shared")
def test_every_real_concept_set_fits():
    from transformers import AutoTokenizer

    task, tokenizer = TASKS["commongen"], AutoTokenizer.from_pretrained(BASE)
    prompts = [
        "".join(task.prompt_of(row)) for split in SIZES for row in load_split("commongen", split, SHARED / "data").rows
    ]
    assert max(map(len, tokenizer(prompts)["input_ids"])) == task.max_prompt_tokens - 1


def small_task(data, prompt="{p} {q}", references="r"):
    return Task("small", data, prompt, references, 16, 4, lambda prompts, **_: [0.0] * len(prompts))


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, list])
def test_null_is_never_the_word_none(kind, tokenizer):
    rows = [{"p": "one", "q": "two", "r": "three"}, {"p": "one", "q": None, "r": "three"}]
    env = TextVectorEnv(2, task=small_task(kind(rows)), tokenizer=tokenizer, order="sequential")
    with pytest.raises(ValueError, match="prompt of task 'small' needs text or a number in column 'q', got null in"):
        env.reset(seed=0)
    assert small_task(kind(rows), "{p}").prompt_of(rows[1]) == ("", "one", "")
    assert small_task(kind(rows), "{p[0]}").prompt_of(rows[1]) == ("", "o", "")
    for wrong in (lambda row: row["q"], lambda row: (row["p"], row["q"], "")):
        task = small_task(kind(rows), wrong)
        with pytest.raises(ValueError, match="prompt of task 'small' must be a string or a triple of strings, got"):
            task.prompt_of(rows[1])


def test_null_is_no_reference_and_a_number_is_refused():
    task = small_task([{"r": value} for value in ("one", None, ["one", None], [], "")])
    assert [task.references_of(row) for row in task.data] == [("one",), (), ("one",), (), ("",)]
    for wrong in (1, [1], {"a": 1}.values()):
        with pytest.raises(ValueError, match="references of task 'small' must be text or texts, got"):
            task.references_of({"r": wrong})
