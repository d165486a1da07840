"""Profiles of hard problems: budgets in tokens, start models, guides of environments, distillation and after it."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from plugins import LOCKS
from test_schedule import numbers

from agents import CausalLMPolicy
from agents.environments import make_env
from agents.supervised import SL, rewards_of
from benchmarks.comparison.cost import cost, parameters
from benchmarks.comparison.jobs import Run, resolve
from benchmarks.comparison.results import append_result, read_results
from benchmarks.comparison.runner import Benchmark
from benchmarks.comparison.warm_start import initial_model, load_policy
from benchmarks.profiles import Row, algorithm_class, load_profile
from benchmarks.profiles.frontier import FRONTIER, GUIDE
from benchmarks.report.write import write_report

LOCK = LOCKS.tasks["lock"]
SIZE = LOCK.rl["episodes_per_iteration"]


class Killed(BaseException):
    """What ends a run in a test."""


def run(out, row, killed_after=None):
    """A run in this process, and its record; it is killed after so many iterations, or when it reports this."""
    reports = 0

    def report(what, share):
        nonlocal reports
        reports += what.startswith(("loss", "reward"))
        if killed_after in (reports, what):
            raise Killed

    append_result(out, Benchmark(LOCKS, None, None, out).run(Run("lock", row, 0), report))
    return read_results(out)[-1]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of all rows, which share a warm start with all other tests here."""
    folder = tmp_path_factory.mktemp("chains")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTGYM_CACHE", str(folder / "cache"))
        (folder / "runs").mkdir()
        for row in LOCKS.rows:
            run(folder / "runs", row)
        yield folder / "runs"


@pytest.fixture(scope="module")
def records(out):
    return {record["algo"]: record for record in read_results(out)}


def test_runs_end_with_the_iteration_that_uses_up_their_tokens(records):
    longest = SIZE * LOCK.env["length"]
    for name in ("grpo", "ppo++", "distill-grpo"):
        record = records[name]
        used = [entry["num_timesteps"] + entry["num_guide_tokens"] for entry in record["history"]]
        assert used[-2] < LOCK.tokens <= used[-1] < LOCK.tokens + longest
        assert used == sorted(used)
        assert record["policy_tokens"] + record["guide_tokens"] == used[-1]
        assert record["hyperparameters"]["tokens"] == LOCK.tokens
        assert "episodes" not in record["hyperparameters"]
    assert records["grpo"]["guide_tokens"] == 0 < records["ppo++"]["guide_tokens"]


def test_distillation_counts_what_the_guide_wrote_and_follows_its_own_schedule(records):
    record = records["distill"]
    first, last = record["history"][0], record["history"][-1]
    texts = 2 * (256 + SL.eval_prompts)  # of the lock's 256 rows, and of as many validation prompts
    assert record["guide_tokens"] == texts * LOCK.env["length"]
    assert record["policy_tokens"] == 0 < first["policy_tokens"]
    assert 0 < first["kept_fraction"] < 0.5
    assert last["epoch"] == pytest.approx(2)
    chosen = record["hyperparameters"]
    assert (chosen["targets"], chosen["min_reward"], chosen["start"]) == ("guide", 1.0, "start_model")
    assert chosen["learning_rate"] == LOCK.supervised["learning_rate"]  # what it shares is supervised learning's
    assert "kl_coef" not in chosen


def test_a_chain_is_distillation_and_then_the_algorithm_from_there(records, out, monkeypatch):
    alone, chain = records["distill"], records["distill-grpo"]
    stages = [[entry for entry in chain["history"] if entry["stage"] == stage] for stage in (1, 2)]
    assert len(stages[0]) + len(stages[1]) == len(chain["history"])
    for entry, same in zip(stages[0], alone["history"], strict=True):
        assert {name: value for name, value in entry.items() if name not in ("stage", "seconds")} == {
            name: value for name, value in same.items() if name != "seconds"
        }
    assert [entry["iteration"] for entry in chain["history"]] == list(range(1, len(chain["history"]) + 1))
    assert stages[1][0]["num_episodes"] == stages[0][-1]["num_episodes"] + SIZE
    assert chain["guide_tokens"] == alone["guide_tokens"]
    after = chain["hyperparameters"]["after"]
    assert (after["algorithm"], after["targets"], after["n_epochs"]) == ("sl", "guide", 2)
    assert chain["hyperparameters"]["kl_coef"] == 0.01

    # The policy that comes out of the first stage is where the second starts, and its reference.
    benchmark = Benchmark(LOCKS, None, None, out)
    start = benchmark.warm_start("lock", lambda *_: None)
    begun, begin = [], benchmark.begin

    def noted(*arguments):
        algorithm = begin(*arguments)
        begun.append((algorithm, algorithm.policy.model.state_dict()["lm_head.weight"].clone()))
        return algorithm

    monkeypatch.setattr(benchmark, "begin", noted)
    monkeypatch.setattr(benchmark, "folder", lambda _: out.parent / "again")
    benchmark.train(Run("lock", "distill-grpo", 0), start, 0, lambda *_: None)
    (first, raw), (second, trained) = begun
    assert torch.equal(raw, load_policy(start.start_model, "float32").model.lm_head.weight)
    assert torch.equal(trained, first.policy.model.lm_head.weight)
    assert torch.equal(trained, second.reference.model.lm_head.weight)
    assert not torch.equal(trained, raw)


