"""How fast it is: ``python benchmarks/throughput.py``; each figure beside a reference of the same run."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, its folder stands first on the path, where our statistics would hide the standard library's.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import functools
import itertools
import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

# Version of TRL and of its algorithm: PPO's trainer is no longer in the later one.
PEERS = {"ppo": "1.12.0", "grpo": "1.16.0"}
TORCH = "torch==2.13.0"


class Contest(NamedTuple):
    """Something of ours beside a reference.

    Attributes:
        name: Of the figure.
        unit: "s" for the time of one run, "MiB" for what a run returns; anything else is work a second.
        ours: Does some work and returns how much.
        reference: The same for the reference, or None.
        reference_name: What the reference is.
        settings: Type of the arithmetic, trunk and group size, where they matter.
    """

    name: str
    unit: str
    ours: Callable[[], float]
    reference: Callable[[], float] | None
    reference_name: str
    settings: str = ""


def run(contest: Contest, rounds: int) -> dict[str, Any]:
    """Measure in turns, after one run of each that does not count; medians.

    Returns:
        "name", "value", "unit", "reference", "reference_value", "ratio" (above 1 where ours is faster or smaller), and
        "settings".
    """
    functions = [function for function in (contest.ours, contest.reference) if function is not None]
    for function in functions:
        function()
    figures: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, values in zip(functions, figures, strict=True):
            started = time.perf_counter()
            work = function()
            seconds = time.perf_counter() - started
            values.append({"s": seconds, "MiB": work}.get(contest.unit, work / seconds))
    value, reference = median(figures[0]), None if contest.reference is None else median(figures[1])
    ratio = None if reference is None else value / reference
    if ratio is not None and contest.unit in ("s", "MiB"):
        ratio = 1 / ratio
    return {
        "name": contest.name,
        "value": value,
        "unit": contest.unit,
        "reference": contest.reference_name,
        "reference_value": reference,
        "ratio": ratio,
        "settings": contest.settings,
    }


def environments() -> Iterator[Contest]:
    """Steps of environments, random actions, resets and ends of episodes included; rewards and guides are off."""
    import gymnasium as gym
    import numpy as np

    from benchmarks.workload import NEW, task, tokenizer
    from textgym.engine import TextVectorEnv
    from textgym.env import TextEnv

    arguments: Any = {"task": task(), "tokenizer": tokenizer()}
    random = np.random.default_rng(0)

    def stepper(env: Any, episodes: int) -> Callable[[], float]:
        rows = getattr(env, "num_envs", None)
        env.reset(seed=0)
        upper = int((env.action_space if rows is None else env.single_action_space).n)
        actions = random.integers(0, upper, (episodes * NEW, *(() if rows is None else (rows,))))

        def steps() -> float:
            for action in actions:
                result = env.step(action)
                if rows is None and result[2]:
                    env.reset()
            return float(actions.size)

        return steps

    def sync(rows: int) -> Any:
        return gym.vector.SyncVectorEnv([lambda: TextEnv(**arguments)] * rows)

    yield Contest("env_single", "steps/s", stepper(TextEnv(**arguments), 100), stepper(sync(1), 50), "SyncVectorEnv")
    for rows, episodes in ((1, 100), (64, 60), (1024, 12)):
        ours = stepper(TextVectorEnv(rows, **arguments), episodes)
        reference = stepper(sync(rows), max(1, 40 // rows))
        yield Contest(f"env_vector_{rows}", "steps/s", ours, reference, f"SyncVectorEnv of {rows}")
        cartpole = stepper(gym.make_vec("CartPole-v1", rows, vectorization_mode="vector_entry_point"), episodes)
        yield Contest(f"cartpole_vector_{rows}", "steps/s", cartpole, None, "", "for scale: another task")


def sampling(family: str = "gpt2") -> Iterator[Contest]:
    """Tokens of new text, with log-probabilities and values, beside `generate`, which gives neither."""
    import torch

    from benchmarks.workload import NEW, PROMPT, generate, language_model, policy, sample, texts, written

    ids = texts()
    seeds = itertools.count()

    def ours(best: bool, stops: bool) -> Callable[[], float]:
        writer = policy(best, stops, family=family)
        return lambda: sample(writer, ids, NEW, next(seeds))

    def theirs(stops: bool, dtype: torch.dtype = torch.float32) -> Callable[[], float]:
        model = language_model(stops, family)

        def write() -> float:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return written(generate(model, torch.from_numpy(ids), stops)[:, PROMPT:])

        return write

    for name, stops in (("sample_full", False), ("sample_early_stop", True)):
        yield Contest(name, "tokens/s", ours(False, stops), theirs(stops), "generate float32", "float32")
        best = ours(True, stops)
        settings = f"{best_dtype()}, compiled"
        yield Contest(f"{name}_best", "tokens/s", best, theirs(stops), "generate float32", settings)
        if best_dtype() == "bfloat16":
            same = theirs(stops, torch.bfloat16)
            yield Contest(f"{name}_best_same_dtype", "tokens/s", best, same, "generate bfloat16", settings)


def best_dtype() -> str:
    """The type of arithmetic at best settings."""
    import torch

    from textgym.precision import fast_dtype

    return str(fast_dtype(torch.device("cpu"))).removeprefix("torch.")


def trainer(name: str, best: bool = False, family: str = "gpt2", **hyperparameters: Any) -> Any:
    """An algorithm on the workload."""
    from agents import ALGORITHMS
    from agents.group import GroupPolicyGradient
    from benchmarks.workload import (
        CLIP,
        EPISODES,
        EPOCHS,
        GROUP,
        KL_COEF,
        LEARNING_RATE,
        MINIBATCH,
        environment,
        policy,
    )

    grouped = issubclass(ALGORITHMS[name], GroupPolicyGradient)
    return ALGORITHMS[name](
        policy(best, family=family),
        environment(guided=name in ("ppo++", "aggrevated"), best=best, family=family),
        episodes_per_iteration=EPISODES,
        minibatch_size=MINIBATCH,
        n_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        kl_coef=KL_COEF,
        clip_range=CLIP,
        **({"group_size": GROUP} if grouped else {}),
        **hyperparameters,
    )


def iteration(agent: Any) -> Callable[[], float]:
    """One iteration of an algorithm, each time another."""

    def iterate() -> float:
        agent.learn(total_episodes=agent.episodes_per_iteration)
        return 1.0

    return iterate


def updates(family: str = "gpt2") -> Iterator[Contest]:
    """One epoch of PPO's gradient steps, in tokens of whole texts, prompts included."""
    import torch

    from benchmarks.workload import EPISODES, NEW, PROMPT, PlainTrainer, texts

    def ours(best: bool) -> Callable[[], float]:
        agent = trainer("ppo", best, family)
        agent.n_epochs = 1
        rollout = agent.play()
        credit = agent.credit(rollout, agent.reference_log_probs(rollout))

        def update() -> float:
            agent.update(rollout, credit)
            return float(EPISODES * (PROMPT + NEW))

        return update

    plain = PlainTrainer(family=family)
    ids = torch.from_numpy(texts(new=NEW))
    with torch.no_grad():
        log_probs, _, values = plain.judge(plain.model, ids)

    def theirs() -> float:
        plain.update(ids, log_probs, log_probs, values, 1)
        return float(EPISODES * (PROMPT + NEW))

    name = "full logits, padded passes, AdamW, float32"
    yield Contest("update", "tokens/s", ours(False), theirs, name, "float32, shared trunk")
    yield Contest("update_best", "tokens/s", ours(True), theirs, name, f"{best_dtype()}, compiled, shared trunk")


