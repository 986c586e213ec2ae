"""What all tests share: quiet pictures, one thread, the same random numbers each time, and the data where it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before anything imports matplotlib, and for subprocesses too.
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each core has a worker: threads of commands that tests run would fight for them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# One thread: sums come out the same on every machine, and small tensors gain nothing from more.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Each test starts from the same seed and leaves no figure open."""
    torch.manual_seed(0)
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture
def double() -> Iterator[None]:
    """Laws are checked in float64: networks, priors and data."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator of the test's own."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def pancreas_path() -> Path:
    """The pancreas data set, or a skip that says where it was looked for."""
    folders = [Path(os.environ["PYRO_VELO_DATA"])] if "PYRO_VELO_DATA" in os.environ else []
    folders.append(ROOT.parent / "shared" / "data")
    for folder in folders:
        if (path := folder / "pancreas.h5ad").exists():
            return path
    pytest.skip(f"pancreas.h5ad is not in {' or '.join(map(str, folders))}; name its folder in PYRO_VELO_DATA.")