@pytest.mark.parametrize(("iterations", "begun"), [(2, ["-before"]), (8, ["", "-before"])], ids=["first", "second"])
def test_a_chain_that_is_killed_in_a_stage_goes_on_and_ends_with_the_same_record(records, tmp_path, iterations, begun):
    with pytest.raises(Killed):
        run(tmp_path, "distill-grpo", killed_after=iterations)
    folders = sorted(path.name for path in tmp_path.iterdir() if (path / "last" / "training").is_dir())
    assert folders == [f"lock-distill-grpo-0{stage}" for stage in begun]
    assert numbers(run(tmp_path, "distill-grpo")) == numbers(records["distill-grpo"])


def test_a_run_that_is_killed_when_training_is_over_shows_its_last_episodes(records, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, "ppo++", killed_after="evaluation")
    assert numbers(run(tmp_path, "ppo++")) == numbers(records["ppo++"])


def test_the_guide_is_the_environments_own_and_tests_are_without(records, out):
    benchmark = Benchmark(LOCKS, None, None, out)
    start = benchmark.warm_start("lock", lambda *_: None)
    for row in ("ppo++", "distill"):
        assert "guide" not in benchmark.guided_env(benchmark.jobs["lock", row], start)
    own = replace(benchmark.jobs["lock", "ppo++"], row=Row("ppo++", {"beta": 1.0}, env={"guide": "scripted"}))
    assert benchmark.guided_env(own, start)["guide"] == "scripted"
    for record in records.values():
        assert record["evaluation"]["guide_tokens"] == 0
        assert all(author == "policy" for text in record["samples"] for author, _ in text["segments"])
    assert any(author == "guide" for text in records["ppo++"]["rollouts"] for author, _ in text["segments"])


def test_a_row_can_be_the_start_model_which_has_learned_easier_problems(records, out):
    record = records["start"]
    assert (record["history"], record["episodes"], record["policy_tokens"], record["seconds"]) == ([], 0, 0, 0)
    assert record["hyperparameters"]["start"] == "start_model"
    assert record["hyperparameters"]["start_model"]["env"] == {"length": 2}
    assert np.mean([len(text["segments"][0][1].split()) for text in record["samples"]]) < 4
    start = Benchmark(LOCKS, None, None, out).warm_start("lock", lambda *_: None)
    policy = load_policy(start.start_model, "float32")
    assert policy.model.config.model_type == "llama"
    assert policy.model.config.max_position_embeddings == 1 + LOCK.env["length"]
    assert policy.prompt_columns == 1


def test_tasks_that_differ_after_the_start_model_share_it(out, tmp_path):
    other = replace(LOCK, supervised={**LOCK.supervised, "learning_rate": 1e-3})
    both = Benchmark(replace(LOCKS, tasks={"lock": LOCK, "other": other}), None, None, tmp_path)
    lock, again = (both.warm_start(task, lambda *_: None) for task in ("lock", "other"))
    assert lock.start_model == again.start_model
    assert json.loads((Path(lock.start_model).parent / "recipe.json").read_text())["task"] == "lock"
    assert lock.supervised != again.supervised


def test_a_chain_needs_tokens_for_its_second_stage(tmp_path):
    short = replace(LOCKS, tasks={"lock": replace(LOCK, tokens=1000)})
    benchmark = Benchmark(short, None, None, tmp_path)
    with pytest.raises(ValueError, match="tokens must be more than the 4096 written before grpo: 1000"):
        benchmark.run(Run("lock", "distill-grpo", 0), lambda *_: None)


