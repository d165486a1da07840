"""Memory of a gradient step, and what settings of the process do for its speed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.performance.measurement import Measurement
from benchmarks.performance.workload import gradient_step, plain_gradient_step
from textgym.process import keep_freed_memory


def memory() -> Iterator[Measurement]:
    """Peak memory of a gradient step, beside that of the plain one."""

    def peak(ours: bool, vocabulary: int) -> float:
        # In a new process, since a process keeps memory that it has freed.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
            return processes.submit(step_memory, ours, vocabulary).result()

    for name, vocabulary in (("peak_memory", 4096), ("peak_memory_50k", 50257)):
        settings = f"float32, a gradient step on a minibatch of W, vocabulary {vocabulary}, beyond the weights"
        ours, plain = (functools.partial(peak, which, vocabulary) for which in (True, False))
        yield Measurement(name, "MiB", ours, plain, "full logits", settings)


def step_memory(ours: bool, vocabulary: int) -> float:
    """Peak memory of a gradient step in MiB, with gradients and Adam's moments, without weights."""
    size: dict[str, Any] = {"vocab_size": vocabulary}
    step = gradient_step(False, **size) if ours else plain_gradient_step(**size)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """Memory of this process in MiB, now (VmRSS) or at its peak (VmHWM); Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def processes() -> Iterator[Measurement]:
    """The effect of process settings on a gradient step: the allocator's of our commands, and torch's threads."""
    threads = torch.get_num_threads()
    pool = functools.partial(ProcessPoolExecutor, 1, get_context("spawn"), _prepare)
    settings = "float32, gradient steps on a minibatch of W"
    with pool((True, threads)) as ours, pool((False, threads)) as usual, pool((True, 1)) as single:
        for name, other, reference, more in (
            ("allocator", usual, "glibc as it comes", ""),
            ("threads", single, "one thread", f", {threads} threads"),
        ):
            steps, others = (functools.partial(_steps_in, process) for process in (ours, other))
            yield Measurement(f"process_{name}", "tokens/s", steps, others, reference, settings + more)


def _prepare(keep: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()


def _steps_in(process: ProcessPoolExecutor) -> float:
    return process.submit(take_steps).result()


def take_steps() -> float:
    """Take gradient steps of a policy that this process keeps, and return the number of tokens that they read."""
    return sum(_step()() for _ in range(5))


@functools.cache
def _step() -> Callable[[], float]:
    return gradient_step(False)
