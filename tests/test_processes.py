"""Several processes: the step of one, the same parameters in all, and an end that is told when one of them dies."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import several_jobs as jobs
import torch
from pyro.infer import Trace_ELBO
from small import GUIDE, differing, small_adata, small_fit

import pyro_velo as pv
from pyro_velo import checkpoint, processes
from pyro_velo.batch import Cells
from pyro_velo.data import write_whole
from pyro_velo.processes import ALONE, Noise, Team, joined
from pyro_velo.train import per_cell

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every job of two processes left."""
    folder = tmp_path_factory.mktemp("processes")
    checkpoint.save(jobs.kept_fit()[1][3], folder / "one")
    write_whole(small_adata(), folder / "small.h5ad", overwrite=False)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "several_jobs.py"), str(folder)], cwd=ROOT, capture_output=True,
        text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """The results of each of two processes."""
    assert json.loads((folder / "codes.json").read_text())["laws"][0] == [0, 0], (folder / "laws.txt").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


# One step


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """The gradients of one process."""
    return {name: jobs.gradients(*each) for name, each in jobs.EQUAL.items()}


@pytest.mark.parametrize("name", jobs.EQUAL)
def test_two_processes_step_as_one_does(both, alone, name):
    """Each element of a gradient is that of one process within 1e-5 of the largest of its parameter."""
    one, (two, other) = alone[name], (each["gradients"][name] for each in both)
    assert len(one["steps"]) == len(two["steps"]) > 1
    for whole, here, there in zip(one["steps"], two["steps"], other["steps"], strict=True):
        for gradient, mine, theirs in zip(whole, here, there, strict=True):
            assert torch.equal(mine, theirs)
            largest = float(gradient.abs().max())
            torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-5 * largest)
    assert two["loss"] == other["loss"]
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-6)


@pytest.mark.parametrize("name", ["velocity", "VAE"])
def test_a_floor_under_the_kl_holds_some_dimensions_up_and_not_others(alone, name):
    """Else the law of above would say nothing of it: by loss, and by the encoder's gradients that are not zero."""
    free, floored = alone[name], alone[f"{name}, a floor under the KL"]
    assert floored["loss"][0] < free["loss"][0]
    differ = [not torch.allclose(a, b) for one, other in zip(free["steps"], floored["steps"], strict=True)
              for a, b in zip(one, other, strict=True)]  # fmt: skip
    assert 0 < sum(differ) < len(differ)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_loss_of_a_batch_is_the_weighted_sum_of_its_shares(double, size):
    """And not their mean."""
    # Built here, so that its priors are in float64 too.
    model, index = pv.VelocityModel(n_latent=2, hidden=(8,)), torch.arange(jobs.N_CELLS)
    shares = [Team(rank, size).share(index) for rank in range(size)]
    assert torch.equal(torch.cat(shares), index)
    assert {len(share) for share in shares} == {jobs.N_CELLS // size, jobs.N_CELLS // size + 1}
    with pyro.get_param_store().scope(), torch.no_grad():
        cells = jobs.few_cells()
        cells = Cells(cells.molecules.double(), torch.as_tensor(cells.ratio).double())
        program = model.build(cells)
        known = jobs.Known(GUIDE(program))
        scored = [per_cell(program, len(cells)), per_cell(known, len(cells))]
        loss, *losses = (Trace_ELBO().loss(*scored, cells.batch(part)) for part in (index, *shares))
    weighted = sum(len(share) / len(index) * each for share, each in zip(shares, losses, strict=True))
    assert weighted == pytest.approx(loss, rel=1e-12)
    assert abs(sum(losses) / size - loss) > 1e-3 * abs(loss)


# Noise


def test_genes_draw_what_they_draw_in_one_process_and_cells_of_each_process_their_own(both):
    one, (here, there) = jobs.draws(), (each["draws"] for each in both)
    for mine, theirs in zip(here["alpha"], there["alpha"], strict=True):
        assert torch.equal(mine, theirs)
    # What is drawn before any cell is.
    assert torch.equal(here["alpha"][0], one["alpha"][0])
    z = torch.cat([torch.cat(each["z"]).flatten() for each in (here, there)])
    assert len(z.unique()) == len(z) == 2 * sum(len(each) for each in one["z"])
    assert abs(float(z.mean())) < 4 / math.sqrt(len(z)) and 0.7 < float(z.std()) < 1.3


def test_a_step_can_be_drawn_again():
    noise = Noise(Team(1, 2), 5, torch.device("cpu"))
    start = noise.position()

    def drawn():
        with noise:
            gene = pyro.sample("gene", dist.Normal(0.0, 1.0))
            with pyro.plate("cells", 4):
                return gene, pyro.sample("cell", dist.Normal(0.0, 1.0))

    first, second = drawn(), drawn()
    noise.back_to(start)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_alone_noise_is_that_of_the_seed():
    with Noise(ALONE, 5, torch.device("cpu")), pyro.plate("cells", 4):
        drawn = pyro.sample("cell", dist.Normal(0.0, 1.0))
    torch.manual_seed(5)
    assert torch.equal(drawn, dist.Normal(0.0, 1.0).sample((4,)))


# A whole fit


def test_both_processes_end_with_the_same_fit_to_the_bit_and_one_alone_saves(both):
    assert differing(both[0]["fit"], both[1]["fit"]) == []
    assert [each["saved"] for each in both] == [8, 0]
    assert len(both[0]["fit"].history.epoch) == 8


def test_a_look_at_held_out_cells_is_the_same_however_many_look(both):
    one = jobs.looks()
    assert one[0] != one[1]
    for each in both:
        np.testing.assert_allclose(each["looks"], one, rtol=1e-12)


def test_two_processes_fit_as_well_as_one(both):
    one, two = small_fit().training.history, both[0]["fit"].history
    gained = one.held_out[-1] - one.held_out[0]
    assert abs(two.held_out[-1] - one.held_out[-1]) < 0.2 * gained


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, without which nothing is recorded")
def test_two_processes_that_record_their_steps_find_what_they_find_plain(both):
    plain, (here, there) = both[0]["fit"].history, (each["recorded"] for each in both)
    assert differing(here, there) == []
    assert here.history.train == pytest.approx(plain.train, rel=1e-4)
    assert here.history.held_out == pytest.approx(plain.held_out, rel=1e-4)


# Going on


def test_two_processes_that_stop_go_on_as_if_they_had_not(both):
    for each in both:
        assert differing(each["from two"], each["fit"]) == []


def test_two_processes_go_on_from_one(folder, both):
    kept, _ = checkpoint.load(folder / "one")
    assert differing(both[0]["from one"], both[1]["from one"]) == []
    goes_on_well(kept, both[0]["from one"])


def test_one_process_goes_on_from_two(folder):
    kept, _ = checkpoint.load(folder / "two")
    goes_on_well(kept, small_fit(resume=kept).training)


def goes_on_well(kept, after):
    """From the very state: what was noted of the epochs before stays, and the fit gets better."""
    assert kept.epoch == 4 and after.epoch == 8
    for name, column in vars(after.history).items():
        if name != "terms":
            assert column[:4] == getattr(kept.history, name)
    assert after.plateau.best > kept.plateau.best
    steps = {state["state"][0]["step"] for state in after.optimizer.values()}
    assert steps == {8 * 3}


# What can't be


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan", r"step \d+, the data \(site 'molecules'\), gene number 3\. Look at"),
        ("nan, a floor under the KL", r"step \d+, the data \(site 'molecules'\), gene number 3\. Look at"),
        ("drifted", "Expected parameters to be the same in all 2 processes; .* in number 1. Give all"),
        ("small", "a cell or more of every batch for each of 2 processes; got batches of 1. Use larger"),
        ("renyi", "Expected one of Trace_ELBO, .* got RenyiELBO. Use one of them, or one process"),
        ("other", "Expected what is trained to be the same in all 2 processes; .* in number 1. Give all"),
    ],
)
def test_all_processes_say_the_same_of_what_can_not_be(both, name, said):
    """The NaN is in a cell that one of them has."""
    assert both[0]["errors"][name] == both[1]["errors"][name]
    assert re.search(said, both[0]["errors"][name]), both[0]["errors"][name]


