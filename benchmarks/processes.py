"""What several processes gain: cells a second of one process and of two, with one thread each, turn by turn.

`python benchmarks/processes.py --json processes.json --picture processes.png`; processes.md holds what it found. Each
measurement is a run of `torchrun` of its own. Steps are those of a fit, plain, or with `--compiled` as a long fit does
them (recorded, and compiled as a whole), on a batch that the processes share; compiling itself, preprocessing and looks
at held-out cells are in no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np

ARRANGEMENTS = {"one process": (1, 1), "two processes": (2, 1), "one process, two threads": (1, 2)}
"""Processes, and threads of each; the last is left out unless it is asked for."""
CASES = {"velocity, 256 cells": ("velocity", 256, 10), "velocity, 1,024 cells": ("velocity", 1024, 6)}
CASES |= {"VAE, 256 cells": ("vae", 256, 30), "VAE, 1,024 cells": ("vae", 1024, 12)}
"""What is trained, the cells of a batch, and the steps that are timed."""
GENES, CELLS = 1000, 2300

Found = dict[str, dict[str, list[float]]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", action="store_true", help="one process with two threads as well")
    parser.add_argument("--compiled", action="store_true", help="steps as a long fit does them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--worker", type=Path, help="for the processes that this starts")
    return parser.parse_args()


def data(what: str) -> Any:
    """Simulated layers in [0, 1], or counts of which 40 % are not zero."""
    import torch

    from pyro_velo.batch import Cells
    from pyro_velo.profiles import Profiles
    from pyro_velo.simulate import LogNormalRates, Settings, simulate

    if what == "velocity":
        found = simulate(CELLS, GENES, settings=Settings(kinetics=LogNormalRates(drop=0.0)), seed=0)
        layers = [(x - x.min(0)) / np.ptp(x, axis=0) for x in (found.unspliced, found.spliced)]
        return Cells.of(*(torch.as_tensor(x, dtype=torch.float32) for x in layers))
    draw = np.random.default_rng(0)
    counts = draw.poisson(draw.gamma(0.3, 4.0, (CELLS, GENES))).astype(np.float32)
    return Profiles.of_counts(torch.from_numpy(counts))


def measured(team: Any, what: str, cells: Any, batch: int, steps: int, *, compiled: bool) -> dict[str, list[float]]:
    """Seconds of each step, of its message (with the wait for the other process) and of the message alone."""
    import pyro
    import torch
    from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

    import pyro_velo as pv
    from pyro_velo.compiled import fusing
    from pyro_velo.encoders import Encoder
    from pyro_velo.processes import Noise, Team
    from pyro_velo.train import TrainSettings, _Loop, apart

    class Timed(Team):
        spent: ClassVar[list[float]] = []

        def reduce(self, parameters: Iterable[torch.Tensor], loss: float, weight: float) -> float:
            start = time.perf_counter()
            total = super().reduce(parameters, loss, weight)
            self.spent.append(time.perf_counter() - start)
            return total

    team, settings = Timed(team.rank, team.size, team.store), TrainSettings(batch_size=batch)
    velocity = what == "velocity"
    model = pv.VelocityModel() if velocity else pv.VAE(pv.likelihoods.NB(), 10, (128,))
    guide = pv.guides.Amortized() if velocity else Encoder((128,))
    with apart(cells, 0):
        program = model.build(cells)
        elbo = Trace_ELBO() if velocity else TraceMeanField_ELBO()
        loop = _Loop(program, guide(program), cells, settings, elbo, None, team)
        loop.recorded = loop.recorded if compiled else None
        size = loop.n_train // loop.n_batches
        parts = loop.train_index[: size * loop.n_batches].split(size)
        found: dict[str, list[float]] = {"step": []}
        for number in range(steps + 2):
            part = parts[number % len(parts)]
            share = team.share(part)
            if number == 2:
                busy = time.process_time()
            start = time.perf_counter()
            with fusing(loop._in_parts() if compiled else 0, cells.device), loop.warmup.at(number, team.mean):
                noise = Noise(team, number, cells.device)
                loop._step(cells.batch(share, loop.n_train), number, noise, len(share) / len(part))
            found["step"].append(time.perf_counter() - start)
        mine = (time.process_time() - busy) / steps
        found |= {"cpu": [sum(team.gathered(mine))], "cells": [sum(map(len, parts)) / len(parts)]}
        values = [value.unconstrained() for value in map(pyro.get_param_store().__getitem__, pyro.get_param_store())]
    found["step"], found["message"] = found["step"][2:], team.spent[2 : steps + 2]
    found["megabytes"] = [4e-6 * sum(value.numel() for value in values)]
    found["alone"] = []
    for _ in range(20 if team.several else 0):
        team.gathered(None)
        for value in values:
            value.grad = torch.zeros_like(value)
        start = time.perf_counter()
        team.reduce(values, 0.0, 0.5)
        found["alone"].append(time.perf_counter() - start)
    return found


def worker(file: Path, *, compiled: bool) -> None:
    import torch

    from pyro_velo.processes import joined

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with joined() as team:
        sets = {what: data(what) for what in ("velocity", "vae")}
        found = {
            name: measured(team, what, sets[what], *sizes, compiled=compiled) for name, (what, *sizes) in CASES.items()
        }
    if team.leads:
        file.write_text(json.dumps(found))


def launched(processes: int, threads: int, file: Path, *, compiled: bool) -> Found:
    """One run of `torchrun`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    by = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    how = ["--compiled"] if compiled else []
    subprocess.run([*by, __file__, "--worker", str(file), *how], env=environment, check=True)
    return json.loads(file.read_text())