def iterations(peers: bool, rounds: int, family: str = "gpt2") -> Iterator[Contest]:
    """Whole iterations: sampling, reference policy, and 16 gradient steps."""
    from benchmarks.workload import GROUP, PlainTrainer

    for algorithm, group in (("ppo", 1), ("grpo", GROUP)):
        trunk = "shared trunk" if algorithm == "ppo" else f"groups of {group}"
        variants = {
            "": (trainer(algorithm, family=family), f"float32, {trunk}"),
            "_best": (trainer(algorithm, best=True, family=family), f"{best_dtype()}, compiled, {trunk}"),
        }
        if algorithm == "ppo":
            variants["_separate_critic"] = (
                trainer("ppo", family=family, critic="separate"),
                "float32, separate critic",
            )
        for suffix, (agent, settings) in variants.items():
            name = f"iteration_{algorithm}{suffix}"
            if peers:
                reference_name = f"TRL {PEERS[algorithm]} float32" + (", separate critic" if algorithm == "ppo" else "")
                with trl(algorithm, rounds + 1) as reference:
                    yield Contest(name, "s", iteration(agent), reference, reference_name, settings)
            else:
                reference_name = "plain loop float32" + (", shared trunk" if algorithm == "ppo" else "")
                plain = PlainTrainer(group, family=family).iterate
                yield Contest(name, "s", iteration(agent), plain, reference_name, settings)

    for name, algorithm in (("plus_plus", "ppo++"), ("aggrevated", "aggrevated")):
        agent, ppo = iteration(trainer(algorithm, family=family)), iteration(trainer("ppo", family=family))
        full_name = f"iteration_ppo_{name}" if name == "plus_plus" else f"iteration_{name}"
        yield Contest(full_name, "s", agent, ppo, "iteration_ppo", "float32, shared trunk, guide of the same size")


