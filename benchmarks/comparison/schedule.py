"""Schedule runs, each in a process of its own; one that fails or dies does not stop the others."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from transformers.utils.logging import disable_progress_bar

from benchmarks.comparison.results import append_result, write_text
from textgym.process import keep_freed_memory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from benchmarks.comparison.jobs import Run
    from benchmarks.comparison.runner import Benchmark


class Work(NamedTuple):
    """What a process does: a run, or, if `run` is None, the warm start that all runs of the task need first."""

    task: str
    run: Run | None

    def __str__(self) -> str:
        return f"{self.task} warm start" if self.run is None else str(self.run)


@dataclass
class _Worker:
    work: Work
    process: BaseProcess
    place: int


def run_all(
    benchmark: Benchmark,
    runs: Sequence[Run],
    *,
    jobs: int,
    started: Callable[[Work], None],
    report: Callable[[Work, str, float], None],
    finished: Callable[[Work, str], None],
) -> dict[Work, str]:
    """Run what is not finished.

    Each run is a process with its share of this one's threads (and, if there are several GPUs, one of them). The last
    digits of its numbers can depend on the number of threads, which its record holds. If this process ends, so do the
    runs; they continue from their last checkpoints when the same runs are asked for again.

    Args:
        benchmark: The benchmark that the runs belong to.
        runs: What to run, in order.
        jobs: Number of processes at a time.
        started: Called when a piece of work starts.
        report: Called with a piece of work, what is happening, and the share of it that is done, in [0, 1].
        finished: Called with a piece of work and its outcome when it ends.

    Returns:
        The tracebacks of what failed; those of runs are also in ``<out>/<run>/traceback.txt``.

    Raises:
        ValueError: `jobs` is below 1, or the results folder is in use by another process.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    waiting: list[Run] = []
    warm: set[str] = set()
    failed: dict[Work, str] = {}
    workers: dict[Connection, _Worker] = {}

    def fail(work: Work, trace: str) -> None:
        failed[work] = trace
        if work.run is None:
            waiting[:] = [run for run in waiting if run.task != work.task]
        else:
            with contextlib.suppress(OSError):  # a full disk may be why it failed
                write_text(benchmark.folder(work.run) / "traceback.txt", trace)
        finished(work, "failed")

    def handle(worker: _Worker, kind: str, content: Any) -> None:
        if kind == "report":
            report(worker.work, *content)
        elif kind == "failed":
            fail(worker.work, content)
        elif worker.work.run is None:
            benchmark.warm_starts[worker.work.task] = content  # which the processes of its runs are given
            warm.add(worker.work.task)
            finished(worker.work, "ready")
        else:
            try:
                append_result(benchmark.out, content)
            except (OSError, ValueError):
                fail(worker.work, traceback.format_exc())
                return
            benchmark.finished.add(worker.work.run)
            benchmark.forget_training(worker.work.run)
            finished(worker.work, f"test reward {content['final_reward']:.3f}")

    with _locked(benchmark):
        benchmark.read_finished()  # again: another process may have finished some before this one had the lock
        for run in runs:
            if run in benchmark.finished:
                benchmark.forget_training(run)  # again: a process may have died before it had done so
            else:
                waiting.append(run)
        try:
            while waiting or workers:
                while len(workers) < jobs:
                    work = _next(
                        waiting, warm, {worker.work.task for worker in workers.values() if not worker.work.run}
                    )
                    if work is None:
                        break
                    place = min(set(range(jobs)) - {worker.place for worker in workers.values()})
                    started(work)
                    receiver, process = _start(benchmark, work, place, jobs)
                    workers[receiver] = _Worker(work, process, place)
                ready: Any = connection.wait(list(workers))
                for receiver in ready:
                    worker = workers[receiver]
                    try:
                        kind, content = receiver.recv()
                    except EOFError:
                        worker.process.join()
                        kind, content = "failed", f"the process died with exit code {worker.process.exitcode}\n"
                    handle(worker, kind, content)
                    if kind != "report":
                        worker.process.join()
                        del workers[receiver]
        finally:
            for worker in workers.values():
                worker.process.kill()
            for worker in workers.values():
                worker.process.join()
    return failed


def _next(waiting: list[Run], warm: set[str], warming: set[str]) -> Work | None:
    """The first run whose task is warm, or the first warm start that is needed; None if every run has to wait."""
    for run in waiting:
        if run.task in warm:
            waiting.remove(run)
            return Work(run.task, run)
        if run.task not in warming:
            return Work(run.task, None)
    return None


@contextlib.contextmanager
def _locked(benchmark: Benchmark) -> Iterator[None]:
    """Lock the results folder against other processes."""
    try:
        benchmark.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(benchmark.out / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise ValueError(
            f"out must be a folder that no other process writes results to, got {benchmark.out}"
        ) from error
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got {benchmark.out}: {error}") from error
    with lock:
        yield


def start_server() -> None:
    """Start the process that runs are forked from: it imports what they need while this one goes on."""
    if sys.platform != "win32":
        from multiprocessing import forkserver

        forkserver.set_forkserver_preload(["benchmarks.comparison.preload"])
        with _without_interrupts():
            forkserver.ensure_running()


def _start(benchmark: Benchmark, work: Work, place: int, jobs: int) -> tuple[Connection, BaseProcess]:
    # Forking a server that has imported everything is faster than starting Python.
    start_server()
    context: Any = get_context("spawn" if sys.platform == "win32" else "forkserver")
    receiver, sender = context.Pipe(duplex=False)
    threads = max(1, torch.get_num_threads() // jobs)
    process = context.Process(
        target=_work, args=(sender, benchmark, work, place, threads, dict(os.environ)), daemon=True
    )
    with _without_interrupts():
        process.start()
    sender.close()
    return receiver, process


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that are started in this block know nothing of Ctrl-C: this one ends them."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(sender: Connection, benchmark: Benchmark, work: Work, place: int, threads: int, environment: dict) -> None:
    """The whole life of a process."""
    os.environ.clear()
    os.environ.update(environment)  # the server has the environment of the time when it was started
    disable_progress_bar()  # the process that started this one shows all
    keep_freed_memory()
    torch.set_num_threads(threads)
    if (devices := torch.cuda.device_count()) > 1:
        torch.cuda.set_device(place % devices)

    def die_with_parent() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # at once: the next process will write to the same folder

    threading.Thread(target=die_with_parent, daemon=True).start()

    def report(what: str, share: float) -> None:
        sender.send(("report", (what, share)))

    try:
        done = benchmark.warm_start(work.task, report) if work.run is None else benchmark.run(work.run, report)
        sender.send(("done", done))
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
