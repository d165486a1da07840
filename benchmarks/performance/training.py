"""Speed of sampling, gradient steps and whole iterations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from agents import ALGORITHMS
from agents.group import GroupPolicyGradient
from benchmarks.performance import workload
from benchmarks.performance.measurement import Measurement
from benchmarks.performance.peers import PEERS, trl
from textgym.precision import fast_dtype

MATRIX = 2048  # the width of the matrices of `torch.mm`


def sampling(family: str = "gpt2") -> Iterator[Measurement]:
    """Sampling of tokens with log-probabilities and values, beside `generate`, which returns neither."""
    ids = workload.texts()
    seeds = itertools.count()

    def ours(best: bool, stops: bool) -> Callable[[], float]:
        writer = workload.policy(best, stops, family=family)
        return lambda: workload.sample(writer, ids, workload.NEW, next(seeds))

    def theirs(stops: bool, dtype: torch.dtype = torch.float32) -> Callable[[], float]:
        model = workload.language_model(stops, family)

        def write() -> float:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return workload.written(workload.generate(model, torch.from_numpy(ids), stops)[:, workload.PROMPT :])

        return write

    for name, stops in (("sample_full", False), ("sample_early_stop", True)):
        yield Measurement(name, "tokens/s", ours(False, stops), theirs(stops), "generate float32", "float32")
        best = ours(True, stops)
        settings = f"{best_dtype()}, compiled"
        yield Measurement(f"{name}_best", "tokens/s", best, theirs(stops), "generate float32", settings)
        if best_dtype() == "bfloat16":
            same = theirs(stops, torch.bfloat16)
            yield Measurement(f"{name}_best_same_dtype", "tokens/s", best, same, "generate bfloat16", settings)


def best_dtype() -> str:
    """The precision of the fastest settings."""
    return str(fast_dtype(torch.device("cpu"))).removeprefix("torch.")


def trainer(name: str, best: bool = False, family: str = "gpt2", **hyperparameters: Any) -> Any:
    """An algorithm on the workload."""
    grouped = issubclass(ALGORITHMS[name], GroupPolicyGradient)
    return ALGORITHMS[name](
        workload.policy(best, family=family),
        workload.environment(guided=name in ("ppo++", "aggrevated"), best=best, family=family),
        episodes_per_iteration=workload.EPISODES,
        minibatch_size=workload.MINIBATCH,
        n_epochs=workload.EPOCHS,
        learning_rate=workload.LEARNING_RATE,
        kl_coef=workload.KL_COEF,
        clip_range=workload.CLIP,
        **({"group_size": workload.GROUP} if grouped else {}),
        **hyperparameters,
    )


def iteration(agent: Any) -> Callable[[], float]:
    """A function that runs the next iteration of an algorithm."""

    def iterate() -> float:
        agent.learn(total_episodes=agent.episodes_per_iteration)
        return 1.0

    return iterate


def updates(family: str = "gpt2") -> Iterator[Measurement]:
    """One epoch of PPO's gradient steps, in tokens of prompts and completions."""

    def ours(best: bool) -> Callable[[], float]:
        agent = trainer("ppo", best, family)
        agent.n_epochs = 1
        rollout = agent.play()
        credit = agent.credit(rollout, agent.reference_log_probs(rollout))

        def update() -> float:
            agent.update(rollout, credit)
            return float(workload.EPISODES * (workload.PROMPT + workload.NEW))

        return update

    plain = workload.PlainTrainer(family=family)
    ids = torch.from_numpy(workload.texts(new=workload.NEW))
    with torch.no_grad():
        log_probs, _, values = plain.judge(plain.model, ids)

    def theirs() -> float:
        plain.update(ids, log_probs, log_probs, values, 1)
        return float(workload.EPISODES * (workload.PROMPT + workload.NEW))

    name = "full logits, padded passes, AdamW, float32"
    yield Measurement("update", "tokens/s", ours(False), theirs, name, "float32, shared trunk")
    yield Measurement("update_best", "tokens/s", ours(True), theirs, name, f"{best_dtype()}, compiled, shared trunk")


def iterations(peers: bool, rounds: int, family: str = "gpt2") -> Iterator[Measurement]:
    """Whole iterations: sampling, reference policy, and 16 gradient steps."""
    for algorithm, group in (("ppo", 1), ("grpo", workload.GROUP)):
        trunk = "shared trunk" if algorithm == "ppo" else f"groups of {group}"
        variants = {
            "": (trainer(algorithm, family=family), f"float32, {trunk}"),
            "_best": (trainer(algorithm, best=True, family=family), f"{best_dtype()}, compiled, {trunk}"),
        }
        if algorithm == "ppo":
            separate = trainer("ppo", family=family, critic="separate")
            variants["_separate_critic"] = separate, "float32, separate critic"
        for suffix, (agent, settings) in variants.items():
            name = f"iteration_{algorithm}{suffix}"
            if peers:
                reference_name = f"TRL {PEERS[algorithm]} float32" + (", separate critic" if algorithm == "ppo" else "")
                with trl(algorithm, rounds + 1) as reference:
                    yield Measurement(name, "s", iteration(agent), reference, reference_name, settings)
            else:
                reference_name = "plain loop float32" + (", shared trunk" if algorithm == "ppo" else "")
                plain = workload.PlainTrainer(group, family=family).iterate
                yield Measurement(name, "s", iteration(agent), plain, reference_name, settings)

    for name, algorithm in (("plus_plus", "ppo++"), ("aggrevated", "aggrevated")):
        agent, ppo = iteration(trainer(algorithm, family=family)), iteration(trainer("ppo", family=family))
        full_name = f"iteration_ppo_{name}" if name == "plus_plus" else f"iteration_{name}"
        yield Measurement(full_name, "s", agent, ppo, "iteration_ppo", "float32, shared trunk, guide of the same size")


def utilisation() -> Iterator[Measurement]:
    """Floating-point operations per second, counting the least that the workload needs, beside those of `torch.mm`."""
    flop = workload.EPISODES * workload.text_flop(workload.PROMPT + workload.NEW - 1, workload.NEW, **workload.SIZE)

    def products(dtype: torch.dtype) -> Callable[[], float]:
        left, right = torch.randn(2, MATRIX, MATRIX).to(dtype)

        def multiply() -> float:
            for _ in range(10):
                torch.mm(left, right)
            return 10 * 2 * MATRIX**3

        return multiply

    def scaled(contest: Measurement, name: str, flop: float, dtype: str) -> Measurement:
        def ours() -> float:
            contest.ours()
            return flop

        reference = products(getattr(torch, dtype))
        return Measurement(name, "FLOP/s", ours, reference, f"torch.mm {dtype}", contest.settings)

    plain, best = list(updates())
    yield scaled(plain, "mfu_update", 3 * flop, "float32")
    yield scaled(best, "mfu_update_best", 3 * flop, best_dtype())
    samples = {contest.name: contest for contest in sampling()}
    yield scaled(samples["sample_full"], "mfu_sample", flop, "float32")
    yield scaled(samples["sample_full_best"], "mfu_sample_best", flop, best_dtype())
