"""How soon pyro_velo reaches the held-out log-likelihood at which scvi-tools' VELOVI ends, on the pancreas.

Both train on the same cells and genes with their defaults, one after the other, and the same code says what each makes
of the same held-out cells: the log predictive density of u and of s. Looks are not timed. What stands before the first
step (start values, compiling) is. See README.md for the environment that VELOVI lives in.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from velovi import number, run

PANCREAS = Path(os.environ.get("PYRO_VELO_DATA", "../shared/data")) / "pancreas.h5ad"
SIDES = ("velovi", "pyro_velo")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has scvi-tools")
    parser.add_argument("--own-python", default=sys.executable, help="Python that has pyro_velo's dependencies")
    parser.add_argument("--cells", type=int, default=3696, help="of the pancreas, drawn at random")
    parser.add_argument("--genes", type=int, default=2000, help="the most variable")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--looks", type=int, default=25, help="steps between two looks at the held-out cells")
    parser.add_argument("--draws", type=int, default=20, help="of the guide, for each look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw both courses")
    return parser.parse_args(arguments)


def prepared(settings: argparse.Namespace, folder: Path) -> Path:
    """Smoothed layers of the pancreas, each gene scaled to [0, 1], and which cells are held out."""
    import anndata

    import pyro_velo as pv
    from pyro_velo.train import split

    adata = anndata.read_h5ad(PANCREAS)
    chosen = np.random.default_rng(settings.seed).permutation(adata.n_obs)[: settings.cells]
    adata = adata[np.sort(chosen)].copy()
    pv.pp.prepare(adata, pv.pp.PrepareSettings(n_top_genes=settings.genes))
    layers = {"unspliced": adata.layers["Mu"], "spliced": adata.layers["Ms"]}
    layers = {name: np.asarray(x, np.float32) for name, x in layers.items()}
    varies = np.all([np.ptp(x, axis=0) > 0 for x in layers.values()], axis=0)
    layers = {name: x[:, varies] for name, x in layers.items()}
    scaled = {name: (x - x.min(0)) / np.ptp(x, axis=0) for name, x in layers.items()}
    seen, scored = split(adata.n_obs, 0.1, settings.seed)
    file = folder / "layers.npz"
    np.savez(file, **scaled, seen=seen.numpy(), scored=scored.numpy())
    return file


def reached(course: np.ndarray, goal: float) -> np.ndarray | None:
    """Seconds, by the clock and of CPU time, of the first look that is no worse than `goal`; None: there is none."""
    found = np.flatnonzero(course[:, 2] >= goal)
    return course[found[0], :2] if len(found) else None


def table(courses: dict[str, np.ndarray]) -> str:
    """When each side ends, and when it reaches where VELOVI ends."""
    peer, own = (courses[side] for side in SIDES)
    goal = peer[-1, 2]
    lines = ["| | nats per held-out cell | s | CPU s |", "|---|---|---|---|"]
    for side, course in courses.items():
        lines.append(
            f"| {side}, at its end | {course[-1, 2]:.1f} | {number(course[-1, 0])} | {number(course[-1, 1])} |"
        )
    for side, course in courses.items():
        when = reached(course, goal)
        shown = "never | never" if when is None else " | ".join(map(number, when))
        lines.append(f"| {side}, as good as VELOVI at its end | {goal:.1f} | {shown} |")
    when = reached(own, goal)
    if when is not None:
        ratios = " | ".join(f"**{ratio:.1f} times**" for ratio in peer[-1, :2] / when)
        lines.append(f"| VELOVI's fit / pyro_velo's way there | | {ratios} |")
    return "\n".join(lines)


def draw(courses: dict[str, np.ndarray], file: Path) -> None:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for side, course in courses.items():
        ax.plot(course[:, 1], course[:, 2], marker=".", label={"velovi": "VELOVI"}.get(side, side))
    ax.axhline(courses["velovi"][-1, 2], color="0.6", lw=0.8)
    every = np.concatenate([course[:, 2] for course in courses.values()])
    top = every.max()
    ax.set(xscale="log", xlabel="CPU s of training", ylabel="log predictive density per held-out cell, nats")
    ax.set_ylim(np.quantile(every, 0.05), top + 0.05 * abs(top))
    ax.legend(frameon=False)
    fig.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    settings = options(arguments)
    task: dict[str, Any] = {name: getattr(settings, name) for name in ("threads", "batch", "looks", "draws", "seed")}
    courses = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = prepared(settings, folder)
        pythons = dict(zip(SIDES, (settings.peer_python, settings.own_python), strict=True))
        for side in SIDES:
            found = run(pythons[side], task | {"side": side, "data": str(file)}, folder, "reach_sides.py")
            courses[side] = np.array(found["course"])
            print(f"  {side}: load {found['load']:.1f}, {courses[side][-1]}", file=sys.stderr, flush=True)
    print(f"{settings.cells} cells, up to {settings.genes} genes, seed {settings.seed}, {settings.threads} threads.\n")
    print(table(courses))
    if settings.picture is not None:
        draw(courses, settings.picture)


if __name__ == "__main__":
    main()