@contextlib.contextmanager
def trl(algorithm: str, iterations: int) -> Iterator[Callable[[], float]]:
    """TRL's trainer in an environment of its own, which is made here, with our threads and allocator.

    Yields:
        A function that lets it do its next iteration. It waits where it is not called.

    Raises:
        RuntimeError: It ended early.
    """
    import torch

    from benchmarks import workload
    from textgym.storage import cache_dir

    version = PEERS[algorithm]
    python = cache_dir() / "peers" / f"trl-{version}" / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    # torch first and by its own pin: a range alone would fetch a CUDA build of several gigabytes.
    for packages in ([TORCH], [f"trl=={version}", TORCH]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, capture_output=True)
    names = ("vocabulary", "prompt", "new", "episodes", "minibatch", "group", "learning_rate", "kl_coef", "clip")
    shared: dict[str, Any] = {name: getattr(workload, name.upper()) for name in names}
    shared |= {"epochs": workload.EPOCHS, "size": workload.SIZE}
    # -P, because beside the script stands our statistics, which would hide the standard library's.
    script = Path(__file__).with_name("trl_peer.py")
    command: list[Any] = [python, "-P", script, algorithm, str(iterations), json.dumps(shared)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **threads}
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        go, done = process.stdin, process.stdout

        def iterate() -> float:
            with contextlib.suppress(BrokenPipeError):
                go.write("\n")
                go.flush()
            if not done.readline():
                log.seek(0)
                raise RuntimeError(f"TRL {version} ended early:\n{log.read()[-2000:]}")
            return 1.0

        try:
            yield iterate
        finally:
            process.kill()


def memory() -> Iterator[Contest]:
    """Memory of a gradient step, beside the plain one's."""

    def peak(ours: bool, vocabulary: int) -> Callable[[], float]:
        def measure() -> float:
            # A process of its own: memory that was once used counts for ever.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
                return processes.submit(step_memory, ours, vocabulary).result()

        return measure

    for name, vocabulary in (("peak_memory", 4096), ("peak_memory_50k", 50257)):
        settings = f"float32, a gradient step on a minibatch of W, vocabulary {vocabulary}, beyond the weights"
        yield Contest(name, "MiB", peak(True, vocabulary), peak(False, vocabulary), "full logits", settings)


