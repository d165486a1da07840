"""Runs in processes of their own: from outside, several at a time, killed and gone on with, dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import plugins
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import agents
import textgym
from agents import CausalLMPolicy
from benchmarks import run_all
from benchmarks.comparison import schedule
from benchmarks.comparison.jobs import Run
from benchmarks.comparison.results import read_results
from benchmarks.comparison.runner import Benchmark
from benchmarks.profiles import Row, accepted, load_profile, row_of
from benchmarks.report.write import write_report
from textgym.models import load_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def micro(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "runs"


def numbers(record):
    """What two runs of the same thing have in common: all but times and the clock."""
    history = [{key: value for key, value in entry.items() if "seconds" not in key} for entry in record["history"]]
    evaluation = {key: value for key, value in record["evaluation"].items() if key != "seconds"}
    left_out = ("seconds", "finished", "history", "evaluation", "threads")
    rest = {key: value for key, value in record.items() if key not in left_out}
    return {**rest, "history": history, "evaluation": evaluation}


def test_algorithms_from_outside_enter_with_one_flag_and_run_beside_ours(micro, capsys):
    outside = ["plugins:Mine", "plugins:STRONGER", "examples.raft:RAFT"]
    assert run_all.run_all(profile="plugins:MICRO", algos="ppo", algo=outside, out=micro) == 0
    records = {record["algo"]: record for record in read_results(micro)}
    assert list(records) == ["ppo", "mine", "plugins.STRONGER", "raft"]
    # The profile's arguments reach what its constructor takes, through all its bases, and the row's own come on top.
    assert records["mine"]["history"][-1]["learning_rate"] == pytest.approx(1e-4)
    assert records["plugins.STRONGER"]["history"][-1]["learning_rate"] == pytest.approx(2e-4)
    assert records["mine"]["hyperparameters"]["algorithm"] == "plugins:Mine"
    assert records["mine"]["hyperparameters"]["eval_every"] == 1
    ours, mine = (numbers(records[name]) for name in ("ppo", "mine"))
    for entry in (ours, mine):
        for name in ("algo", "place", "hyperparameters"):
            del entry[name]
    assert ours == mine
    assert all(record["episodes"] == 16 for record in records.values())
    page = (micro / "report.html").read_text()
    assert "raft" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_baselines3:PPO", "sb3_contrib:MaskablePPO", "stable_baselines3:DQN"])
def test_algorithms_of_stable_baselines3_enter_the_same_way(micro, name):
    assert run_all.run_all(profile="plugins:MICRO", algos="sl", algo=[name], out=micro) == 0
    start, record = read_results(micro)
    assert record["algo"] == name.replace(":", ".")
    assert record["episodes"] >= 16
    assert record["evaluation"]["sample_ids"] == start["evaluation"]["sample_ids"]
    assert record["hyperparameters"]["episodes_per_iteration"] == 8
    assert {"reward", "num_timesteps", "seconds"} <= record["history"][-1].keys()


def test_a_registered_algorithm_is_one_of_ours(micro, monkeypatch):
    monkeypatch.setattr(agents, "_registered", {})
    assert agents.register(plugins.Mine) is plugins.Mine
    assert agents.ALGORITHMS["mine"] is plugins.Mine
    assert run_all.run_all(profile="plugins:MICRO", algos="mine", out=micro) == 0
    assert [record["algo"] for record in read_results(micro)] == ["mine"]
    with pytest.raises(ValueError, match="name of its own, got 'ppo'"):
        agents.register(type("Other", (), {"name": "ppo"}))
    with pytest.raises(ValueError, match="name, got None"):
        agents.register(object)


def test_an_algorithm_with_nothing_of_ours_enters_too(micro, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    chosen = {"profile": "plugins:MICRO", "algos": "sl", "algo": ["plugins:Plain"], "out": micro}
    assert run_all.run_all(**chosen, dry_run=True) == 0
    assert "words plugins.Plain seed 0" in capsys.readouterr().out
    assert run_all.run_all(**chosen) == 0
    start, record = read_results(micro)
    assert (record["algo"], record["episodes"]) == ("plugins.Plain", 16)
    assert record["evaluation"]["rewards"] == start["evaluation"]["rewards"]  # it has learned nothing
    assert "plugins.Plain" in (micro / "report.html").read_text()


def test_a_registered_name_is_known_to_profiles_in_every_process(micro):
    script = micro.parent / "script.py"
    script.write_text(
        "from dataclasses import replace\n"
        "import agents, plugins\n"
        "from benchmarks.profiles import Row\n"
        "from benchmarks.run_all import run_all\n"
        "agents.register(plugins.Mine)\n"
        "task = replace(plugins.WORDS, rows={'sl': Row('sl'), 'twice': Row('mine', {'strength': 2.0})})\n"
        "PROFILE = replace(plugins.MICRO, tasks={'words': task}, default=('sl', 'twice'))\n"
        "if __name__ == '__main__':\n"
        f"    raise SystemExit(run_all(profile='script:PROFILE', out={str(micro)!r}))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["hyperparameters"]["algorithm"] for record in read_results(micro)] == ["sl", "mine"]


def test_several_runs_at_a_time_give_the_same_numbers(micro):
    for jobs in (1, 3):
        arguments = {"profile": "plugins:MICRO", "algos": "sl,ppo,ppo++,rloo"}
        assert run_all.run_all(**arguments, jobs=jobs, out=micro / str(jobs)) == 0
    one, three = ({record["algo"]: numbers(record) for record in read_results(micro / str(jobs))} for jobs in (1, 3))
    assert one.keys() == {"sl", "ppo", "ppo++", "rloo"}
    assert one == three


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(micro):
    broken, whole = micro / "broken", micro / "whole"
    command = [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "--profile", "plugins:LONG", "--algos", "ppo++"]
    process = subprocess.Popen(
        [*command, "--out", str(broken)], cwd=Path(__file__).parent, stdout=subprocess.PIPE, start_new_session=True
    )
    state = broken / "words-ppo++-0" / "last" / "training" / "state.pt"
    waited = time.monotonic()
    while not state.exists():
        assert process.poll() is None
        assert time.monotonic() - waited < 120
        time.sleep(0.02)
    process.kill()
    process.wait()
    # The run's own process ends with it.
    waited = time.monotonic()
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() - waited < 60
        time.sleep(0.1)
    assert read_results(broken) == []

    for out in (broken, whole):  # each run is a process of its own here too
        assert run_all.run_all(profile="plugins:LONG", algos="ppo++", out=out) == 0
    went_on, unbroken = read_results(broken)[0], read_results(whole)[0]
    assert len(unbroken["history"]) == 24
    assert numbers(went_on) == numbers(unbroken)
    # A finished run keeps its policies, without what training would need.
    for checkpoint in ("last", "best"):
        folder = broken / "words-ppo++-0" / checkpoint
        assert not (folder / "training").exists()
        load_model(folder)
        CausalLMPolicy.from_pretrained(folder)


def test_ctrl_c_and_a_request_to_end_end_all_in_one_line(micro):
    command = [sys.executable, str(ROOT / "benchmarks" / "run_all.py"), "--profile", "plugins:LONG", "--algos"]
    command += ["ppo++,ppo", "--jobs", "2", "--out", str(micro)]
    state = micro / "words-ppo++-0" / "last" / "training" / "state.pt"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True, **pipes) as process:
            begun = time.time()
            while not (state.exists() and state.stat().st_mtime > begun):
                assert process.poll() is None
                assert time.time() - begun < 120
                time.sleep(0.02)
            os.killpg(process.pid, number)  # as a terminal does, and batch systems do
            printed, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert errors == (
            f"ended by {number.name}: 0 of 2 runs are done; the same command with --out {micro} goes on\n"
        )
        assert "Traceback" not in printed
        assert not list(micro.rglob("traceback.txt"))
        while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
            assert time.time() - begun < 150
            time.sleep(0.1)


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(micro):
    benchmark = Benchmark(load_profile("plugins:MICRO"), None, None, micro)
    run = next(iter(plugins.MICRO.tasks))
    folder = micro / f"{run}-ppo-0"
    (folder / "last" / "training").mkdir(parents=True)
    (folder / "last" / "policy.json").touch()
    (folder / "settings.json").write_text(json.dumps({"profile": "another"}))
    assert run_all.run_all(profile="plugins:MICRO", algos="ppo", out=micro) == 1
    assert "runs of the same ['profile'," in (folder / "traceback.txt").read_text()
    (folder / "settings.json").write_text('{"profile": ')
    assert run_all.run_all(profile="plugins:MICRO", algos="ppo", out=micro) == 1
    assert "settings.json is damaged or was written by something else" in (folder / "traceback.txt").read_text()
    assert not benchmark.finished


def test_runs_from_another_warm_start_do_not_join(micro, monkeypatch, capsys):
    assert run_all.run_all(profile="plugins:MICRO", algos="sl", out=micro) == 0
    (record,) = read_results(micro)
    record["fingerprints"]["supervised"] = "another"
    (micro / "results.jsonl").write_text(json.dumps(record) + "\n")
    assert run_all.run_all(profile="plugins:MICRO", algos="ppo", out=micro) == 1
    assert "runs on words have other ['supervised']" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["test", "reward"])
def test_runs_that_were_judged_by_something_else_do_not_join(micro, capsys, name):
    assert run_all.run_all(profile="plugins:MICRO", algos="sl", out=micro) == 0
    (record,) = read_results(micro)
    record["fingerprints"][name] = "another"
    (micro / "results.jsonl").write_text(json.dumps(record) + "\n")
    assert run_all.run_all(profile="plugins:MICRO", algos="best-of-2", out=micro) == 1
    assert f"runs on words have other ['{name}']" in capsys.readouterr().out
    assert read_results(micro) == [record]


def test_a_record_that_cannot_be_written_fails_its_run_alone(micro, capsys):
    assert run_all.run_all(profile="plugins:MICRO", algos="sl", algo=["plugins:Unfinite"], jobs=2, out=micro) == 1
    assert "record of words, unfinite cannot be written" in capsys.readouterr().out
    assert [record["algo"] for record in read_results(micro)] == ["sl"]
    assert "cannot be written" in (micro / "words-unfinite-0" / "traceback.txt").read_text()


def test_what_another_process_finished_meanwhile_is_not_run_again(micro):
    late = Benchmark(load_profile("plugins:MICRO"), None, None, micro)
    assert run_all.run_all(profile="plugins:MICRO", algos="sl", out=micro) == 0

    def ignored(*_):
        pytest.fail("a finished run was run again")

    hears = {"started": ignored, "report": ignored, "finished": ignored}
    assert schedule.run_all(late, [Run("words", "sl", 0)], jobs=1, **hears) == {}
    assert len(read_results(micro)) == 1


def test_a_process_that_dies_is_told_and_the_others_go_on(micro, capsys):
    assert run_all.run_all(profile="plugins:MICRO", algos="sl", algo=["plugins:Dies"], out=micro) == 1
    assert "words dies seed 0 failed:\nthe process died with exit code 3" in capsys.readouterr().out
    assert [record["algo"] for record in read_results(micro)] == ["sl"]


def test_a_task_that_has_ended_is_shown_before_the_others(micro, capsys):
    assert run_all.run_all(profile="plugins:TWO_TASKS", algos="sl", out=micro) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 runs, 1 at a time: sl on words, again, with 1 seed.")
    told = [printed.index(text) for text in ("words sl seed 0: test", "**Results.**", "again sl seed 0: test")]
    assert told == sorted(told)
    assert "again" not in printed[told[1] : printed.index("again warm start: started")]
    assert printed.count("**Results.**") == 2  # and that of both


def test_a_folder_is_of_one_process_at_a_time(micro):
    from filelock import FileLock

    micro.mkdir()
    with FileLock(micro / ".lock"), pytest.raises(ValueError, match="no other process writes results to"):
        run_all.run_all(profile="plugins:MICRO", algos="sl", out=micro)


def test_a_dry_run_prints_every_run_and_makes_nothing(micro, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run_all.run_all(profile="quick", algos="all", seeds=2, dry_run=True, out=micro) == 0
    printed = capsys.readouterr().out
    for task, profile in load_profile("quick").tasks.items():
        for algo in profile.rows:
            assert all(f"{task} {algo} seed {seed} " in printed for seed in (0, 1))
    assert f"{64 * 24 * 48:,}" in printed  # new tokens of IMDB's episodes
    assert not micro.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"out": "FILE"}, "out must be a folder, or one that can be made, got '{folder}/file'"),
        ({"out": "FILE/below"}, "out must be a folder, or one that can be made, got '{folder}/file/below'"),
        ({"source": "nowhere"}, "source must be 'mini', 'hub' or a folder that exists, got 'nowhere'"),
        ({"base": "./nowhere"}, "base must be the hub id or folder of a model, got './nowhere'"),
        ({"base": "{folder}"}, "base must be the hub id or folder of a model, got '{folder}'"),
        ({"encoder": "./nowhere"}, "encoder must be the hub id or folder of a model, got './nowhere'"),
        ({"name": "../elsewhere"}, "name must be at most 100 printable characters without /"),
        ({"track": ["wandbb"]}, "track must be None, trackers, or some of .*, got .'wandbb'.$"),
        ({"track": ["wandb"]}, "track needs the packages of its trackers, and those of wandb are not installed"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_cannot_be_run_is_refused_before_anything_is_made(micro, monkeypatch, given, message, dry_run):
    monkeypatch.setattr("accelerate.utils.imports.is_wandb_available", lambda: False)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr("agents.processes.get_available_trackers", lambda: ["tensorboard"])
    folder = micro.parent
    (folder / "file").touch()
    known = {"FILE": str(folder / "file"), "{folder}": str(folder)}
    for part, path in known.items():
        given = {key: value.replace(part, path) if isinstance(value, str) else value for key, value in given.items()}
    arguments = {"profile": "plugins:MICRO", "out": micro, "dry_run": dry_run, **given}
    arguments["out"] = Path(arguments["out"])
    with pytest.raises((ValueError, ImportError), match=message.replace("{folder}", str(folder))):
        run_all.run_all(**arguments)
    assert [path.name for path in folder.iterdir()] == ["file"]


NO_NAMES = (
    "",
    ".",
    "..",
    "../up",
    "a/b",
    "/etc",
    "a\\b",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    ".hidden",
    "x" * 101,
    5,
    None,
)


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_leads_out_of_its_folder_is_refused(name):
    words = plugins.WORDS
    with pytest.raises(ValueError, match="the name of a task must be at most 100 printable characters without /"):
        replace(plugins.MICRO, tasks={name: words})
    with pytest.raises(ValueError, match="the name of a row must be"):
        plugins.MICRO.with_rows({name: Row("ppo")})
    with pytest.raises(ValueError, match="the name of a profile must be"):
        replace(plugins.MICRO, name=name)
    with pytest.raises(ValueError, match="name must be"):
        textgym.Task(name, [{"a": "b"}], "{a}", "a", 4, 4, lambda **_: [])


def test_runs_that_would_share_a_folder_are_refused():
    task = replace(plugins.WORDS, rows={"c": Row("ppo"), "b-c": Row("ppo")})
    with pytest.raises(ValueError, match=r"must have names that differ also when joined, got \['a-b-c'\] twice"):
        replace(plugins.MICRO, tasks={"a-b": task, "a": task}, default=("c",))


def test_names_are_shown_and_not_obeyed(micro, monkeypatch, capsys):
    name, words = "sl [red]|`x` :smile:", plugins.WORDS
    profile = replace(plugins.MICRO, tasks={"words[bold]": replace(words, rows={name: Row("sl")})}, default=(name,))
    monkeypatch.setattr("benchmarks.profiles.load_profile", lambda _: profile)
    monkeypatch.setenv("COLUMNS", "200")
    for dry_run in (True, False):
        assert run_all.run_all(out=micro, dry_run=dry_run) == 0
        assert f"words[bold] {name} seed 0" in capsys.readouterr().out
    (record,) = read_results(micro)
    record["algo"] = "\x1b[2J\x1b]0;title\x07 [a](http://x) <b>"  # from somewhere else
    (micro / "results.jsonl").write_text(json.dumps(record) + "\n")
    table = write_report(micro).table
    assert r"| \\x1b[2J\\x1b]0;title\\x07 [a]\(http:\//x) \<b> |" in table
    assert table.isascii()
    assert table.replace("\n", "").isprintable()


def test_a_progress_bar_shows_a_name_as_it_is(make_env, make_policy, monkeypatch):
    monkeypatch.setattr(plugins.Mine, "name", "mine[/]")
    agent = plugins.Mine(make_policy(), make_env(8), episodes_per_iteration=8, n_epochs=1)
    assert agent.learn(total_episodes=8, progress_bar=True).iteration == 1


def test_tracked_runs_leave_a_log(micro):
    assert run_all.run_all(profile="plugins:MICRO", algos="ppo", track=["tensorboard"], out=micro) == 0
    assert list((micro / "words-ppo-0").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ppo", "must have the form package.module:name"),
        ("nowhere.at.all:Algo", "must name something that can be imported"),
        ("plugins:Nothing", "must name something that can be imported"),
        ("plugins:MICRO", "must be a class with the method learn"),
    ],
)
def test_what_is_no_algorithm_is_refused(micro, path, message):
    with pytest.raises(ValueError, match=message):
        run_all.run_all(algo=[path], out=micro)


def test_arguments_reach_the_constructor_that_names_them():
    assert accepted(plugins.Mine, {"strength": 1, "gamma": 0.9, "output_dir": "x", "unknown": 2}) == {
        "strength": 1,
        "gamma": 0.9,
        "output_dir": "x",
    }
    assert row_of("plugins:STRONGER") == ("plugins.STRONGER", plugins.STRONGER)
    assert row_of(plugins.Mine) == ("mine", Row("plugins:Mine"))


def tiny(kind, tokenizer, folder):
    """A tiny random model of a published class, as a folder."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    shape = {**size, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    models = {
        "imdb": lambda: GPT2LMHeadModel(GPT2Config(**shape)),
        "commongen": lambda: T5ForConditionalGeneration(
            T5Config(**size, **t5, pad_token_id=1, decoder_start_token_id=1)
        ),
        "tldr": lambda: GPTJForCausalLM(GPTJConfig(**shape, rotary_dim=4)),
    }
    models[kind]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imdb", "commongen", "tldr"])
