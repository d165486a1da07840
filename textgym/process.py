"""Settings of the whole process that make it faster, for programs to choose; importing textgym changes none."""

from __future__ import annotations

import ctypes
import sys

# Numbers of `mallopt` in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that tensors on the CPU free, instead of giving it back to the system.

    A large tensor is otherwise new memory each time, whose pages the system clears as they are touched
    (docs/performance.md has what that costs). Memory that was used once stays with the process. The commands of this
    project call this; a program of yours may, once, before it works with tensors.

    Returns:
        Whether it was done: only glibc (Linux) can.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)