def test_without_torchrun_nothing_is_joined(monkeypatch):
    # As clusters set it for purposes of their own.
    monkeypatch.setenv("WORLD_SIZE", "8")
    with joined() as team:
        assert team is ALONE is processes.team()
    assert not torch.distributed.is_initialized()


def test_a_process_that_torchrun_starts_alone_is_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with joined() as team:
        assert team is ALONE
    processes.dismiss()


# The end


def said(folder: Path, scene: str) -> list[str]:
    """The lines of ours that two processes say together."""
    return [line for line in (folder / f"{scene}.txt").read_text().splitlines() if line.startswith("pyro-velo")]


def test_a_process_that_dies_ends_the_run_with_one_line_and_leaves_the_checkpoint(folder):
    codes, seconds = json.loads((folder / "codes.json").read_text())["death"]
    assert codes == [1, -signal.SIGKILL]
    (line,) = said(folder, "death")
    assert "one has ended, or was not heard of for 600 s." in line and "last checkpoint" in line
    # By then it had trained and looked; ten minutes is what a process waits for one that is there and says nothing.
    assert seconds < 60
    assert not (folder / "out.h5ad").exists()
    kept, _ = checkpoint.load(folder / "kept")
    assert 1 <= kept.epoch < 20


def test_a_process_that_says_nothing_is_not_waited_for_any_longer_than_it_is_told(folder):
    codes, _ = json.loads((folder / "codes.json").read_text())["silence"]
    text, seconds = json.loads((folder / "silence.txt").read_text().splitlines()[0])
    assert codes == [0, 0] and 1.9 < seconds < 5
    assert "one has ended, or was not heard of for 2 s." in text


@pytest.mark.parametrize(
    ("scene", "line"),
    [
        ("another command", "Expected one of fit, vae with several processes; got simulate. Run it without torchrun."),
        ("a missing file", "nowhere.h5ad"),
    ],
)
def test_bad_use_is_told_once(folder, scene, line):
    codes, _ = json.loads((folder / "codes.json").read_text())[scene]
    assert codes == [2, 2]
    (told,) = said(folder, scene)
    assert line in told and not (folder / "never.h5ad").exists()