def test_the_published_profile_runs_with_tiny_models_of_its_classes(micro, monkeypatch, encoder, name):
    task = load_profile("paper").tasks[name]
    env = gym.make_vec(task.env_id, num_envs=1, source="mini").unwrapped
    base = str(micro / "base")
    tiny(name, env.tokenizer, base)
    small = replace(
        task,
        base=base,
        policy={key: value for key, value in task.policy.items() if key != "quantization"},
        supervised={**task.supervised, "n_epochs": 0.01},
        episodes=16,
        rl={**task.rl, "episodes_per_iteration": 8, "minibatch_size": 4, "eval_prompts": 8},
        env={"max_prompt_tokens": 48, "max_new_tokens": 8},
        decoding={**task.decoding, "min_new_tokens": 4},
        test_prompts=8,
    )
    monkeypatch.setattr(
        "benchmarks.profiles.load_profile",
        lambda _: replace(load_profile("paper"), source="mini", tasks={name: small}),
    )
    out = micro / "out"
    assert run_all.run_all(profile="tiny", algos="sl,ppo++,d2lols", encoder=encoder, out=out) == 0
    records = read_results(out)
    assert len(records) == 3
    for record in records:
        assert record["hyperparameters"]["start_model"] == base
        assert np.isfinite(record["final_reward"])
        assert ("perplexity" in record["metrics"]) == (name != "commongen")
        assert ("bert_score_f1" in record["metrics"]) == (name != "imdb")
    # The adapters of the published TL;DR model are all that its checkpoints hold.
    assert (out / f"{name}-ppo++-0" / "last" / "adapter_model.safetensors").exists() == (name == "tldr")
