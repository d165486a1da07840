"""Processes that die at a chosen call to the operating system."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Audit events of what changes files, or asks about them; Python raises one before each such call.
EVENTS = ("open", "os.", "shutil.", "fcntl.", "ctypes.")


@contextmanager
def forked(function: Callable[[], object]) -> Iterator[int]:
    """The id of a process that calls a function and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    yield pid


def dies_at(number: int, function: Callable[[], object]) -> bool:
    """Call a function in a process that is killed before its call to the system of that number; whether it was."""

    def hook(event: str, _: tuple) -> None:
        nonlocal number
        if event.startswith(EVENTS):
            number -= 1
            if number == -1:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        sys.addaudithook(hook)
        function()

    with forked(run) as pid:
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