def step_memory(ours: bool, vocabulary: int) -> float:
    """MiB that a gradient step takes at most, gradients and Adam's moments included, weights not."""
    from benchmarks.workload import gradient_step, plain_gradient_step

    size: dict[str, Any] = {"vocab_size": vocabulary}
    step = gradient_step(False, **size) if ours else plain_gradient_step(**size)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held now
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """MiB that this process holds (VmRSS) or has held at most (VmHWM); Linux knows."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def utilisation() -> Iterator[Contest]:
    """Floating-point operations that the workload needs at least, a second, beside those of `torch.mm`."""
    import torch

    from benchmarks.workload import EPISODES, NEW, PROMPT, SIZE, text_flop

    flop = EPISODES * text_flop(PROMPT + NEW - 1, NEW, **SIZE)

    def products(dtype: torch.dtype) -> Callable[[], float]:
        left, right = torch.randn(2, 2048, 2048).to(dtype)

        def multiply() -> float:
            for _ in range(10):
                torch.mm(left, right)
            return 10 * 2 * 2048**3

        return multiply

    def scaled(contest: Contest, name: str, flop: float, dtype: str) -> Contest:
        def ours() -> float:
            contest.ours()
            return flop

        reference = products(getattr(torch, dtype))
        return Contest(name, "FLOP/s", ours, reference, f"torch.mm {dtype}", contest.settings)

    plain, best = list(updates())
    yield scaled(plain, "mfu_update", 3 * flop, "float32")
    yield scaled(best, "mfu_update_best", 3 * flop, best_dtype())
    samples = {contest.name: contest for contest in sampling()}
    yield scaled(samples["sample_full"], "mfu_sample", flop, "float32")
    yield scaled(samples["sample_full_best"], "mfu_sample_best", flop, best_dtype())


def processes() -> Iterator[Contest]:
    """What settings of the process do for a gradient step: our commands' allocator, and torch's threads."""
    import torch

    threads = torch.get_num_threads()
    pool = functools.partial(ProcessPoolExecutor, 1, get_context("spawn"), _prepare)
    settings = "float32, gradient steps on a minibatch of W"
    with pool((True, threads)) as ours, pool((False, threads)) as usual, pool((True, 1)) as single:
        for name, other, reference, more in (
            ("allocator", usual, "glibc as it comes", ""),
            ("threads", single, "one thread", f", {threads} threads"),
        ):
            steps, others = (functools.partial(_steps_in, process) for process in (ours, other))
            yield Contest(f"process_{name}", "tokens/s", steps, others, reference, settings + more)


def _prepare(keep: bool, threads: int) -> None:
    import torch

    from textgym.process import keep_freed_memory

    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()


def _steps_in(process: ProcessPoolExecutor) -> float:
    return process.submit(take_steps).result()


def take_steps() -> float:
    """Take gradient steps of a policy that this process keeps; how many tokens they read."""
    return sum(_step()() for _ in range(5))


@functools.cache
def _step() -> Callable[[], float]:
    from benchmarks.workload import gradient_step

    return gradient_step(False)


def starting() -> Iterator[Contest]:
    """Interpreter, import and `gym.make`, in a process of its own."""

    def make() -> float:
        program = "import gymnasium, textgym; gymnasium.make('textgym/IMDB-v0')"
        subprocess.run([sys.executable, "-c", program], check=True)
        return 1.0

    yield Contest("cold_start", "s", make, None, "", "gym.make of IMDB, tokenizer cached")


def throughput(
    only: str | None = None,
    family: Literal["gpt2", "llama"] = "gpt2",
    peers: bool = False,
    rounds: int = 3,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    page: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure, and print a table.

    Args:
        only: Names of figures, or their beginnings, separated by commas; by default all.
        family: The language model of sampling, updates and iterations; with "llama" only these are measured.
        peers: Measure iterations beside TRL's trainers, each in a virtual environment that is made in the cache,
            instead of a plain loop.
        rounds: Runs of each, after one that does not count; the median is taken.
        json_file: Where the figures go, as JSON.
        page: Where the table goes, as Markdown.

    Returns:
        The figures.

    Raises:
        ValueError: `rounds` below 1, `only` names nothing, or `peers` with another family than theirs.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if peers and family != "gpt2":
        raise ValueError(f"peers must be False with family={family!r}: they train a GPT-2")
    wanted = tuple(name.strip() for name in (only or "").split(","))
    kinds: dict[tuple[str, ...], Callable[[], Iterator[Contest]]] = {
        ("sample",): lambda: sampling(family),
        ("update",): lambda: updates(family),
        ("iteration",): lambda: iterations(peers, rounds, family),
    }
    if family == "gpt2":
        kinds = {
            ("env", "cartpole"): environments,
            **kinds,
            ("mfu",): utilisation,
            ("peak_memory",): memory,
            ("process",): processes,
            ("cold_start",): starting,
        }
    console, figures = Console(width=None if sys.stdout.isatty() else 200), []
    for names, kind in kinds.items():
        if any(name.startswith(want) or want.startswith(name) for name in names for want in wanted):
            for contest in kind():
                if family != "gpt2":
                    contest = contest._replace(settings=f"{family}, {contest.settings}")
                if contest.name.startswith(wanted):
                    with console.status(contest.name):
                        figures.append(run(contest, rounds))
    if not figures:
        raise ValueError(f"only must name some of the figures, got {only!r}")
    columns, rows = _table(figures)
    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=column != "settings")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if json_file is not None:
        write(json_file, dump(figures))
    if page is not None:
        write(page, _page(columns, rows, rounds))
    return figures


def _table(figures: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns, of which two are names, and rows of cells."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    columns = ["figure", "reference", "ratio", "ours", "its value", "unit", "settings"]
    rows = [
        [
            figure["name"],
            figure["reference"] or "-",
            number(figure["ratio"], ".2f"),
            number(figure["value"], ",.4g"),
            number(figure["reference_value"], ",.4g"),
            figure["unit"],
            figure["settings"],
        ]
        for figure in figures
    ]
    return columns, rows


def _page(columns: list[str], rows: list[list[str]], rounds: int) -> str:
    """The table in Markdown, with what it was measured on."""
    import torch
    import transformers

    from benchmarks import tables

    note = (
        f"Medians of {rounds} runs of each after one that does not count, ours and the reference in turns, by "
        f"`python benchmarks/throughput.py {shlex.join(sys.argv[1:])}` on {os.cpu_count()} processors "
        f"({torch.backends.cpu.get_cpu_capability()}; bfloat16 {'is' if best_dtype() == 'bfloat16' else 'is not'} "
        f"fast), {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}. A ratio above 1 says that ours is that many times as fast, or as small."
    )
    return f"# Throughput\n\n{tables.Table('Figures', note, columns, rows).markdown()}\n"


def dump(figures: list[dict[str, Any]]) -> str:
    """Figures as JSON."""
    return json.dumps(figures, indent=2) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> None:
    """Read the command line; a wrong argument ends in one line, not in a traceback."""
    from textgym.process import keep_freed_memory

    keep_freed_memory()
    try:
        tyro.cli(throughput)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
