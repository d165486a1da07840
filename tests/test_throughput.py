"""The benchmark of speed compares like with like, and says what it measured."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import throughput
from benchmarks.performance import environments, measurement, peers, processes, scaling, training, workload
from benchmarks.performance.measurement import Measurement, measure
from textgym.process import importing, keep_freed_memory


@pytest.fixture
def small(monkeypatch):
    """A model that takes no time, and few episodes; nothing is compiled."""
    monkeypatch.setattr(workload, "SIZE", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256})
    monkeypatch.setattr(workload, "EPISODES", 16)
    monkeypatch.setattr(workload, "MINIBATCH", 8)
    monkeypatch.setattr(workload, "EPOCHS", 1)
    monkeypatch.setattr(workload.texts, "__defaults__", (16, *workload.texts.__defaults__[1:]))
    monkeypatch.setattr("agents.policy.language_model.compile_layers", lambda model: None)
    monkeypatch.setattr(environments, "EPISODES", {1: 2, 16: 1})
    monkeypatch.setattr(training, "MATRIX", 64)


@pytest.fixture
def short(small, monkeypatch):
    """Completions of a few tokens."""
    monkeypatch.setattr(workload, "NEW", 6)
    for function in (workload.policy, workload.generate):
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], 6))
    monkeypatch.setattr(scaling.measurements, "__defaults__", (4, 6))


@pytest.mark.parametrize(
    ("unit", "ours", "theirs", "value"),
    [("s", (2, 1), (6, 1), 2), ("MiB", (2, 12), (2, 36), 12), ("tokens/s", (2, 12), (2, 4), 6)],
)
def test_ours_and_the_reference_take_turns_and_a_ratio_above_one_is_better(monkeypatch, unit, ours, theirs, value):
    clock, order = [0.0], []

    def worker(name, seconds, amount):
        def work():
            clock[0] += seconds if name in order else 100  # the first run is the warm-up
            order.append(name)
            return amount

        return work

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: clock[0])
    pair = Measurement("it", unit, worker("ours", *ours), worker("theirs", *theirs), "them", "so")
    assert measure(pair, rounds=3) == {
        "name": "it",
        "value": value,
        "unit": unit,
        "reference": "them",
        "reference_value": value * 3 if unit in ("s", "MiB") else value / 3,
        "ratio": pytest.approx(3),
        "settings": "so",
    }
    assert order == ["ours", "theirs"] * 4


def test_figures_are_printed_and_written(short, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--only", "sample"])
    only = "env_vector_1,cartpole_vector_1,sample,update,iteration,mfu_update"
    figures = throughput.throughput(only, rounds=1, json_file=tmp_path / "it.json", page=tmp_path / "it.md")
    names = [figure["name"] for figure in figures]
    assert {"env_vector_1", "env_vector_16", "sample_full", "sample_early_stop_best", "update_best"} < {*names}
    assert {"iteration_ppo_separate_critic", "iteration_grpo_best", "iteration_ppo_plus_plus"} < {*names}
    assert {"iteration_aggrevated", "mfu_update"} < {*names}
    assert len({*names}) == len(names)
    assert json.loads((tmp_path / "it.json").read_text()) == figures
    for figure in figures:
        keys = {"name", "value", "unit", "reference", "reference_value", "ratio", "settings"}
        assert figure.keys() == keys
        assert figure["value"] > 0
    page = (tmp_path / "it.md").read_text()
    assert all(f"| {name} " in page for name in names)
    assert "`python benchmarks/throughput.py --only sample`" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.json", "it.md"]
    assert "iteration_aggrevated" in capsys.readouterr().out


def test_a_llama_is_measured_where_a_model_is(short):
    figures = throughput.throughput("env_single,sample_full,update,mfu", "llama", rounds=1)
    assert {figure["name"].split("_")[0] for figure in figures} == {"sample", "update"}
    assert {figure["settings"].split(",")[0] for figure in figures} == {"llama"}
    agent = training.trainer("ppo++", family="llama")
    assert agent.policy.model.config.model_type == agent.env.guide._model.config.model_type == "llama"
    training.iteration(agent)()


WRONG = [{"only": "nothing"}, {"rounds": 0}, {"peers": True, "family": "llama"}, {"only": "mfu", "family": "llama"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        throughput.throughput(**wrong)


FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])


def test_the_llama_has_the_parameters_of_the_gpt2_but_for_positions_and_shared_heads():
    gpt2, llama = (workload.language_model(family=family) for family in ("gpt2", "llama"))
    assert gpt2.config.hidden_size == llama.config.hidden_size
    assert (llama.config.num_attention_heads, llama.config.num_key_value_heads) == (4, 1)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (gpt2, llama)]
    assert 0.8 < counts[1] / counts[0] < 1


@FAMILIES
def test_the_plain_loop_judges_as_the_policy_does(small, family):
    plain, policy = workload.PlainTrainer(family=family), workload.policy(best=False, family=family)
    ids = torch.from_numpy(workload.texts(4, workload.NEW))
    columns = torch.arange(workload.PROMPT, ids.shape[1]).expand(4, -1)
    torch.nn.init.zeros_(plain.value_head.weight)
    torch.nn.init.zeros_(plain.value_head.bias)
    judged = policy.evaluate_actions(ids, torch.ones_like(ids), columns)
    for ours, theirs in zip(
        (judged.log_probs, judged.entropy, judged.values), plain.judge(plain.model, ids), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@FAMILIES
def test_early_stops_are_geometric_for_both(small, family):
    ids = workload.texts(400)
    expected = sum((1 - workload.STOP_PROB) ** k for k in range(workload.NEW))
    assert expected == pytest.approx(16, abs=0.2)
    ours = workload.sample(workload.policy(best=False, stops=True, family=family), ids, workload.NEW, seed=0) / 400
    model = workload.language_model(stops=True, family=family)
    theirs = workload.written(workload.generate(model, torch.from_numpy(ids), stops=True)[:, workload.PROMPT :]) / 400
    assert ours == pytest.approx(expected, abs=2)
    assert theirs == pytest.approx(expected, abs=2)


def test_useful_operations_are_those_that_torch_counts(small):
    model, length = workload.language_model(), 70
    model.set_attn_implementation("eager")  # torch does not count in its own kernel
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.from_numpy(workload.texts(1, length - workload.PROMPT)))
    # torch counts the attention of a token to those after it too.
    future = 2 * 4 * 16 * (length**2 - length * (length + 1) / 2)
    assert workload.text_flop(length, length, **workload.SIZE) + future == counter.get_total_flops()


@pytest.mark.parametrize("dies", [False, True])
def test_a_peer_is_asked_for_each_iteration_and_its_death_is_told(tmp_path, monkeypatch, dies):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path))
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: None)  # nothing is installed
    python = tmp_path / "peers" / f"trl-{peers.PEERS['ppo']}" / "bin" / "python"
    python.parent.mkdir(parents=True)
    then = "echo out of luck >&2; exit 1" if dies else f"echo x >> {tmp_path}/iterations; echo done"
    python.write_text(f"#!/bin/sh\nwhile read line; do {then}; done\n")
    python.chmod(0o755)
    with peers.trl("ppo", 3) as iterate:
        if dies:
            with pytest.raises(RuntimeError, match=r"TRL .* ended early(.|\n)*out of luck"):
                iterate()
        else:
            assert iterate() == iterate() == 1.0
            assert (tmp_path / "iterations").read_text() == "x\nx\n"


def test_memory_of_a_step_is_measured_in_a_process_of_its_own():
    pairs = {pair.name: pair for pair in processes.memory()}
    assert pairs.keys() == {"peak_memory", "peak_memory_50k"}
    plain = pairs["peak_memory"].reference()
    # The plain step holds the whole block of logits several times over.
    assert plain > 3 * 28 * 112 * 4096 * 4 / 2**20
    assert pairs["peak_memory"].ours() < plain


def test_scaling_is_measured_and_drawn(short, tmp_path, monkeypatch):
    sweeps = {
        "texts": [{"rows": rows, "vocab_size": 64} for rows in (2, 4)],
        "parameters": [{"n_embd": width, "vocab_size": 64} for width in (16, 32)],
    }
    monkeypatch.setattr(scaling, "SWEEPS", sweeps)
    scaling.main(rounds=1, out=tmp_path / "docs" / "scaling.png")
    figures = json.loads((tmp_path / "docs" / "scaling.json").read_text())
    assert [(figure["sweep"], figure["name"]) for figure in figures[:4]] == [
        ("texts", name) for name in ("sample", "step", "sample_best", "step_best")
    ]
    parameters = [figure["x"] for figure in figures if figure["sweep"] == "parameters"]
    assert parameters[0] < parameters[-1]
    assert (tmp_path / "docs" / "scaling.png").stat().st_size > 10_000


def test_kept_memory_is_not_cleared_again():
    if not keep_freed_memory():
        pytest.skip("only glibc keeps memory on demand")
    program = """
import resource, sys
import numpy as np
from textgym.process import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, usual = (
        int(subprocess.run([sys.executable, "-c", program, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "no")
    )
    assert kept < usual / 4


def test_garbage_is_looked_for_after_imports_as_before():
    try:
        for change in (gc.disable, gc.enable):
            change()
            before = gc.isenabled()
            with importing():
                assert not gc.isenabled()
            assert gc.isenabled() == before
    finally:
        gc.enable()
