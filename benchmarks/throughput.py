"""How fast it is: ``python benchmarks/throughput.py``; each figure beside a reference of the same run."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a file, its folder stands first on the path, where our statistics would hide the standard library's.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

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
        unit: "s" for the time of one run; anything else is work a second.
        ours: Does some work and returns how much.
        reference: The same for the reference; seconds that were measured elsewhere; or None.
        reference_name: What the reference is.
        settings: Type of the arithmetic, trunk and group size, where they matter.
    """

    name: str
    unit: str
    ours: Callable[[], float]
    reference: Callable[[], float] | list[float] | None
    reference_name: str
    settings: str = ""


def run(contest: Contest, rounds: int) -> dict[str, Any]:
    """Measure in turns, after one run of each that does not count; medians.

    Returns:
        "name", "value", "unit", "reference", "reference_value", "ratio" (how many times as fast as the reference), and
        "settings".
    """
    functions = [contest.ours, *([contest.reference] if callable(contest.reference) else [])]
    for function in functions:
        function()
    figures: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, values in zip(functions, figures, strict=True):
            started = time.perf_counter()
            work = function()
            seconds = time.perf_counter() - started
            values.append(seconds if contest.unit == "s" else work / seconds)
    value = median(figures[0])
    measured = contest.reference if isinstance(contest.reference, list) else figures[-1]
    reference = None if contest.reference is None else median(measured)
    ratio = None if reference is None else reference / value if contest.unit == "s" else value / reference
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


def sampling() -> Iterator[Contest]:
    """Tokens of new text, with log-probabilities and values, beside `generate`, which gives neither."""
    import numpy as np
    import torch

    from benchmarks.workload import EOS, EPISODES, NEW, PROMPT, generate, language_model, policy, prompts

    ids = prompts()
    tensor = torch.from_numpy(ids)

    def ours(best: bool, stops: bool) -> Callable[[], float]:
        writer = policy(best, stops)
        seeds = np.random.default_rng(0)

        def sample() -> float:
            observation = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            row_seeds = seeds.integers(2**63, size=EPISODES)
            sampler = writer.sampler(observation, seeds=row_seeds, max_new_tokens=NEW)
            written, lengths = 0, np.zeros(EPISODES, int)
            while len(sampler.rows):
                tokens = sampler.sample().tokens.cpu().numpy()
                lengths[sampler.rows] += 1
                written += len(tokens)
                sampler.keep((tokens != EOS) & (lengths[sampler.rows] < NEW))
            return float(written)

        return sample

    def theirs(stops: bool, dtype: torch.dtype = torch.float32) -> Callable[[], float]:
        model = language_model(stops)

        def sample() -> float:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                new = generate(model, tensor, stops)[:, PROMPT:]
            return float(((new == EOS).cumsum(1) - (new == EOS).long() == 0).sum())

        return sample

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

    from textgym.packing import fast_dtype

    return str(fast_dtype(torch.device("cpu"))).removeprefix("torch.")


def trainer(name: str, best: bool = False, **hyperparameters: Any) -> Any:
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
        policy(best),
        environment(guided=name in ("ppo++", "aggrevated"), best=best),
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


def updates() -> Iterator[Contest]:
    """One epoch of PPO's gradient steps, in tokens of whole texts, prompts included."""
    import torch

    from benchmarks.workload import EPISODES, NEW, PROMPT, PlainTrainer

    def ours(best: bool) -> Callable[[], float]:
        agent = trainer("ppo", best)
        agent.n_epochs = 1
        rollout = agent.play()
        credit = agent.credit(rollout, agent.reference_log_probs(rollout))

        def update() -> float:
            agent.update(rollout, credit)
            return float(EPISODES * (PROMPT + NEW))

        return update

    plain = PlainTrainer()
    texts = torch.cat([plain.ids, plain.ids[:, :NEW]], 1)
    with torch.no_grad():
        log_probs, _, values = plain.judge(plain.model, texts)

    def theirs() -> float:
        plain.update(texts, log_probs, log_probs, values, 1)
        return float(EPISODES * (PROMPT + NEW))

    name = "full logits, padded passes, AdamW, float32"
    yield Contest("update", "tokens/s", ours(False), theirs, name, "float32, shared trunk")
    yield Contest("update_best", "tokens/s", ours(True), theirs, name, f"{best_dtype()}, compiled, shared trunk")


