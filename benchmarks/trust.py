r"""Can the uncertainty be trusted? Recovery and coverage, direction, reversed genes and fates, on data of known truth.

    python benchmarks/trust.py recovery --cells 1000 --seeds 0 1 2 3 4
    python benchmarks/trust.py recovery --times shared --likelihood tobit --rates per-gene
    python benchmarks/trust.py recovery --data nb --times shared --likelihood nb --rates per-gene --library inferred
    python benchmarks/trust.py directional --data stationary recipe permuted pancreas
    python benchmarks/trust.py planted
    python benchmarks/trust.py edges --seeds 0
    python benchmarks/trust.py fates
    python benchmarks/trust.py ranks --cells 150 --genes 15 --max-epochs 300 --seeds 0 1 --keep ranks \
        --times shared --likelihood tobit --rates per-gene

A line of JSON for each fit, and a summary over seeds. `recovery`: correlations with the truth, and how often the
intervals of the velocity cover it. `directional`: the share of cells called directional; `permuted` is the pancreas,
the molecules of each gene exchanged among the cells of a cluster. `planted`: a fifth of the genes have their unspliced
counts mirrored at the steady-state line, so that they rise where they should fall; how many of them the audit names.
`edges`: a table of the pancreas' seven edges, and of the genes that the audit says run against the others, a seed.
`fates`: how often the interval of a progenitor bin covers the share of its cells that take a fate. `ranks`:
simulation-based calibration of `--fits` small fits a seed, whose genes are drawn around a typical one (`GENES`), all
seeds together; `--keep` holds what is done.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from swaps import COUNTED, EDGES, PANCREAS, SIMULATIONS, recovered

import pyro_velo as pv
from pyro_velo import api, simulate
from pyro_velo.calibrating import CalibrationSettings
from pyro_velo.calibration import Calibration
from pyro_velo.fates import shares
from pyro_velo.options import FitOptions
from pyro_velo.plots.calibration import calibration_panels

GENES = [f"{rate}=LogNormal({math.log(0.2)}, 0.5)" for rate in ("alpha", "beta", "gamma")]
GENES += [f"noise=LogNormal({math.log(0.1)}, 0.5)", "onset=Normal(0, 2)", "switch_time=Uniform(0, 20)"]
"""Genes that rise and fall while cells are seen; half of them have 0.7 to 1.4 times the rates of a typical one."""
EARLY_TO_LATE = [("early", "middle"), ("middle", "late")]
BINS = 5


def options(args: argparse.Namespace, seed: int, *, as_is: bool) -> FitOptions:
    return FitOptions(
        likelihood=args.likelihood, times=args.times, rates=args.rates, library=args.library, seed=seed, as_is=as_is,
        threads=args.threads, max_epochs=args.max_epochs,
    )  # fmt: skip


def recovery(args: argparse.Namespace, data: str, seed: int) -> dict[str, float]:
    adata = pv.to_anndata(simulate.simulate(args.cells, args.genes, settings=SIMULATIONS[data](), seed=seed))
    fit = api.fit_adata(adata, options(args, seed, as_is=data not in COUNTED))
    tallies = pv.coverage_of(fit, adata, progress=False).records[0].tallies
    covered = {f"{name} {level:.0%}": tallies[name].coverage[level] for name in tallies for level in (0.5, 0.9)}
    return recovered(adata) | covered


def directional(args: argparse.Namespace, data: str, seed: int) -> dict[str, float]:
    if data in ("pancreas", "permuted"):
        adata = api.read(PANCREAS)
        if data == "permuted":
            _permute(adata, seed)
    else:
        settings = simulate.Settings(stationary=True) if data == "stationary" else SIMULATIONS[data]()
        adata = pv.to_anndata(simulate.simulate(args.cells, args.genes, settings=settings, seed=seed))
        _neighbours(adata)
    as_is = data not in ("pancreas", "permuted")
    fit = api.fit_adata(adata, options(args, seed, as_is=as_is))
    found = pv.futures.directional(adata, fit, draws=50, seed=seed, progress=False)
    return {"called": float(found.share)}


def planted(args: argparse.Namespace, data: str, seed: int) -> dict[str, float]:
    adata = pv.to_anndata(simulate.simulate(args.cells, args.genes, settings=SIMULATIONS[data](), seed=seed))
    rng = np.random.default_rng(seed)
    turned = rng.choice(adata.n_vars, round(0.2 * adata.n_vars), replace=False)
    ratio = (adata.var["true_gamma"] / adata.var["true_beta"]).to_numpy()[turned]
    u, s = (np.asarray(adata.layers[name])[:, turned] for name in ("unspliced", "spliced"))
    adata.layers["unspliced"][:, turned] = np.clip(2 * ratio * s - u, 0, None)
    _neighbours(adata)
    stage = np.digitize(adata.obs["true_t"], (20 / 3, 40 / 3))
    adata.obs["stage"] = np.array(["early", "middle", "late"])[stage]
    fit = api.fit_adata(adata, options(args, seed, as_is=True))
    found = pv.audit(fit, adata, "stage", EARLY_TO_LATE)
    names = set(adata.var_names[turned]) & set(found.genes)
    called = set(found.reversed_genes)
    hits = len(names & called)
    return {"precision": hits / max(1, len(called)), "recall": hits / len(names), "called": float(len(called))}


def edges(args: argparse.Namespace) -> None:
    for seed in args.seeds:
        adata = api.read(PANCREAS)
        fit = api.fit_adata(adata, options(args, seed, as_is=False))
        found, score = pv.audit(fit, adata, "clusters", EDGES), pv.score(adata, "clusters", list(EDGES))
        umap = [edge["cbdir_umap"] for edge in score["edges"]]
        four, seven = sum(umap[:4]) / 4, sum(umap) / 7
        print(
            f"\nseed {seed}: CBDir on the UMAP {four:.3f} (4 edges), {seven:.3f} (7), in Ms space {score['cbdir_ms']}\n"
        )
        print("| edge | CBDir | P(backward) | P(A>B over B>A) | without those reversed |\n|---|---|---|---|---|")
        for each in found.edges:
            low, high = each.interval
            interval = f"{each.mean:.3f} [{low:.3f}, {high:.3f}]"
            rest = f"{each.p_backward:.2f} | {each.p_direction:.2f} | {each.without_reversed:.3f}"
            print(f"| {each.source} > {each.target} | {interval} | {rest} |")
        for name in found.reversed_genes:
            k = found.genes.index(name)
            print(f"{name}: agreement {found.agreement[k]:.2f}, P(reversed) {found.p_reversed[k]:.2f}", flush=True)


def fates(args: argparse.Namespace, data: str, seed: int) -> dict[str, float]:
    settings = SIMULATIONS["bifurcation"]()
    adata = pv.to_anndata(simulate.simulate(args.cells, args.genes, settings=settings, seed=seed))
    _neighbours(adata)
    fit = api.fit_adata(adata, options(args, seed, as_is=True))
    t, lineage = adata.obs["true_t"].to_numpy(), adata.obs["lineage"].astype(str).to_numpy()
    names = sorted(set(lineage) - {"trunk"})
    found = pv.futures.fates(adata, fit, {name: (t > 17) & (lineage == name) for name in names}, progress=False)
    before = lineage == "trunk"
    edges = np.quantile(t[before], np.linspace(0, 1, BINS + 1)[1:-1])
    share = shares(found, {f"bin {k}": before & (np.digitize(t, edges) == k) for k in range(BINS)})
    # Lineages are equally frequent.
    truth, first = 1 / len(names), share.states.index(names[0])
    inside = (share.low[:, first] <= truth) & (truth <= share.high[:, first])
    return {
        "covered": float(inside.mean()),
        "error": float(np.abs(share.mean[:, first] - truth).mean()),
        "width": float((share.high - share.low)[:, first].mean()),
    }


def ranks(args: argparse.Namespace) -> Calibration:
    """The fits of all seeds together."""
    found = []
    for seed in args.seeds:
        model, guide = api.recipes(replace(options(args, seed, as_is=True), priors=tuple(GENES)))
        settings = CalibrationSettings(train=pv.TrainSettings(max_epochs=args.max_epochs), over_states="drawn")
        folder = None if args.keep is None else args.keep / f"seed_{seed}"
        size = (args.cells, args.genes)
        found.append(pv.calibrate(model, guide, size, fits=args.fits, seed=seed, settings=settings, folder=folder))
    every = replace(found[0], records=tuple(record for each in found for record in each.records))
    if args.keep is not None:
        calibration_panels(every).savefig(args.keep / "ranks.png", dpi=100)
    return every


def _permute(adata: Any, seed: int) -> None:
    """Each gene's unspliced and spliced counts, each by itself, among the cells of a cluster."""
    rng = np.random.default_rng(seed)
    labels = adata.obs["clusters"].to_numpy()
    for name in ("unspliced", "spliced"):
        x = adata.layers[name].toarray()
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            x[rows] = rng.permuted(x[rows], axis=0)
        adata.layers[name] = x
    adata.X = adata.layers["spliced"].copy()


