"""Two processes train what one trains: the same episodes, gradients, decisions and weights, written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from two_processes import AGENTS, EPISODES, FSDP, RECORDED, ROWS, judge_recorded, learn, make, numbers, weights

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples" / "accelerate"
WHOLE = [name for name in AGENTS if "FSDP" not in name]


def start(launcher, folder, *arguments):
    """Start two processes on the script; their output goes to files."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parent),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "FORCE_COLOR": "1",
    }
    with (folder / "launcher.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, HERE / "two_processes.py", folder, *arguments],
            env=environment,
            stdout=log,
            stderr=log,
        )


def seen(process, folder):
    """What the two processes saw."""
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    logs = [path.read_text() for path in sorted(folder.rglob("*.log"))]
    assert code == 0, "\n".join(logs)
    return [json.loads((folder / f"saw-{index}.json").read_text()) for index in (0, 1)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process and two made of the same: recorded batches, histories, weights."""
    folder = tmp_path_factory.mktemp("processes")
    recorded = {name: judge_recorded(name, folder / f"{name}.pickle") for name in RECORDED}
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = start([*launcher, "--log-dir", folder / "logs", "--redirects", "3"], folder)
    agents = {name: learn(name) for name in WHOLE}
    return folder, recorded, agents, seen(process, folder)


def test_there_are_two_processes(results):
    for saw in results[3]:
        assert (saw["num_processes"], saw["backend"]) == (2, "gloo")


@pytest.mark.parametrize("name", RECORDED)
def test_losses_and_gradients_of_a_recorded_ragged_batch_are_those_of_one_process(name, results):
    folder, recorded, _, two = results
    losses, gradients = recorded[name]
    assert losses["gradient_steps"] == 1
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.01
    for index, saw in enumerate(two):
        assert saw["recorded"][name] == pytest.approx(losses, rel=1e-6)
        of_two = load_file(folder / f"gradients-{name}-{index}.safetensors")
        assert of_two.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(of_two[key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", AGENTS)
def test_iterations_are_those_of_one_process(name, results):
    folder, _, agents, two = results
    agent = agents[name.removesuffix(", FSDP")]
    for saw in two:
        assert saw["pieces"][name] == (1.0 if "FSDP" in name else 0.0)
        assert len(saw["histories"][name]) == 2
        for record, of_one in zip(saw["histories"][name], numbers(agent.history), strict=True):
            if len(agent.env.kept_texts()["keys"]):  # each process keeps its own texts of the guide
                for key in ("guide_tokens", "num_guide_tokens"):
                    assert of_one[key] <= record.pop(key) <= 2 * of_one.pop(key)
            assert record == pytest.approx(of_one, rel=1e-6, abs=1e-9)
    first, second = (load_file(folder / f"weights-{name}-{index}.safetensors") for index in (0, 1))
    own = weights(agent)
    assert own.keys() == first.keys()
    for key, weight in own.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], weight, rtol=1e-9, atol=1e-9)
    # Both of the ends of an iteration are among these.
    assert agents["ppo"].history[-1]["stopped_early"] == 1.0 > agents["rloo"].history[-1]["stopped_early"]


def test_the_guide_is_asked_for_a_text_by_one_process_only(results):
    first, second = (saw["asked"] for saw in results[3])
    assert len({*first, *second}) == len(first) + len(second) == 60 + 22
    assert len(first) == len(second)


@pytest.mark.parametrize("kind", ["whole", "in pieces"])
def test_resuming_equals_never_having_stopped_also_in_one_process(kind, results):
    folder, _, _, two = results
    for saw in two:
        assert saw[kind]["in_pieces"] == (kind == "in pieces")
        assert saw[kind]["resumed"] == saw[kind]["unbroken"]
        assert saw[kind]["same_weights"]
    agent = make("d2lols", {})
    alone = type(agent).load(folder / kind / "best", agent.env, output_dir=None).learn(total_episodes=EPISODES)
    assert numbers(alone.history)[2] == pytest.approx(two[0][kind]["unbroken"][2], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["whole", "in pieces"])
def test_logs_and_checkpoints_are_written_once(kind, results):
    folder, _, _, (first, second) = results
    assert first[kind]["lines"] == [1, 2, 3]
    assert first[kind]["written"] == ["best", "last", "last"]
    assert second[kind]["lines"] == second[kind]["written"] == []
    assert sorted(path.name for path in (folder / kind).iterdir()) == ["best", "history.csv", "last"]
    shown = [path.read_text() for path in sorted((folder / "logs").rglob("stdout.log"))]
    assert "d2lols" in shown[0]
    assert shown[1] == ""


def test_a_callback_of_any_process_stops_all(results):
    assert [saw["stopped_after"] for saw in results[3]] == [1, 1]


def test_what_does_not_go_with_two_processes_is_named(results):
    for saw in results[3]:
        for what, message in saw["refused"].items():
            assert message is not None, what
            assert what in message


def test_rows_of_two_processes_and_of_another_number_are_refused(results):
    folder = results[0]
    agent = make("d2lols", {}, rows=ROWS // 2)
    with pytest.raises(ValueError, match=f"num_envs={ROWS}"):
        type(agent).load(folder / "whole" / "best", agent.env)


@pytest.fixture
def launched(monkeypatch):
    """The environment that `accelerate launch` would give to processes."""

    def read(config):
        environment = {}
        for launcher, prepare in (
            ("multi_gpu_launcher", prepare_multi_gpu_env),
            ("deepspeed_launcher", lambda args: prepare_deepspeed_cmd_env(args)[1]),
        ):
            monkeypatch.setattr(launch, launcher, lambda args, prepare=prepare: environment.update(prepare(args)))
        arguments = [
            "--config_file",
            str(CONFIGS / f"{config}.yaml"),
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ]
        launch.launch_command(launch.launch_command_parser().parse_args([*arguments, "train.py"]))
        return environment

    return read


def test_configurations_are_what_they_say(launched):
    types = {path.stem: load_config_from_file(str(path)).distributed_type.value for path in CONFIGS.iterdir()}
    assert types == {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
    assert launched("ddp")["ACCELERATE_MIXED_PRECISION"] == "no"
    environment = launched("fsdp")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert {name: environment[name] for name in FSDP} == FSDP
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"
    with patch.dict(os.environ, environment):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    with patch.dict(os.environ, launched("deepspeed")):
        assert DeepSpeedPlugin().zero_stage == 2
        with pytest.raises(ValueError, match=r"ppo does not run under DeepSpeed.*fsdp\.yaml"):
            make("ppo", {})


def test_processes_that_would_each_run_alone_or_in_another_precision_are_refused(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="WORLD_SIZE=2"):
            make("ppo", {})
    monkeypatch.setattr(Accelerator, "mixed_precision", "bf16")
    with pytest.raises(ValueError, match="mixed_precision must be 'no', got 'bf16'"):
        make("ppo", {})


@pytest.mark.slow
def test_accelerate_launch_with_a_configuration(results, tmp_path):
    launcher = ["accelerate.commands.launch", "--config_file", CONFIGS / "fsdp.yaml", "--num_processes", "2"]
    for saw in seen(start([*launcher, "--main_process_port", "0"], tmp_path, "rloo"), tmp_path):
        assert saw["num_processes"] == 2
        assert saw["in_pieces"] == 1.0
        for record, of_one in zip(saw["history"], numbers(results[2]["rloo"].history), strict=True):
            assert record == pytest.approx(of_one, rel=1e-6, abs=1e-9)
