"""What several processes run in their tests: every job on every process, its results to one file each.

`python several_jobs.py FOLDER` makes pairs of processes, with the environment that `torchrun` gives them, by forks of
one that has imported everything. The tests call the same jobs in a process of their own, to compare.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo
from pyro import poutine
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributed import TCPStore

import pyro_velo as pv
import pyro_velo.api
from pyro_velo import checkpoint, cli, compiled, processes, recorded, train
from pyro_velo.batch import Cells
from pyro_velo.errors import FitError, InputError
from pyro_velo.profiles import Profiles
from pyro_velo.train import Fitted, Training, TrainSettings

sys.path.insert(0, str(Path(__file__).parent))
from small import GUIDE, MODEL, settings, small_cells, small_fit

N_CELLS, N_GENES = 11, 5
STILL = {"learning_rate": 1e-30, "max_epochs": 1, "held_out": 0.0}
"""At these settings parameters stay where they are, so that gradients of all steps are at the same ones."""


class Fixed(Messenger):
    """Every draw of a Normal is one that is known: of a cell's by its number, of a gene's by the site."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index = index

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if msg["is_observed"] or not isinstance(fn, torch.distributions.Normal):
            return
        generator = torch.Generator().manual_seed(sum(map(ord, msg["name"])))
        if any(frame.name == "cells" for frame in msg["cond_indep_stack"]):
            noise = torch.randn(N_CELLS, *fn.loc.shape[1:], generator=generator)[self.index]
        else:
            noise = torch.randn(fn.loc.shape, generator=generator)
        msg["value"] = fn.loc + fn.scale * noise


class Known(nn.Module):
    """A guide whose draws are `Fixed`."""

    def __init__(self, guide: nn.Module) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, batch: Any) -> None:
        with Fixed(batch.index):
            self.guide(batch)


def few_cells() -> Cells:
    """Of two molecules each."""
    return small_cells(N_CELLS, N_GENES)


def profiles() -> Profiles:
    """Counts of two kinds of cells."""
    generator = torch.Generator().manual_seed(3)
    rate = 5 * torch.rand(2, N_GENES, generator=generator)
    return Profiles.of_counts(torch.poisson(rate[torch.arange(N_CELLS) % 2], generator=generator))


VAE = pv.VAE(n_latent=2, hidden=(8,))
GMVAE = pv.GMVAE(n_clusters=2, n_latent=2, hidden=(8,))
SHARED = pv.VelocityModel(n_latent=2, hidden=(8,), times=pv.times.Shared())
PROGRAMS: dict[str, tuple[Any, Any, Callable[[], Any], ELBO]] = {
    "velocity": (MODEL, GUIDE, few_cells, Trace_ELBO()),
    "shared": (SHARED, pv.guides.Amortized(rates=pv.rates.PerGene(), hidden=(8,)), few_cells, Trace_ELBO()),
    "vae": (VAE, pv.encoders.Encoder((8,)), profiles, TraceMeanField_ELBO()),
    "gmvae": (GMVAE, pv.encoders.Encoder((8,)), profiles, TraceMeanField_ELBO()),
}
THIRDS = {"batch_size": 3}
"""A process has two cells of most batches, and the other one."""
EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "velocity": ("velocity", THIRDS),
    "velocity, a floor under the KL": ("velocity", THIRDS | {"free_bits": 0.3}),
    "velocity, one clock": ("shared", THIRDS),
    "VAE": ("vae", THIRDS),
    "VAE, a floor under the KL": ("vae", THIRDS | {"free_bits": 0.8}),
    "GMVAE": ("gmvae", THIRDS),
}


def gradients(program: str, plan: dict[str, Any]) -> dict[str, Any]:
    """What the optimiser gets in each step of an epoch, with known draws, and the loss of the epoch."""
    model, guide, cells, elbo = PROGRAMS[program]
    steps: list[list[Tensor]] = []
    step_together = train.step_together

    def noted(optimizer: Any, parameters: Any) -> None:
        parameters = list(parameters)
        steps.append([each.grad.clone() for each in parameters])
        step_together(optimizer, parameters)

    train.step_together = noted
    try:
        fitted = train.train(
            model, lambda built: Known(guide(built)), cells(), elbo=elbo, progress=False,
            settings=TrainSettings(**STILL | plan),
        )  # fmt: skip
    finally:
        train.step_together = step_together
    return {"steps": steps, "loss": fitted.training.history.train}


def draws() -> dict[str, list[Tensor]]:
    """The noise of z and of a gene-level site in the steps of a fit."""
    found: dict[str, list[Tensor]] = {"z": [], "alpha": []}

    class Watched(nn.Module):
        def __init__(self, guide: nn.Module) -> None:
            super().__init__()
            self.guide = guide

        def forward(self, batch: Any) -> None:
            traced = poutine.trace(self.guide).get_trace(batch)
            if torch.is_grad_enabled():
                for name, site in (("z", "z"), ("alpha", "alpha_unconstrained")):
                    fn = traced.nodes[site]["fn"]
                    fn = fn if name == "alpha" and not hasattr(fn, "base_dist") else fn.base_dist
                    found[name].append(((traced.nodes[site]["value"] - fn.loc) / fn.scale).detach().squeeze())

    plan = settings(max_epochs=2)
    train.train(MODEL, lambda built: Watched(GUIDE(built)), small_cells(), settings=plan, progress=False)
    return found


def kept_fit(**options: Any) -> tuple[Training, list[Training]]:
    """The state that a fit ends with, and those that who saves them gets, one a look."""
    kept: list[Training] = []
    return small_fit(on_evaluation=kept.append, **options).training, kept