def iterations(peers: bool, rounds: int) -> Iterator[Contest]:
    """Whole iterations: sampling, reference policy, and 16 gradient steps."""
    from benchmarks.workload import GROUP, PlainTrainer

    for algorithm, group in (("ppo", 1), ("grpo", GROUP)):
        if peers:
            reference: Any = trl(algorithm, rounds)
            version = f"TRL {PEERS[algorithm]} float32"
            reference_name = f"{version}, separate critic" if algorithm == "ppo" else version
        else:
            plain = PlainTrainer(group)

            def reference(plain: PlainTrainer = plain) -> float:
                plain.iterate()
                return 1.0

            reference_name = "plain loop float32" + (", shared trunk" if algorithm == "ppo" else "")
        trunk = "shared trunk" if algorithm == "ppo" else f"groups of {group}"
        variants = {
            "": (trainer(algorithm), f"float32, {trunk}"),
            "_best": (trainer(algorithm, best=True), f"{best_dtype()}, compiled, {trunk}"),
        }
        if algorithm == "ppo":
            variants["_separate_critic"] = (trainer("ppo", critic="separate"), "float32, separate critic")
        for suffix, (agent, settings) in variants.items():
            name = f"iteration_{algorithm}{suffix}"
            yield Contest(name, "s", iteration(agent), reference, reference_name, settings)

    for name, algorithm in (("plus_plus", "ppo++"), ("aggrevated", "aggrevated")):
        agent, ppo = iteration(trainer(algorithm)), iteration(trainer("ppo"))
        full_name = f"iteration_ppo_{name}" if name == "plus_plus" else f"iteration_{name}"
        yield Contest(full_name, "s", agent, ppo, "iteration_ppo", "float32, shared trunk, guide of the same size")


def trl(algorithm: str, rounds: int) -> list[float]:
    """Seconds of TRL's iterations, in an environment of its own that is made here, with our threads and allocator."""
    import torch

    from benchmarks import workload
    from textgym.data.sources import cache_dir

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
    command: list[Any] = [
        python,
        "-P",
        Path(__file__).with_name("trl_peer.py"),
        algorithm,
        str(rounds),
        json.dumps(shared),
    ]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **threads}).stdout
    return json.loads(output.splitlines()[-1])


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


def starting() -> Iterator[Contest]:
    """Interpreter, import and `gym.make`, in a process of its own."""

    def make() -> float:
        program = "import gymnasium, textgym; gymnasium.make('textgym/IMDB-v0')"
        subprocess.run([sys.executable, "-c", program], check=True)
        return 1.0

    yield Contest("cold_start", "s", make, None, "", "gym.make of IMDB, tokenizer cached")


def throughput(
    only: str | None = None, peers: bool = False, rounds: int = 3, json_file: Path | None = None
) -> list[dict[str, Any]]:
    """Measure, and print a table.

    Args:
        only: Names of figures, or their beginnings, separated by commas; by default all.
        peers: Measure iterations beside TRL's trainers, each in a virtual environment that is made in the cache,
            instead of a plain loop. They run in processes of their own, before ours.
        rounds: Runs of each, after one that does not count; the median is taken.
        json_file: Where the figures go.

    Returns:
        The figures.

    Raises:
        ValueError: `rounds` below 1, or `only` names nothing.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    wanted = tuple(name.strip() for name in (only or "").split(","))
    kinds: dict[tuple[str, ...], Callable[[], Iterator[Contest]]] = {
        ("env", "cartpole"): environments,
        ("sample",): sampling,
        ("update",): updates,
        ("iteration",): lambda: iterations(peers, rounds),
        ("mfu",): utilisation,
        ("cold_start",): starting,
    }
    console, figures = Console(), []
    for names, kind in kinds.items():
        if any(name.startswith(want) or want.startswith(name) for name in names for want in wanted):
            for contest in kind():
                if contest.name.startswith(wanted):
                    with console.status(contest.name):
                        figures.append(run(contest, rounds))
    if not figures:
        raise ValueError(f"only must name some of the figures, got {only!r}")
    table = Table("name", "value", "unit", "times the reference", "reference", "its value", "settings")
    for figure in figures:
        ratio, value = figure["ratio"], figure["reference_value"]
        table.add_row(
            figure["name"],
            f"{figure['value']:,.4g}",
            figure["unit"],
            "" if ratio is None else f"{ratio:.2f}",
            figure["reference"],
            "" if value is None else f"{value:,.4g}",
            figure["settings"],
        )
    console.print(table)
    if json_file is not None:
        temporary = json_file.with_name(f".{json_file.name}")
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
        temporary.replace(json_file)
    return figures


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
