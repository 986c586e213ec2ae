"""The command line under `torchrun`: two processes train, one writes, and any end of them is told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pytest
from small import small_adata

from pyro_velo import checkpoint
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data import write_whole

ROOT = Path(__file__).resolve().parent.parent
SEVERAL = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pyro_velo")
ALONE = ("-m", "pyro_velo")
PROMPT = 40.0
"""Seconds in which a run that is stopped has ended: torchrun itself gives processes 30."""

pytestmark = pytest.mark.slow


def start(folder: Path, *arguments: str, by: Sequence[str] = SEVERAL) -> subprocess.Popen[str]:
    """The command line in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *by, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def done(folder: Path, *arguments: str, by: Sequence[str] = SEVERAL) -> str:
    """What it says where it ends well."""
    process = start(folder, *arguments, by=by)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    return out


def ours(err: str) -> list[str]:
    """The lines that are not torchrun's."""
    return [line for line in err.splitlines() if line.startswith("pyro-velo")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With cells to fit."""
    write_whole(small_adata(), tmp_path / "in.h5ad", overwrite=False)
    return tmp_path


FIT = ("fit", "in.h5ad", "--as-is", "--draws", "2", "--batch-size", "18")


@pytest.mark.parametrize(("first", "then"), [(SEVERAL, ALONE), (ALONE, SEVERAL)], ids=["two, one", "one, two"])
def test_a_fit_goes_on_with_another_number_of_processes(folder, first, then):
    said = done(folder, *FIT, "-o", "a.h5ad", "--max-epochs", "6", "--save", "kept", by=first)
    assert said.splitlines() == ["Wrote a.h5ad"]
    before, _ = checkpoint.load(folder / "kept")
    done(folder, *FIT, "-o", "b.h5ad", "--max-epochs", "12", "--resume", "kept", "--save", "after", by=then)
    after, _ = checkpoint.load(folder / "after")
    assert before.epoch == 6 and after.epoch == 12
    assert after.history.train[:6] == before.history.train
    adata = anndata.read_h5ad(folder / "b.h5ad")
    assert np.isfinite(adata.layers[keys.VELOCITY][:, adata.var[keys.VELOCITY_GENES].to_numpy()]).all()
    np.testing.assert_array_equal(adata.uns[keys.UNS]["elbo_history"]["train"], after.history.train)


def test_what_comes_after_the_training_is_done_once(folder):
    """Rates and clock are coupled by the first process, which says so in the posterior that it writes."""
    options = ("--times", "shared", "--rates", "per-gene", "--max-epochs", "30")
    said = done(folder, *FIT, "-o", "out.h5ad", *options, "--report", "out.html")
    assert said.splitlines() == ["Wrote out.h5ad and out.html"]
    assert np.isfinite(anndata.read_h5ad(folder / "out.h5ad").var["fit_gamma_sd"]).any()


def test_the_trainings_of_an_autoencoder_with_clusters_are_those_of_two_processes(folder):
    rng = np.random.default_rng(0)
    mean = rng.gamma(2, 2, (2, 20))
    counts = rng.poisson(mean[np.arange(120) % 2]).astype(np.float32)
    anndata.AnnData(counts).write_h5ad(folder / "counts.h5ad")
    options = "--prune --clusters 3 --latent 2 --max-epochs 40 --save kept".split()
    said = done(folder, "vae", "counts.h5ad", "-o", "out.h5ad", *options)
    assert said.splitlines()[-2:] == ["Choice: 2", "Wrote out.h5ad"]
    # Which of them is which cluster's.
    found = anndata.read_h5ad(folder / "out.h5ad").obs["vae_cluster"].astype(str).to_numpy()
    assert (found[::2] == found[0]).mean() > 0.95 and (found[1::2] == found[1]).mean() > 0.95


@pytest.mark.parametrize(
    ("number", "whom", "line"),
    [
        (signal.SIGKILL, 0, "one has ended"),
        (signal.SIGKILL, 1, "one has ended"),
        (signal.SIGINT, None, "interrupted"),
        (signal.SIGTERM, None, "terminated"),
    ],
)
def test_a_run_that_is_stopped_ends_at_once_with_one_line_and_can_be_gone_on_with(folder, number, whom, line):
    """The signal goes to one of the two, or to torchrun, as Ctrl-C and a scheduler send it."""
    process = start(folder, *FIT, "-o", "out.h5ad", "--max-epochs", "5000", "--save", "kept")
    deadline = time.monotonic() + 150
    while not (folder / "kept" / checkpoint.FILE).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if whom is None else int(children[whom]), number)
    sent = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - sent < PROMPT and process.returncode != 0
    (said,) = ours(err)
    assert line in said and "last checkpoint" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not (folder / "out.h5ad").exists()
    kept, _ = checkpoint.load(folder / "kept")
    more = str(kept.epoch + 1)
    assert (
        done(folder, *FIT, "-o", "out.h5ad", "--max-epochs", more, "--resume", "kept", by=ALONE) == "Wrote out.h5ad\n"
    )
