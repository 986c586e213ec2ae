"""Which part is right where: every combination of a grid, fitted to simulations of known truth and to the pancreas.

    python benchmarks/swaps.py --data recipe bifurcation cycle pancreas --grid times=per-gene,shared,hierarchical

Data: `recipe` (one process, Normal noise), `bifurcation`, `cycle`, `nb` and `zinb` (counts with library sizes, which
the Normal likelihood sees smoothed), `batches`, `one-batch` (two captures, and the same cells with one), `pancreas`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from sides import scores

import pyro_velo as pv
from pyro_velo import api, simulate
from pyro_velo.options import FitOptions

EDGES = (
    ("Pre-endocrine", "Alpha"),
    ("Pre-endocrine", "Beta"),
    ("Pre-endocrine", "Delta"),
    ("Pre-endocrine", "Epsilon"),
    ("Ngn3 high EP", "Pre-endocrine"),
    ("Ductal", "Ngn3 low EP"),
    ("Ngn3 low EP", "Ngn3 high EP"),
)
PANCREAS = Path(os.environ.get("PYRO_VELO_DATA", "../shared/data")) / "pancreas.h5ad"
COUNTED = {"nb", "zinb", "batches", "one-batch"}
"""Raw counts: preprocessed before the fit."""

TWO = simulate.Batches(unspliced=(1.0, 0.4), spliced=(1.0, 0.7), spread=0.3)
SAME = simulate.Batches(unspliced=(1.0, 1.0), spliced=(1.0, 1.0))

SIMULATIONS: dict[str, Callable[[], simulate.Settings]] = {
    "recipe": simulate.Settings,
    "bifurcation": lambda: simulate.Settings(lineages=simulate.Lineages(2)),
    "cycle": lambda: simulate.Settings(lineages=simulate.Cycle()),
    "nb": lambda: simulate.Settings(noise=simulate.NegativeBinomial()),
    "zinb": lambda: simulate.Settings(noise=simulate.ZeroInflatedNegativeBinomial()),
    "batches": lambda: simulate.Settings(noise=simulate.NegativeBinomial(), batches=TWO),
    "one-batch": lambda: simulate.Settings(noise=simulate.NegativeBinomial(), batches=SAME),
}


def recovered(adata: Any) -> dict[str, float]:
    """Correlations with the truth that the simulator left in the AnnData."""
    found = {
        "ratio": (adata.var["fit_gamma"] / adata.var["fit_beta"]).to_numpy(),
        "velocity": adata.layers["velocity"],
        "low": adata.layers["velocity_q05"],
        "high": adata.layers["velocity_q95"],
        "time": adata.layers["fit_t"],
    }
    truth = {
        "ratio": (adata.var["true_gamma"] / adata.var["true_beta"]).to_numpy(),
        "velocity": adata.layers["true_velocity"],
        "time": adata.obs["true_t"].to_numpy(),
    }
    return scores(found, truth)


def directed(adata: Any) -> dict[str, float]:
    """Cross-boundary direction of the pancreas, and each edge's."""
    found = pv.score(adata, "clusters", list(EDGES))
    edges = found.pop("edges")
    four = [edge["cbdir_umap"] for edge in edges[:4]]
    return {"umap_4": sum(four) / 4, **found, **{f"{e['from']}>{e['to']}": e["cbdir_umap"] for e in edges}}


def measure(data: str, swaps: dict[str, str], options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One fit, and what it found."""
    if data == "pancreas":
        adata = pv.read(PANCREAS)
    else:
        adata = pv.to_anndata(simulate.simulate(options.cells, options.genes, settings=SIMULATIONS[data](), seed=seed))
    fit = api.fit_adata(
        adata,
        FitOptions(
            as_is=data != "pancreas" and data not in COUNTED,
            seed=seed,
            draws=options.draws,
            max_epochs=options.max_epochs,
            batch_key="batch" if options.batch_key and data == "batches" else None,
            **swaps,
        ),
    )
    found = directed(adata) if data == "pancreas" else recovered(adata)
    return {**found, "held_out": fit.fitted.training.plateau.best, "epochs": fit.epochs}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a table for each kind of data."""
    lines: list[str] = []
    for heads in dict.fromkeys(tuple(row) for row in rows):
        lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for row in rows:
            if tuple(row) == heads:
                shown = (f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values())
                lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["recipe"], choices=[*SIMULATIONS, "pancreas"])
    parser.add_argument("--grid", action="append", default=[], metavar="PART=A,B", help="an option of `pyro-velo fit`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--genes", type=int, default=300)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--max-epochs", type=int)
    parser.add_argument("--batch-key", action="store_true", help="tell the model which batch a cell is of")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    grid = {name: values.split(",") for name, _, values in (each.partition("=") for each in options.grid)}
    rows = []
    for data, seed, *values in product(options.data, options.seeds, *grid.values()):
        swaps = dict(zip(grid, values, strict=True))
        rows.append({"data": data, "seed": seed, **swaps, **measure(data, swaps, options, seed)})
        print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
