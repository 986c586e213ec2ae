"""The sides of `scvi.py`, each in a process of its own: `python -P profile_sides.py TASK.json RESULT.json`.

What each package does to fit a VAE to counts, and to score the cells that it held out. A task is a JSON object: `side`,
`job` ("time" or "bound"), `data` (an AnnData file), `threads`, `batch`, `likelihood` and the job's own settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

HIDDEN, LATENT, HELD_OUT = 128, 10, 0.1


class Side(Protocol):
    """What a package must do to be compared; `epochs=None` trains for as long as it does by default."""

    def train(self, counts: np.ndarray, epochs: int | None, task: dict[str, Any]) -> Any: ...
    def epochs(self, fitted: Any) -> int: ...
    def bound(self, fitted: Any, particles: int) -> np.ndarray: ...
    def version(self) -> str: ...


def held_out(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cells to train on, and those to score; pyro_velo's own split, which is torch's alone."""
    import torch

    order = torch.randperm(n_cells, generator=torch.Generator().manual_seed(seed)).numpy()
    n_held = round(HELD_OUT * n_cells)
    return order[n_held:], order[:n_held]


class SCVI:
    """scvi-tools' SCVI with its defaults: library size observed, a dispersion for each gene."""

    def train(self, counts: np.ndarray, epochs: int | None, task: dict[str, Any]) -> Any:
        import scvi
        from anndata import AnnData

        scvi.settings.seed = seed = task.get("seed", 0)
        adata = AnnData(counts)
        scvi.model.SCVI.setup_anndata(adata)
        model = scvi.model.SCVI(
            adata, n_hidden=HIDDEN, n_layers=1, n_latent=LATENT, gene_likelihood=task["likelihood"], dispersion="gene"
        )
        seen, self.scored = held_out(len(counts), seed)
        model.train(
            max_epochs=epochs,
            batch_size=task["batch"],
            accelerator="cpu",
            enable_progress_bar=False,
            logger=False,
            datasplitter_kwargs={"external_indexing": [seen, self.scored, np.array([], np.int64)]},
        )
        return model

    def epochs(self, fitted: Any) -> int:
        return fitted.trainer.current_epoch

    def bound(self, fitted: Any, particles: int) -> np.ndarray:
        return np.asarray(
            fitted.get_marginal_ll(indices=self.scored, n_mc_samples=particles, return_mean=False), np.float64
        )

    def version(self) -> str:
        import scvi

        return f"scvi-tools {scvi.__version__}"


class PyroVelo:
    """pyro_velo's VAE with its defaults."""

    def train(self, counts: np.ndarray, epochs: int | None, task: dict[str, Any]) -> Any:
        from dataclasses import replace

        import torch

        import pyro_velo as pv
        from pyro_velo import compiled
        from pyro_velo.clustering import TRAINING, fit_profiles
        from pyro_velo.encoders import Encoder
        from pyro_velo.likelihoods import PROFILE_LIKELIHOODS
        from pyro_velo.profiles import Profiles

        # The runs that are timed are too short for what a whole fit pays for; it is compiled in the run before them.
        compiled.WORTH_FUSING = 0
        self.cells = Profiles.of_counts(torch.from_numpy(counts))
        decoded = ("gate",) if task["likelihood"] == "zinb" else ()
        model = pv.VAE(PROFILE_LIKELIHOODS[task["likelihood"]](), LATENT, (HIDDEN,), decoded)
        settings = replace(
            TRAINING, seed=task.get("seed", 0), batch_size=task["batch"], held_out=HELD_OUT, max_epochs=epochs
        )
        return fit_profiles(model, Encoder((HIDDEN,)), self.cells, settings=settings, progress=False)

    def epochs(self, fitted: Any) -> int:
        return fitted.training.epoch

    def bound(self, fitted: Any, particles: int) -> np.ndarray:
        from pyro_velo.evidence import evidence

        return evidence(fitted, self.cells, particles=particles, draws=1).iw_bound

    def version(self) -> str:
        from pyro_velo.version import __version__

        return f"pyro_velo {__version__}"


SIDES: dict[str, Callable[[], Side]] = {"scvi": SCVI, "pyro_velo": PyroVelo}


def spliced(path: str | Path) -> np.ndarray:
    """The pancreas' spliced counts, (cells, genes) float32, of genes that are seen in some cell."""
    import anndata

    counts = anndata.read_h5ad(path).layers["spliced"]
    counts = np.asarray(counts.todense() if hasattr(counts, "todense") else counts, np.float32)
    return np.ascontiguousarray(counts[:, counts.max(0) > counts.min(0)])


def timing(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds per epoch: the difference between a long and a short run, after one that is not timed."""
    side, counts = SIDES[task["side"]](), spliced(task["data"])
    side.train(counts, 1, task)
    short, _ = _seconds(lambda: side.train(counts, 1, task))
    long, _ = _seconds(lambda: side.train(counts, 1 + task["epochs"], task))
    epoch_s, epoch_cpu_s = (long - short) / task["epochs"]
    return {"version": side.version(), "epoch_s": epoch_s, "epoch_cpu_s": epoch_cpu_s, "load": os.getloadavg()[0]}


def bound(task: dict[str, Any]) -> dict[str, Any]:
    """The bound of each held-out cell after a fit of the package's own length."""
    side, counts = SIDES[task["side"]](), spliced(task["data"])
    (_, cpu), fitted = _seconds(lambda: side.train(counts, None, task))
    found = side.bound(fitted, task["particles"])
    return {"version": side.version(), "bound": found.tolist(), "epochs": side.epochs(fitted), "fit_cpu_s": float(cpu)}


def _seconds(call: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    start = time.perf_counter(), time.process_time()
    result = call()
    return np.subtract((time.perf_counter(), time.process_time()), start), result


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"time": timing, "bound": bound}


def main(task_file: str, result_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    import torch

    torch.set_num_threads(task["threads"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = JOBS[task["job"]](task)
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