def throughput(found: dict[str, list[float]]) -> float:
    """Cells a second."""
    return found["cells"][0] / median(found["step"])


def undisturbed(name: str, found: list[dict[str, list[float]]]) -> float:
    """Cells a second, had no process waited: as many as the CPU time of a step allows."""
    return median(one["cells"][0] / one["cpu"][0] for one in found) * ARRANGEMENTS[name][0]


def table(runs: dict[str, list[Found]]) -> str:
    """Medians over runs, and for cells a second the lowest and the highest."""
    heads = ("", "", "cells/s", "CPU ms a step", "cells/s by CPU time", "message, MB", "with the wait, ms", "alone, ms")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case in CASES:
        for name, found in runs.items():
            each = [run[case] for run in found]
            speeds = [throughput(one) for one in each]
            cpu = 1e3 * median(one["cpu"][0] for one in each)
            row = [case, name, f"{median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})", f"{cpu:.0f}"]
            row.append(f"{undisturbed(name, each):,.0f}")
            if each[0]["alone"]:
                times = (1e3 * median(median(one[what]) for one in each) for what in ("message", "alone"))
                row += [f"{each[0]['megabytes'][0]:.1f}", *(f"{value:.1f}" for value in times)]
            else:
                row += ["", "", ""]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def picture(runs: dict[str, list[Found]], file: Path) -> None:
    import matplotlib.pyplot as plt

    colors = dict(zip(ARRANGEMENTS, ("#d5d5d5", "#e69f00", "#56b4e9"), strict=True))
    figure, axes = plt.subplots(1, len(CASES), figsize=(11, 3.4), layout="constrained")
    for ax, case in zip(axes, CASES, strict=True):
        for x, (name, found) in enumerate(runs.items()):
            speeds = [throughput(run[case]) for run in found]
            ax.bar(x, median(speeds), color=colors[name], width=0.7)
            ax.plot([x] * len(speeds), speeds, "o", color="#222222", markersize=3)
            ax.plot(x, undisturbed(name, [run[case] for run in found]), "D", color="#222222", fillstyle="none")
        ax.set_title(case, fontsize=10)
        names = [name.replace(", ", ",\n").replace("one ", "1 ").replace("two ", "2 ") for name in runs]
        ax.set_xticks(range(len(runs)), names, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("cells a second")
    told = "Bars: medians; dots: runs. Diamonds: had no process waited for a core or for the other, by CPU time."
    figure.suptitle(told, fontsize=9, color="#777777")
    figure.savefig(file, dpi=120)


def main() -> None:
    given = options()
    if given.worker:
        worker(given.worker, compiled=given.compiled)
        return
    import tempfile

    runs: dict[str, list[Found]] = {name: [] for name in list(ARRANGEMENTS)[: 2 + given.threads]}
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.repeats):
            for name, found in runs.items():
                loads.append(os.getloadavg()[0])
                found.append(launched(*ARRANGEMENTS[name], Path(folder) / "found.json", compiled=given.compiled))
    print(f"Load of the machine ({os.cpu_count()} cores) when runs began: {min(loads):.1f} to {max(loads):.1f}.\n")
    print(table(runs))
    if given.json:
        given.json.write_text(json.dumps({"load": loads, "runs": runs}))
    if given.picture:
        picture(runs, given.picture)


if __name__ == "__main__":
    main()
