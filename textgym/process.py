"""Settings of the whole process that make it faster; programs choose them, importing textgym changes none."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Numbers of `mallopt` in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed CPU tensors, instead of returning it to the system.

    Otherwise each large tensor gets new memory, whose pages the system clears when they are first used (see
    docs/performance.md for the cost). The process keeps memory that it has used once. The commands of this project call
    this function; your program can, once, before it works with tensors.

    Returns:
        Whether it was done; only glibc (Linux) can do it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)


@contextmanager
def importing() -> Iterator[None]:
    """Do not look for garbage in this block: importing large packages leaves none, and the search takes its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