def test_the_cost_of_a_budget_in_tokens_is_at_most_an_iteration_more(records, out):
    benchmark = Benchmark(LOCKS, None, None, out)
    estimates = {row: cost(benchmark.jobs["lock", row]) for row in LOCKS.rows}
    assert estimates["grpo"].tokens <= LOCK.tokens + SIZE * LOCK.env["length"]
    for row, record in records.items():
        assert estimates[row].tokens >= record["policy_tokens"] + record["guide_tokens"]
    assert estimates["start"].tokens == 0 < estimates["start"].flop
    start = load_policy(benchmark.warm_start("lock", lambda *_: None).start_model, "float32").model
    assert parameters(benchmark.jobs["lock", "start"], 1 + LOCK.env["length"], 6) == start.num_parameters()


def test_records_have_pass_at_k_and_successes_per_prompt(records):
    for record in records.values():
        assert record["pass_at"].keys() == {"1", "4"}
        evaluation, n = record["evaluation"], record["hyperparameters"]["test_samples"]
        successes = np.array(evaluation["successes"])
        assert (n, evaluation["texts_per_prompt"], successes.shape) == (6, 6, (32,))
        assert (np.array(evaluation["rewards"]) <= successes).all()
        assert record["pass_at"]["1"] == pytest.approx(successes.mean() / n)
        # The share of the sets of four texts in which one succeeds
        fails = np.array([comb(n - count, 4) / comb(n, 4) for count in successes])
        assert record["pass_at"]["4"] == pytest.approx(1 - fails.mean())
    assert 0 < records["distill"]["pass_at"]["1"] < records["distill"]["pass_at"]["4"]


def test_the_report_has_every_row_with_pass_at_1_and_the_largest_k(out, records):
    table = write_report(out).table
    header, _, *rows = table[table.index("| task") :].splitlines()
    columns = [name.strip() for name in header.split("|")]
    row = next(line.split("|") for line in rows if " distill " in line)
    for k in ("1", "4"):
        assert float(row[columns.index(f"pass@{k}")]) == pytest.approx(records["distill"]["pass_at"][k], abs=6e-4)
    never = [count == 0 for count in records["start"]["evaluation"]["successes"]]
    now = [
        count > 0
        for count, unsolved in zip(records["distill"]["evaluation"]["successes"], never, strict=True)
        if unsolved
    ]
    assert float(row[columns.index("newly solved")]) == pytest.approx(np.mean(now), abs=6e-4)
    results = table[: table.index("**Across tasks")]
    assert [line.split("|")[2].strip() for line in results.splitlines() if line.startswith("| lock")] == LOCKS.rows


def test_every_row_of_the_frontier_can_begin():
    """With its own arguments, in an environment of its task with few problems, from a small start model."""
    profile = load_profile("frontier")
    begun = []
    for (name, _), job in resolve(profile, None, {}).items():
        settings = job.row, job.before and job.before.row, {**job.task.env, "guide_accuracy": None}
        if settings in begun:  # half-way's tasks have most of them in common
            continue
        begun.append(settings)
        count = 128 if name.startswith("half-way") else 16  # of whose texts one in 64 can be learned
        small = {"train_problems": count, "test_problems": count}
        shape = replace(job.task.language_model, n_embd=16, n_layer=1, n_head=2)
        for stage in filter(None, (job.before, job if job.row.trains else None)):
            env = make_env(job.task.env_id, num_envs=8, **{**job.task.env, **small, **stage.row.env})
            arguments = {**stage.arguments, "minibatch_size": 8}
            if stage.row.algorithm != "sl":
                arguments["episodes_per_iteration"] = 8
            policy = CausalLMPolicy(initial_model(env, shape, 0), env.tokenizer)
            algorithm_class(stage.row.algorithm)(policy, env, **arguments)


@pytest.mark.parametrize("task", FRONTIER.tasks.values(), ids=FRONTIER.tasks)
def test_guides_of_the_frontier_succeed_and_those_that_starts_imitate_do_not(task):
    def worth(**arguments):
        env = make_env(task.env_id, num_envs=1, **{**task.env, **arguments, "train_problems": 256})
        written = env.guide_texts(range(256), 0)
        return np.asarray(rewards_of(env, list(enumerate(written))))

    if "guide_links" in task.rows["distill"].env:  # a guide that begins well
        assert 0.002 < np.mean(worth(**task.rows["distill"].env)) < 0.05
        return
    good = worth(**GUIDE)
    assert set(good) == ({0.5, 1.0} if task.env.get("fork") else {1.0})
    assert np.mean(good == 1.0) > 0.15
    assert np.mean(worth() == 1.0) < 0.03
