"""The cost of runs, estimated before anything is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from gymnasium.envs.registration import load_env_creator
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from agents.environments import make_env
from benchmarks.comparison.jobs import Job, Run
from benchmarks.comparison.runner import Benchmark
from benchmarks.comparison.warm_start import model_config
from benchmarks.profiles import TaskProfile
from textgym.hub import base_of, load_pretrained
from textgym.precision import fast_dtype
from textgym.rendering import visible
from textgym.task import Task
from textgym.tokenization import VOCAB_SIZE

# Share of the speed of large matrix products; small models and short texts stay below it, large ones above.
UTILISATION = 0.3


class Cost(NamedTuple):
    """The most that a run can cost.

    Attributes:
        episodes: Training episodes.
        tokens: New tokens of all episodes, the policy's and the guide's.
        flop: Floating-point operations: two per parameter and token forward, four backward.
    """

    episodes: int
    tokens: int
    flop: float


def cost(job: Job, size: tuple[int, int, int] | None = None) -> Cost:
    """Estimate the cost of a run, without its task's warm start.

    Every episode is sampled, read by the reference policy, and read forward and backward once per epoch; a guide writes
    as much as the policy does; completions have the maximum length; tests and validation are sampled. A budget of
    tokens is used up by every run that trains, and by an iteration more; where episodes start from a prefix there can
    be more of them than are estimated.

    Args:
        job: The row and its task.
        size: The `sizes` of the task; None finds them out.

    Raises:
        ValueError: The configuration of the start model cannot be read.
    """
    task, arguments = job.task, job.arguments
    prompt, new, vocab_size = size or sizes(task)
    judged = task.test_prompts * max(job.row.best_of, task.samples(job.row))
    trained = 0
    if job.row.trains:
        at_once = arguments.get("episodes_per_iteration", task.rl["episodes_per_iteration"])
        trained = (task.episodes or 0) if task.tokens is None else -(-task.tokens // new) + at_once
        iterations = trained // at_once
        evaluations = iterations // max(arguments.get("eval_every", 0), 1)
        judged += evaluations * arguments.get("eval_prompts", 0) * bool(arguments.get("eval_every"))
    passes = 3 * trained * (1 + arguments.get("n_epochs", 1)) + judged
    return Cost(trained, trained * new, 2 * parameters(job, prompt + new, vocab_size) * (prompt + new) * passes)


def sizes(task: TaskProfile) -> tuple[int, int, int]:
    """P, T and the size of the vocabulary of a task's environment."""
    module, _, env_id = task.env_id.rpartition(":")
    if module:
        import_module(module)  # which registers it
    spec = gym.spec(env_id)
    creator: Any = load_env_creator(str(spec.entry_point))
    default: Task | None = spec.kwargs.get("task") or getattr(creator, "task", None)
    if default is None:  # the environment makes it from its arguments, without data
        env = make_env(env_id, num_envs=1, **task.env)
        return env.max_prompt_tokens, env.max_new_tokens, env.vocab_size
    return (
        task.env.get("max_prompt_tokens", default.max_prompt_tokens),
        task.env.get("max_new_tokens", default.max_new_tokens),
        VOCAB_SIZE,
    )


def parameters(job: Job, positions: int, vocab_size: int) -> int:
    """Number of parameters of the start model, which reads so many tokens; its weights are not loaded.

    Raises:
        ValueError: Its configuration cannot be read.
    """
    shape = job.task.language_model
    config: Any
    if job.base is None:
        assert shape is not None
        config = model_config(shape, vocab_size, positions, None, None)
    else:
        config = model_config_of("base", job.base)
    with torch.device("meta"):
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
    return model.num_parameters()


def model_config_of(argument: str, model: str) -> Any:
    """The configuration of a model.

    Args:
        argument: What the model is an argument for, in errors.
        model: Hub id or folder.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return load_pretrained(AutoConfig, base_of(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument} must be the hub id or folder of a model, got {model!r}") from error


def speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of matrix products on a device."""
    left = torch.randn(2048, 2048, device=device).to(dtype)

    def multiply() -> None:
        for _ in range(5):
            torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize()

    multiply()
    started = time.perf_counter()
    multiply()
    return 5 * 2 * 2048**3 / (time.perf_counter() - started)


def table(benchmark: Benchmark, runs: Sequence[Run]) -> Table:
    """Every run with its cost, and the total of those that are not finished."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if benchmark.dtype == "float32" else fast_dtype(device)
    peak = speed(dtype, device)
    result = Table(
        title=Text(f"{len(runs)} runs of profile {benchmark.profile.name}"),
        caption=f"At most so many tokens and operations; hours at {UTILISATION:.0%} of the {peak / 1e9:,.0f} GFLOP/s "
        f"that products of matrices ({dtype}) reach on this {device.type}. Warm starts are not counted.",
    )
    for column in ("run", "episodes", "new tokens", "TFLOP", "hours", "state"):
        result.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
    total = 0.0
    # Environments can take seconds to make, and all rows and seeds of a task have the same.
    size: dict[str, tuple[int, int, int]] = {}
    estimates: dict[tuple[str, str], Cost] = {}
    for run in runs:
        done, job = run in benchmark.finished, benchmark.job(run)
        try:
            if run.task not in size:
                size[run.task] = sizes(job.task)
            if run[:2] not in estimates:
                estimates[run[:2]] = cost(job, size[run.task])
            estimate = estimates[run[:2]]
        except ValueError as error:
            result.add_row(Text(str(run)), "", "", "", "", Text(visible(str(error).splitlines()[0])))
            continue
        hours = estimate.flop / (UTILISATION * peak) / 3600
        total += 0 if done else hours
        cells = (f"{estimate.episodes:,}", f"{estimate.tokens:,}", f"{estimate.flop / 1e12:,.1f}", f"{hours:,.2f}")
        result.add_row(Text(str(run)), *cells, "finished" if done else "")
    result.add_section()
    result.add_row("to do", "", "", "", f"{total:,.2f}", "")
    return result
