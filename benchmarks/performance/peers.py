"""TRL's trainers, each in a virtual environment of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.performance import workload
from textgym.storage import cache_dir

# The version of TRL that is measured for each algorithm; PPO's trainer is no longer in the later one.
PEERS = {"ppo": "1.12.0", "grpo": "1.16.0"}
TORCH = "torch==2.13.0"


@contextlib.contextmanager
def trl(algorithm: str, iterations: int) -> Iterator[Callable[[], float]]:
    """TRL's trainer in a virtual environment, which is made if it is missing, with our threads and allocator.

    Yields:
        A function that runs its next iteration.

    Raises:
        RuntimeError: It ended early.
    """
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
    script = Path(__file__).with_name("trl_peer.py")
    command: list[Any] = [python, script, algorithm, str(iterations), json.dumps(shared)]
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