def recorded_fit() -> Training:
    """A fit whose steps are recorded, and run operation by operation, as to compile them takes long."""
    kept = compiled.WORTH_FUSING, compiled.WORTH_RECORDING, recorded.compiled_whole
    compiled.WORTH_FUSING = compiled.WORTH_RECORDING = 1
    graphs: list[Any] = []
    recorded.compiled_whole = lambda graph, *_: graphs.append(graph) or deepcopy(graph)
    torch_compile, torch.compile = torch.compile, lambda function, **_: function
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted = small_fit().training
    finally:
        compiled.WORTH_FUSING, compiled.WORTH_RECORDING, recorded.compiled_whole = kept
        torch.compile = torch_compile
    assert len(graphs) == 1
    return fitted


def looks() -> list[float]:
    """What is seen of many held-out cells in several batches, at parameters that stay."""
    fitted = small_fit(settings=settings(learning_rate=1e-30, max_epochs=1, held_out=0.7, batch_size=4, beta=2.0))
    history = fitted.training.history
    terms = [value for cells in history.terms.values() for values in cells.values() for value in values]
    return [*history.held_out, *history.objective, *terms]


def with_nan() -> Cells:
    """One cell has NaN in gene 3, and start values come from the others."""
    cells = small_cells()
    molecules = cells.molecules.clone()
    molecules[1, 7, 3] = torch.nan
    return Cells(molecules, cells.ratio)


class OfOthers(pv.initial.Initialisation):
    """Start values read off clean cells."""

    def __call__(self, _: Cells) -> Any:
        return pv.initial.SteadyState()(small_cells())


def errors() -> dict[str, str]:
    """What is said of what can't be."""
    model = pv.VelocityModel(n_latent=2, hidden=(8,), initial=OfOthers())
    other = pv.VelocityModel(n_latent=2 + processes.team().rank, hidden=(8,))
    drifted = {"w": torch.ones(3) + torch.finfo(torch.float32).eps * processes.team().rank}
    floor = settings(free_bits=0.5)
    jobs: dict[str, Callable[[], Fitted | None]] = {
        "nan": lambda: train.train(model, GUIDE, with_nan(), settings=settings(), progress=False),
        "nan, a floor under the KL": lambda: train.train(model, GUIDE, with_nan(), settings=floor, progress=False),
        "drifted": lambda: processes.team().check_alike(drifted),
        "small": lambda: small_fit(settings=settings(batch_size=1)),
        "renyi": lambda: small_fit(elbo=RenyiELBO()),
        "other": lambda: train.train(other, GUIDE, small_cells(), settings=settings(), progress=False),
    }
    found = {}
    for name, job in jobs.items():
        try:
            job()
            found[name] = ""
        except (FitError, InputError) as error:
            found[name] = str(error)
    return found


def laws(folder: Path) -> None:
    """Every job; the checkpoint `one` is of one process, `two` is left by this."""
    with processes.joined() as team:
        fitted, kept = kept_fit()
        if team.leads:
            checkpoint.save(kept[3], folder / "two")
        results = {
            "gradients": {name: gradients(*each) for name, each in EQUAL.items()},
            "draws": draws(),
            "fit": fitted,
            "recorded": recorded_fit(),
            "saved": len(kept),
            "looks": looks(),
            "from one": small_fit(resume=checkpoint.load(folder / "one")[0]).training,
            "errors": errors(),
            "from two": small_fit(resume=checkpoint.load(folder / "two")[0]).training,
        }
    torch.save(results, folder / f"{team.rank}.pt")


def command(*arguments: str) -> None:
    """The command line; the second process comes to its thirtieth step and no further."""
    step_together = train.step_together
    taken = 0

    def deadly(*given: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == 30 and processes.team().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step_together(*given)

    train.step_together = deadly
    sys.exit(cli.main(list(arguments)))


def silence() -> None:
    """The second process is there, and says nothing for longer than the first will wait."""
    processes.TIMEOUT = timedelta(seconds=2)
    with processes.joined() as team:
        if not team.leads:
            time.sleep(6)
            return
        start = time.monotonic()
        try:
            team.gathered(1)
        except FitError as error:
            print(json.dumps([str(error), time.monotonic() - start]))


def on_processes(job: Callable[[], None], said: Path, size: int = 2) -> list[int]:
    """Do the job on `size` processes, with what `torchrun` tells them; returns their exit codes.

    What they say goes to the file `said`.
    """
    # As the agent of torchrun does, the parent keeps the notes: they outlive every process.
    notes = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": notes.port}
    told |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True}
    children = []
    for rank in range(size):
        children.append(os.fork())
        if not children[-1]:
            told |= {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in told.items()})
            file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            _end_with(job)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _end_with(job: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        job()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(folder: Path) -> None:
    """All scenes, one after the other: their exit codes and seconds go to `codes.json`."""
    torch.set_num_threads(1)
    fit = ("fit", str(folder / "small.h5ad"), "-o", str(folder / "out.h5ad"), "--as-is", "--max-epochs", "20")
    fit += ("--batch-size", "18", "--save", str(folder / "kept"))
    scenes: dict[str, Callable[[], None]] = {
        "laws": lambda: laws(folder),
        "death": lambda: command(*fit),
        "silence": silence,
        "another command": lambda: command("simulate", str(folder / "never.h5ad"), *"--cells 9 --genes 9".split()),
        "a missing file": lambda: command("fit", "nowhere.h5ad", "-o", str(folder / "never.h5ad")),
    }
    codes = {}
    for name, scene in scenes.items():
        start = time.monotonic()
        codes[name] = (on_processes(scene, folder / f"{name}.txt"), time.monotonic() - start)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
