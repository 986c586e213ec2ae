"""How soon pyro_velo reaches the held-out log-likelihood at which scvi-tools' VELOVI ends, on the pancreas.

Both train on the same cells and genes with their defaults, one after the other, and the same code says what each makes
of the same held-out cells, by three log predictive densities (`reach_sides.predictive`): of u and of s, each for
itself; of the pair, as the package has it; and of the pair where both molecules are in one state. A third side is
pyro_velo with VELOVI's likelihood, a state for each molecule. Looks are not timed. What stands before the first step
(start values, compiling) is. See README.md for the environment that VELOVI lives in.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from velovi import number, run

PANCREAS = Path(os.environ.get("PYRO_VELO_DATA", "../shared/data")) / "pancreas.h5ad"
SIDES = {"velovi": "VELOVI", "pyro_velo": "pyro_velo", "pyro_velo_apart": "pyro_velo, states apart"}
MEASURES = {"each": "u and s, each for itself", "pair": "the pair", "one_state": "the pair in one state"}


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has scvi-tools")
    parser.add_argument("--own-python", default=sys.executable, help="Python that has pyro_velo's dependencies")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--cells", type=int, default=3696, help="of the pancreas, drawn at random")
    parser.add_argument("--genes", type=int, default=2000, help="the most variable")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--looks", type=int, default=25, help="steps between two looks at the held-out cells")
    parser.add_argument("--steps", type=int, help="of pyro_velo's fits (default: the package's)")
    parser.add_argument("--draws", type=int, default=20, help="of the guide, for each look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the courses")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every look here")
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


Course = list[dict[str, float]]


def reached(course: Course, measure: str, goal: float) -> dict[str, float] | None:
    """The first look that is no worse than `goal`, with its seconds; None: there is none."""
    return next((look for look in course if look[measure] >= goal), None)


def table(courses: dict[str, Course]) -> str:
    """Where each side ends, and when it reaches where VELOVI ends."""
    headings = [*MEASURES.values(), "s", "CPU s"]
    lines = ["| | " + " | ".join(headings) + " |", "|---|" + "---|" * len(headings)]
    for side, course in courses.items():
        end = course[-1]
        scores = " | ".join(f"{end[measure]:.1f}" for measure in MEASURES)
        times = " | ".join(number(end[name]) for name in ("s", "cpu_s"))
        lines.append(f"| {SIDES[side]}, at its end | {scores} | {times} |")
    return "\n".join(lines)


def ways(courses: dict[str, Course]) -> str:
    """CPU seconds until each side is as good as VELOVI is at its end, and how often they fit into VELOVI's fit."""
    end = courses["velovi"][-1]
    lines = ["| CPU s until as good as VELOVI at its end | " + " | ".join(MEASURES.values()) + " |"]
    lines.append("|---|" + "---|" * len(MEASURES))
    for side, course in courses.items():
        found = [reached(course, measure, end[measure]) for measure in MEASURES]
        shown = [
            "never" if look is None else f"{number(look['cpu_s'])} ({end['cpu_s'] / look['cpu_s']:.1f} times as fast)"
            for look in found
        ]
        lines.append(f"| {SIDES[side]} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def draw(courses: dict[str, Course], file: Path) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(MEASURES), figsize=(4 * len(MEASURES), 3.6), layout="constrained")
    for ax, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for side, course in courses.items():
            ax.plot([x["cpu_s"] for x in course], [x[measure] for x in course], marker=".", ms=4, label=SIDES[side])
        if "velovi" in courses:
            ax.axhline(courses["velovi"][-1][measure], color="0.6", lw=0.8)
        # States apart say next to nothing of a pair in one state; what is far below would hide the rest.
        every = [x[measure] for side, course in courses.items() for x in course if side != "pyro_velo_apart"]
        low, top = np.quantile(every, 0.05), max(x[measure] for course in courses.values() for x in course)
        ax.set(xscale="log", xlabel="CPU s of training", title=title)
        ax.set_ylim(low, top + 0.05 * abs(top))
    axes[0].set_ylabel("log predictive density per held-out cell, nats")
    axes[0].legend(frameon=False)
    fig.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    settings = options(arguments)
    task: dict[str, Any] = {
        name: getattr(settings, name) for name in ("threads", "batch", "looks", "draws", "seed", "steps")
    }
    courses: dict[str, Course] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = prepared(settings, folder)
        for side in settings.sides:
            python = settings.peer_python if side == "velovi" else settings.own_python
            found = run(python, task | {"side": side, "data": str(file)}, folder, "reach_sides.py")
            courses[side] = found["course"]
            print(f"  {side}: load {found['load']:.1f}, {courses[side][-1]}", file=sys.stderr, flush=True)
    print(f"{settings.cells} cells, up to {settings.genes} genes, seed {settings.seed}, {settings.threads} threads.\n")
    print(table(courses))
    if "velovi" in courses:
        print("\n" + ways(courses))
    if settings.json is not None:
        settings.json.write_text(json.dumps(courses))
    if settings.picture is not None:
        draw(courses, settings.picture)


if __name__ == "__main__":
    main()
