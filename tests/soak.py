"""A profile whose processes meet failures at random: they are killed, the disk is full, the guide does not answer.

The environment variable SOAK is the folder in which they do; without it nothing fails. SOAK_ONLY names a kind of
failure that comes alone, ten times as often. Every failure leaves a line in `FAILURES` there. A process that imports
this without SOAK, and was not started for a run, meets no kill and no full disk.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from dataclasses import replace
from multiprocessing import current_process
from pathlib import Path

from plugins import LONG, WORDS

from benchmarks.profiles import Row
from textgym.guides.base import Completion

FAILURES = "failures.txt"
# Probabilities at a call to the system that changes something in the folder, and at a request to the guide.
CHANCES = {"killed": 1 / 300, "full": 1 / 200, "silent": 1 / 12}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
random_number = random.SystemRandom().random


def fails(how: str) -> bool:
    """Draw whether something fails."""
    # Read when they are needed: processes of runs import this before they have the environment of their run.
    folder, only = (os.environ.get(name) for name in ("SOAK", "SOAK_ONLY"))
    chance = CHANCES[how] if only is None else 10 * CHANCES[how] * (how == only)
    if not folder or random_number() > chance:
        return False
    with Path(folder, FAILURES).open("a") as file:
        file.write(how + "\n")
    return True


def hook(event: str, arguments: tuple) -> None:
    """Kill the process, or raise what a full disk raises, before a call that writes."""
    if event == "open":
        path, _, flags = arguments
        changes = isinstance(flags, int) and flags & WRITES
    else:
        path = arguments[0] if arguments else None
        changes = event in ("os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree")
    folder = os.environ.get("SOAK", "nowhere")
    if not changes or FAILURES in str(path) or not str(path).startswith(folder):
        return
    if fails("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if event in ("open", "os.rename", "os.mkdir") and fails("full"):
        raise OSError(28, "No space left on device", str(path))


class Guide:
    """Writes the same for the same request, or nothing."""

    author, can_hand_off, fingerprint = 1, True, "soak"

    def complete(self, requests, tokenizer):
        if fails("silent"):
            raise ConnectionError("the guide does not answer")
        return [Completion(text=(" red sun", " moon")[len(request.prompt) % 2]) for request in requests]


# A process of a run reads what it is to do, this module with it, before it has a parent or its environment.
if "SOAK" in os.environ or getattr(current_process(), "_inheriting", False):
    sys.addaudithook(hook)
ROWS = {"sl": WORDS.rows["sl"], "ppo": WORDS.rows["ppo"], "ppo++": Row("ppo++", {"beta": 1.0}, {"guide": Guide()})}
PROFILE = replace(
    LONG, tasks={"words": replace(LONG.tasks["words"], rows=ROWS, episodes=8 * 12)}, default=("sl", "ppo", "ppo++")
)
