"""pyro_velo beside scVelo's dynamical model: the fit of the pancreas and its velocities, of the same layers and genes.

Genes are those whose steady-state R2 exceeds 0 among those with 30 shared counts (370), smoothed over 30 neighbours on
30 principal components. scVelo's expectation maximisation gives each gene's rates and velocity as a point, pyro_velo's
fit and posterior both with their uncertainty. See README.md for the environment that scVelo lives in.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from velovi import number, run

PANCREAS = Path(os.environ.get("PYRO_VELO_DATA", "../shared/data")) / "pancreas.h5ad"
SIDES = ("scvelo", "pyro_velo")
STAGES = {"fit": "fit", "posterior": "velocities; of pyro_velo the posterior", "both": "both"}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has scVelo")
    parser.add_argument("--own-python", default=sys.executable, help="Python that has pyro_velo's dependencies")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--draws", type=int, default=100, help="of pyro_velo's posterior")
    parser.add_argument("--threads", type=int, default=2, help="of pyro_velo, and scVelo's processes")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    return parser.parse_args(arguments)


def prepared(folder: Path) -> tuple[Path, tuple[int, ...]]:
    """A file with the smoothed layers of the genes that have dynamics and the neighbours' graph, and their shape."""
    import anndata
    from scipy import sparse

    import pyro_velo as pv

    adata = anndata.read_h5ad(PANCREAS)
    pv.pp.prepare(adata, pv.pp.PrepareSettings(umap=False))
    genes = adata.var["velocity_genes"].to_numpy()
    layers = {name: np.asarray(adata.layers[name], np.float32)[:, genes] for name in ("Ms", "Mu")}
    graph = {}
    for name in ("distances", "connectivities"):
        matrix = sparse.csr_matrix(adata.obsp[name])
        graph |= {f"{name}_{part}": getattr(matrix, part) for part in ("data", "indices", "indptr")}
    file = folder / "layers.npz"
    np.savez(file, **layers, **graph)
    return file, layers["Ms"].shape


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over turns, and scVelo's over pyro_velo's; the stages are of the clock, or of the CPU."""
    lines = ["| | " + " | ".join(f"{side}, {kind}" for kind in ("s", "CPU s") for side in results) + " |"]
    lines.append("|---|" + "---|" * (2 * len(results)))
    for stage, shown in STAGES.items():
        found = [median(each[stage][i] for each in turns) for i in (0, 1) for turns in results.values()]
        lines.append(f"| {shown} | " + " | ".join(map(number, found)) + " |")
    if len(results) == len(SIDES):
        peer, own = (np.median([each["both"] for each in results[side]], axis=0) for side in SIDES)
        lines.append(f"\nscVelo / pyro_velo: {peer[0] / own[0]:.2f} by the clock, {peer[1] / own[1]:.2f} of CPU time.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    settings = options(arguments)
    task = {name: getattr(settings, name) for name in ("threads", "draws", "seed")}
    pythons = {"scvelo": settings.peer_python, "pyro_velo": settings.own_python}
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in settings.sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, shape = prepared(folder)
        for turn in range(settings.repeats):
            for side in settings.sides:
                job = task | {"side": side, "data": str(file)}
                results[side].append(run(pythons[side], job, folder, "scvelo_sides.py"))
                print(f"  {side} {turn + 1}/{settings.repeats}: {results[side][-1]}", file=sys.stderr, flush=True)
    load = max(each["load"] for turns in results.values() for each in turns)
    print(f"{shape[0]} cells, {shape[1]} genes, {settings.draws} draws, {settings.threads} threads, load {load:.1f}.\n")
    print(table(results))
    if settings.json is not None:
        settings.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
