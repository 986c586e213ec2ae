"""The sides of `scvelo.py`, each in a process of its own: `python -P scvelo_sides.py TASK.json RESULT.json`.

A task is a JSON object: `side`, `data` (an .npz file with the layers `Ms` and `Mu` and the neighbours' graph),
`threads`, `draws` and `seed`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Times = dict[str, Any]


def _adata(data: Any) -> Any:
    """The layers as an AnnData with its neighbours, as scVelo and pyro_velo want them."""
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    layers = {name: data[name] for name in ("Ms", "Mu")}
    graph = {}
    for name in ("distances", "connectivities"):
        parts = tuple(data[f"{name}_{part}"] for part in ("data", "indices", "indptr"))
        graph[name] = csr_matrix(parts, shape=(len(layers["Ms"]),) * 2)
    neighbours = {"connectivities_key": "connectivities", "distances_key": "distances", "params": {"n_neighbors": 30}}
    # scVelo asks for raw layers, too, and leaves them alone where there are smoothed ones.
    raw = {"spliced": layers["Ms"], "unspliced": layers["Mu"]}
    return AnnData(layers["Ms"].copy(), layers=raw | layers, obsp=graph, uns={"neighbors": neighbours})


def _now() -> np.ndarray:
    """By the clock and of CPU time, that of processes which have ended among it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return np.array([time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)])


def scvelo(data: Any, task: dict[str, Any]) -> Times:
    """Expectation maximisation, gene by gene in several processes, then the velocities."""
    import scvelo as scv
    from joblib.externals.loky import get_reusable_executor

    adata = _adata(data)
    adata.var["velocity_genes"] = True
    scv.settings.verbosity = 0
    start = _now()
    scv.tl.recover_dynamics(adata, var_names="all", n_jobs=task["threads"], show_progress_bar=False)
    reached = _now()
    scv.tl.velocity(adata, mode="dynamical")
    ended = _now()
    # Its processes wait for more to do; only of those that have ended is the CPU time known.
    get_reusable_executor().shutdown(wait=True)
    cpu = _now()[1] - ended[1]
    fit, velocities = reached - start + (0.0, cpu), ended - reached
    return {"fit": fit.tolist(), "posterior": velocities.tolist(), "genes": int(adata.var["fit_alpha"].notna().sum())}


def pyro_velo(data: Any, task: dict[str, Any]) -> Times:
    """pyro_velo's defaults, and the summaries of its posterior."""
    import pyro_velo as pv

    adata = _adata(data)
    start = _now()
    fit = pv.fit(None, None, adata, seed=task["seed"], progress=False)
    reached = _now()
    fit.posterior(draws=task["draws"])
    ended = _now()
    found = {"fit": (reached - start).tolist(), "posterior": (ended - reached).tolist(), "epochs": fit.epochs}
    return found | {"held_out": fit.fitted.held_out_elbo, "genes": len(fit.data.gene_names)}


SIDES: dict[str, Callable[[Any, dict[str, Any]], Times]] = {"scvelo": scvelo, "pyro_velo": pyro_velo}


def main(task_file: str, result_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    if task["side"] == "pyro_velo":
        import torch

        torch.set_num_threads(task["threads"])
    with warnings.catch_warnings(), np.load(task["data"]) as data:
        warnings.simplefilter("ignore")
        found = SIDES[task["side"]](data, task)
    found["both"] = np.add(found["fit"], found["posterior"]).tolist()
    Path(result_file).write_text(json.dumps(found | {"load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
