"""Record what Gemma 3 270M writes for CommonGen, as a guide of runs: ``python examples/record_gemma.py``.

The model is served on this machine (``pip install "textgym[llm]"``), or ``--url`` is any OpenAI-compatible server. It
reads a few references before each prompt. What it writes goes to a file, which is a guide by its path:
``gym.make("textgym/CommonGen-v0", guide="gemma.jsonl", train_samples=1024)``. Interrupted, the same command goes on
where it ended.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import tyro
from gemma_guide import ENV, MODEL, few_shot, serve

from agents.environments import make_env
from textgym.data.splits import SPLITS
from textgym.decoding import Decoding
from textgym.guides.http import HTTPGuide
from textgym.recording import record
from textgym.tasks.commongen import TASK


def main(
    file: Path = Path("gemma.jsonl"),
    source: str = "../shared/data",
    tokenizer: str = "../shared/models/base-7m",
    url: str | None = None,
    model: str = MODEL,
    train_samples: int = 1024,
    texts: tuple[int, int, int] = (4, 1, 4),
    shots: int = 12,
    seed: int = 0,
) -> None:
    """Record what a served model writes for CommonGen.

    Args:
        file: File of the completions.
        source: Data: "mini", "hub" or a folder.
        tokenizer: Hub id or folder of the tokenizer by which the horizon is counted.
        url: Base URL of a server that is running; by default one is started.
        model: The model's name there.
        train_samples: Samples of the train split.
        texts: Texts for each prompt of the train, the validation and the test split.
        shots: References that the model is shown.
        seed: Seed of everything.
    """
    with contextlib.nullcontext(url) if url else serve() as address:
        guide = HTTPGuide(
            model,
            base_url=address,
            template=few_shot(TASK, source, shots, seed=seed),
            decoding=Decoding(temperature=0.7, top_p=0.92, top_k=50),
            stop=["\n"],
            timeout=600.0,
        )
        for split, count in zip(SPLITS, texts, strict=True):
            if not count:
                continue
            started = time.perf_counter()
            env = make_env(
                ENV,
                num_envs=1,
                split=split,
                source=source,
                tokenizer=tokenizer,
                guide=guide,
                train_samples=train_samples,
            )
            written = record(env, file, completions_per_prompt=count, seed=seed)
            print(f"{split}: {written} new texts in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