def _neighbours(adata: Any) -> None:
    import scanpy as sc

    threads = torch.get_num_threads()
    adata.obsm["X_pca"] = sc.pp.pca(np.log1p(np.asarray(adata.layers["spliced"])), n_comps=min(30, adata.n_vars - 1))
    sc.pp.neighbors(adata, use_rep="X_pca")
    torch.set_num_threads(threads)


JOBS = {"recovery": recovery, "directional": directional, "planted": planted, "fates": fates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=[*JOBS, "edges", "ranks"])
    parser.add_argument("--data", nargs="+", default=["recipe"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--genes", type=int, default=300)
    parser.add_argument("--likelihood", default="tobit")
    parser.add_argument("--times", default="per-gene")
    parser.add_argument("--rates", default="mean-field")
    parser.add_argument("--library", default="known")
    parser.add_argument("--max-epochs", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fits", type=int, default=100, help="of each seed, for ranks")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="of ranks: what is done, and a picture")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.job == "ranks":
        print(ranks(args))
        return
    if args.job == "edges":
        edges(args)
        return
    for data in args.data:
        rows = []
        for seed in args.seeds:
            start = perf_counter()
            rows.append(JOBS[args.job](args, data, seed))
            told = {name: round(value, 4) for name, value in rows[-1].items()}
            print(json.dumps({"data": data, "seed": seed, "seconds": round(perf_counter() - start)} | told), flush=True)
        print(f"\n{args.job}, {data}, {len(rows)} seeds: {vars(args)}\n")
        print("| | mean | lowest | highest |\n|---|---|---|---|")
        for name in rows[0]:
            values = [row[name] for row in rows]
            print(f"| {name} | {np.nanmean(values):.4f} | {min(values):.4f} | {max(values):.4f} |")


if __name__ == "__main__":
    main()
