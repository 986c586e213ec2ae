"""Freed memory that the next step wants stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")

SCRIPT = """
import ctypes, resource, torch
from pyro_velo.memory import M_TRIM_THRESHOLD, keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(1_800_000) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# What glibc itself does in some runs and not in others.
ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**17)
faults()
given_back = faults()
keep_freed()
faults()
print(given_back, faults())
"""


def faults(**environment: str) -> tuple[int, int]:
    """Page faults of ten rounds that each want and free 29 MB, before and after `keep_freed`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    return before, after


def test_rounds_of_the_same_tensors_ask_for_their_memory_once() -> None:
    before, after = faults()
    assert before > 10_000 and after < 200


def test_what_the_environment_says_of_malloc_is_left_alone() -> None:
    before, after = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert before > 10_000 and after > 10_000
