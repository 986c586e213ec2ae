"""How time and memory grow with the number of cells: fits of cells on disk, each size in a process of its own.

`python benchmarks/growth.py 3000 30000 300000 --folder DIR` simulates counts (CSR, .h5ad) in DIR, fits them as they
are, and deletes them; `--in-memory` fits the same in memory. growth.md holds what it found.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.data.simulated import write_blocks
from pyro_velo.train import TrainSettings

SEEN = 10_000
"""Cells that are simulated; where more are asked for, these are looked at again."""
STEPS = 600
"""An epoch is measured over as many steps at least, so that small sizes take several after their first.

As many are compiled at every size, as those of a fit of the default length are."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("cells", type=int, nargs="+")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/growth"))
    parser.add_argument("--draws", type=int, default=0, help="write the posterior of as many draws (0: don't)")
    parser.add_argument("--in-memory", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the simulated files")
    parser.add_argument("--json", type=Path, help="append a line for each size")
    parser.add_argument("--picture", type=Path, help="draw what --json holds")
    parser.add_argument("--alone", choices=["simulate", "fit"], help=argparse.SUPPRESS)
    return parser.parse_args()


def peak() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def simulated(path: Path, n_cells: int, n_genes: int) -> None:
    # Genes with times of their own leave no cell at the start of all of them, without counts.
    settings = simulate.Settings(
        kinetics=simulate.LogNormalRates(drop=0.0),
        clock=simulate.GeneTime(),
        noise=simulate.Poisson(library_size=simulate.LibrarySize(depth=0.3)),
    )
    write_blocks(looks(simulate.simulate(min(n_cells, SEEN), n_genes, settings=settings, seed=0), n_cells), path)


def looks(cells: simulate.Simulation, n_cells: int) -> Iterator[simulate.Simulation]:
    """The same cells again and again, each time with counts of its own, until there are `n_cells`."""
    draw = np.random.default_rng(1)
    for start in range(0, n_cells, len(cells.true_t)):
        some = slice(0, n_cells - start)
        own = {name: getattr(cells, name)[some] for name in ("true_t", "lineage", "library", "batch")}
        seen = {
            name: draw.poisson(own["library"][:, None] * abundances[some])
            for name, abundances in (("unspliced", cells.true_u), ("spliced", cells.true_s))
        }
        yield replace(cells, **seen, **own)


class Stopwatch:
    """Wall and CPU seconds since it was made or read."""

    def __init__(self) -> None:
        self.read()

    def read(self) -> tuple[float, float]:
        now, last = (time.perf_counter(), time.process_time()), getattr(self, "now", (0.0, 0.0))
        self.now = now
        return now[0] - last[0], now[1] - last[1]


def fitted(path: Path, given: argparse.Namespace) -> dict[str, Any]:
    watch = Stopwatch()
    adata: Any = pv.read(path) if given.in_memory else path
    data = pv.velocity_data(adata, as_is=True) if given.in_memory else pv.velocity_data_on_disk(path, as_is=True)
    found = {"cells": len(data.cells), "genes": data.cells.n_genes, "in_memory": given.in_memory}
    found |= {"read_s": watch.read(), "read_gib": peak()}
    n_batches = -(-int(0.9 * len(data.cells)) // TrainSettings.batch_size)
    epochs = 1 + -(-STEPS // n_batches) if n_batches < 5 * STEPS else 1
    times: list[tuple[float, float]] = []
    settings = TrainSettings(max_epochs=epochs, evaluate_steps=1)
    fit = pv.fit(
        None,
        None,
        adata,
        data=data,
        settings=settings,
        progress=False,
        on_evaluation=lambda _: times.append(watch.read()),
    )
    # The first epoch holds what a fit takes once (start values, compiled functions), of which a long one hardly tells.
    later = times[1:] or times
    wall, cpu = (sum(each) / len(later) for each in zip(*later, strict=True))
    found |= {"first_epoch_s": times[0], "epoch_s": (wall, cpu), "fit_gib": peak()}
    found |= {"ms_per_cell": 1e3 * cpu / len(data.cells), "held_out": fit.history["held_out"][-1]}
    if given.draws:
        watch.read()
        fit.write(adata if given.in_memory else path.with_name("out.h5ad"), draws=given.draws)
        found |= {"draws": given.draws, "write_s": watch.read(), "write_gib": peak()}
        path.with_name("out.h5ad").unlink(missing_ok=True)
    return found


def draw(lines: list[dict[str, Any]], picture: Path) -> None:
    """Time per cell and epoch, and peak memory, by the number of cells."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for ax, key, label in zip(
        axes, ("ms_per_cell", "fit_gib"), ("CPU ms per cell and epoch", "peak memory of the fit, GiB"), strict=True
    ):
        for in_memory, marker, name in ((False, "o-", "on disk"), (True, "s--", "in memory")):
            some = sorted((line["cells"], line[key]) for line in lines if line["in_memory"] == in_memory)
            if some:
                ax.plot(*zip(*some, strict=True), marker, label=name)
        ax.set(xscale="log", xlabel="cells", ylabel=label, ylim=(0, 1.15 * max(line[key] for line in lines)))
    axes[0].legend(frameon=False)
    figure.savefig(picture, dpi=120)


def main() -> None:
    given = options()
    if given.alone:
        torch.set_num_threads(1)
        (n_cells,) = given.cells
        path = given.folder / f"{n_cells}.h5ad"
        if given.alone == "simulate":
            simulated(path, n_cells, given.genes)
        else:
            print(json.dumps(fitted(path, given)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    for n_cells in given.cells:
        path = given.folder / f"{n_cells}.h5ad"
        same = [str(n_cells), "--genes", str(given.genes), "--folder", str(given.folder), "--draws", str(given.draws)]
        try:
            if not path.exists():
                subprocess.run([sys.executable, __file__, *same, "--alone", "simulate"], check=True)
            how = ["--in-memory"] if given.in_memory else []
            command = [sys.executable, __file__, *same, *how, "--alone", "fit"]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        finally:
            if not given.keep:
                path.unlink(missing_ok=True)
        print(line, flush=True)
        if given.json:
            with open(given.json, "a") as file:
                print(line, file=file)
    if given.json and given.picture:
        draw([json.loads(line) for line in given.json.read_text().splitlines()], given.picture)


if __name__ == "__main__":
    main()
