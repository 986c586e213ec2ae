"""What the process does with memory that one step has freed and the next one wants."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names for what `mallopt` sets (malloc.h)."""

KEPT = 512 * 2**20
"""Bytes that may stay with the process although they are free: the tensors of a step, several times over."""

SMALL = 32 * 2**20
"""Bytes of the largest block that may be among them; it is also the most that glibc takes."""


@cache
def keep_freed() -> None:
    """Let freed memory up to `KEPT` stay with this process, instead of asking for it anew in every step.

    By itself glibc gives it back wherever some 15 MB lie free at the end of the heap, which a step's tensors do in one
    run and not in another: steps of 225 cells x 2,000 genes then took two fifths longer, for 15,000 page faults each.
    Where there is no glibc, or the environment says how malloc is to be tuned, nothing is changed.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if tuned or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_MMAP_THRESHOLD, SMALL)
