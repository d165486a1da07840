"""Compare algorithms: ``python benchmarks/run_all.py --profile quick``."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import TaskID

    from benchmarks.comparison.schedule import Work


def run_all(
    profile: str = "quick",
    tasks: str | None = None,
    algos: str | None = None,
    algo: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    seeds: int = 1,
    source: str | None = None,
    base: str | None = None,
    dtype: Literal["float32", "auto"] = "float32",
    compile: bool = False,
    jobs: int = 1,
    track: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    encoder: str | None = None,
    dry_run: bool = False,
    name: str | None = None,
    out: Path | None = None,
) -> int:
    """Compare algorithms: train every chosen row, an algorithm with its arguments, on every task, and write a report.

    Results go to a folder, one JSON line per finished run; the same command with the same folder continues.

    Args:
        profile: "quick" (mini data, minutes), "small" (real data, hours), "paper" (the published models and settings,
            GPUs), "options" (PPO with one option changed), "frontier" (hard problems, with and without a guide), or
            package.module:NAME of a `Profile` of your own.
        tasks: Names of tasks, separated by commas; by default all tasks of the profile.
        algos: Names of the profile's rows, or of algorithms in `agents.ALGORITHMS`, separated by commas; or "all" rows
            of the profile; by default those that the profile names ("sl,ppo,ppo++", for "small" more).
        algo: One more algorithm, of your own or of Stable-Baselines3: package.module:Class, or package.module:ROW for a
            `benchmarks.profiles.Row`. Can be given several times.
        seeds: Number of training seeds, 0 to seeds - 1.
        source: "mini", "hub" or a folder; by default the profile's.
        base: Hub id or folder of the start model; by default the profile's, or a model that is trained from scratch on
            each task's text.
        dtype: Precision of matrix products in policies and guides: "float32", or "auto" for bfloat16 on machines that
            are fast in it (weights, losses and optimiser stay in float32).
        compile: Compile the policies with torch.compile.
        jobs: Number of runs at a time, each a process with its share of the processors.
        track: A tracker of Accelerate that runs report to ("tensorboard", "wandb", ...). Can be given several times.
        encoder: Hub id or folder of the encoder for BERTScore, which is not measured without one.
        dry_run: Print what would be run and its cost, and run nothing.
        name: Results go to runs/NAME; by default the profile's name and the time.
        out: Results go to this folder instead.

    Returns:
        0, or 1 if a run failed.

    Raises:
        KeyboardInterrupt: The user ended it, or the process was told to end (see `main`); a note says how to go on.
        ValueError: An argument is not one of those above.
        ImportError: A package that the report needs is not installed.
    """
    from benchmarks.profiles import load_profile, row_of
    from textgym.checks import check_name
    from textgym.packages import require
    from textgym.process import importing
    from textgym.rendering import visible

    require("report", "a benchmark's report", "jinja2", "sacrebleu")  # now, not after the runs
    console = Console(markup=False, emoji=False, highlight=False)  # names are shown as they are
    chosen = load_profile(profile)
    own = dict(row_of(given) for given in algo)
    if algos is not None:
        from agents import ALGORITHMS

        wanted = {part.strip() for part in algos.split(",")} - set(chosen.rows)
        own |= dict(row_of(ALGORITHMS[name]) for name in ALGORITHMS if name in wanted)
    default = list(chosen.default)
    if own:
        chosen = chosen.with_rows(own)
    task_names = _names("tasks", tasks, list(chosen.tasks), list(chosen.tasks))
    row_names = _names("algos", algos, chosen.rows, default)
    row_names += [name for name in own if name not in row_names]
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")

    from agents import display

    # torch and transformers take seconds
    with importing(), console.status("loading") if display.can_draw(console) else contextlib.nullcontext():
        from benchmarks.comparison import schedule

        if not dry_run:
            schedule.start_server()  # it loads at the same time
        from transformers.utils.logging import disable_progress_bar

        import textgym  # noqa: F401  (registers the environments)
        from agents.processes import check_trackers
        from benchmarks.comparison import cost
        from benchmarks.comparison.jobs import Run
        from benchmarks.comparison.results import Runs, read_results
        from benchmarks.comparison.runner import Benchmark
        from benchmarks.report.analysis import Analysis
        from benchmarks.report.tables import results
        from benchmarks.report.write import write_report

    check_trackers(track)
    disable_progress_bar()  # one display is enough
    if name is not None:
        check_name("name", name)
    for argument, model in (("base", base), ("encoder", encoder)):
        if model is not None:
            cost.model_config_of(argument, model)
    folder = Path(out or Path("runs") / (name or f"{chosen.name}-{datetime.now():%Y%m%d-%H%M%S}"))
    benchmark = Benchmark(chosen, source, base, folder, dtype, compile, track, encoder)
    runs = [Run(task, algo, seed) for task in task_names for seed in range(seeds) for algo in row_names]
    if dry_run:
        console.print(cost.table(benchmark, runs))
        return 0

    left = {task: {run for run in runs if run.task == task} - benchmark.finished for task in task_names}
    console.print(
        f"{len(runs)} runs, {jobs} at a time: {', '.join(row_names)} on {', '.join(task_names)}, with "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}. A task begins with its warm start, the policy that its rows "
        f"start from; when its runs have ended, their test rewards are shown. All goes to {folder}.",
    )
    with display.bars(console) as progress:
        done = sum(run in benchmark.finished for run in runs)
        overall = progress.add_task("all runs", total=len(runs), completed=done, status=f"{done} of {len(runs)} done")
        bars: dict[Work, TaskID] = {}

        def started(work: Work) -> None:
            bars[work] = progress.add_task(str(work), total=1.0, status="")
            if not console.is_terminal:  # where no bar is drawn
                console.print(f"{work}: started", soft_wrap=True)

        def report(work: Work, what: str, share: float) -> None:
            progress.update(bars[work], completed=share, status=what)

        def finished(work: Work, outcome: str) -> None:
            console.print(f"{work}: {outcome}", soft_wrap=True)
            progress.remove_task(bars.pop(work))
            if work.run is not None:
                progress.advance(overall)
                left[work.task].remove(work.run)
                if not left[work.task] and any(left.values()):  # at the end there is the whole report
                    records = [record for record in read_results(folder) if record["task"] == work.task]
                    if records:
                        console.print(results(Analysis(Runs(records))).markdown(), soft_wrap=True)
            progress.update(overall, status=f"{int(progress.tasks[0].completed)} of {len(runs)} done")

        try:
            failed = schedule.run_all(benchmark, runs, jobs=jobs, started=started, report=report, finished=finished)
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(
                f"{len(benchmark.finished.intersection(runs))} of {len(runs)} runs are done; "
                f"the same command with --out {shlex.quote(str(folder))} goes on"
            )
            raise
    for work, trace in failed.items():
        console.print(f"{work} failed:\n{visible(trace)}", soft_wrap=True)
    if benchmark.finished:
        files = write_report(folder)
        print(files.table)
        print(files.page)
    return 1 if failed else 0


def _names(argument: str, given: str | None, allowed: list[str], default: list[str]) -> list[str]:
    """Read a comma-separated list of names, "all", or nothing.

    Raises:
        ValueError: A name that is not allowed, or none.
    """
    if given is None:
        return default
    if given == "all":
        return allowed
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names or not set(names) <= set(allowed):
        raise ValueError(f"{argument} must be some of {','.join(allowed)}, or all, got {given!r}")
    return names


def main() -> None:
    """Read the command line; a wrong argument, Ctrl-C and SIGTERM end in one line, not in a traceback."""
    sys.path.append(os.getcwd())  # for modules of the user's that --algo and --profile name
    from textgym.process import keep_freed_memory
    from textgym.rendering import visible

    def interrupt(number: int, _frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # it is ending
        raise KeyboardInterrupt(number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)
    try:
        keep_freed_memory()
        sys.exit(tyro.cli(run_all))
    except (ImportError, ValueError) as error:
        sys.exit(f"error: {visible(str(error))}")
    except KeyboardInterrupt as error:
        (number,) = error.args
        notes = getattr(error, "__notes__", ["nothing was run"])
        print(f"ended by {signal.Signals(number).name}: {notes[0]}", file=sys.stderr)
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
