"""pyro_velo's VAE beside scvi-tools' SCVI on the pancreas' spliced counts: seconds per epoch, and the held-out bound.

Both get the same cells and genes, hold out the same cells, and have one hidden layer of 128, 10 latent dimensions, one
dispersion for each gene and the same batch. Both bounds are importance-weighted with as many draws. Each measurement
is a process of its own, and the sides take turns. See README.md for the environment that SCVI lives in.
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

from velovi import number, run

PANCREAS = Path(os.environ.get("PYRO_VELO_DATA", "../shared/data")) / "pancreas.h5ad"
SIDES = ("scvi", "pyro_velo")


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has scvi-tools")
    parser.add_argument("--own-python", default=sys.executable, help="Python that has pyro_velo's dependencies")
    parser.add_argument("--likelihoods", nargs="+", default=["nb"], choices=["poisson", "nb", "zinb"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5, help="epochs timed, beyond the first")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--particles", type=int, default=50, help="draws of z for each held-out cell's bound")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of the fits whose bounds are compared")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    return parser.parse_args(arguments)


def turns(settings: argparse.Namespace, job: dict[str, Any], repeats: int, folder: Path) -> dict[str, list[dict]]:
    """Every side's results, the sides taking turns."""
    pythons = dict(zip(SIDES, (settings.peer_python, settings.own_python), strict=True))
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    for turn in range(repeats):
        for side in SIDES:
            task = {"side": side, "threads": settings.threads, "batch": settings.batch, "data": str(PANCREAS.resolve())}
            results[side].append(run(pythons[side], task | job, folder, "profile_sides.py"))
            print(f"  {job} {side} {turn + 1}/{repeats}: {_short(results[side][-1])}", file=sys.stderr, flush=True)
    return results


def _short(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if not isinstance(value, list)}


def speed_rows(likelihood: str, found: dict[str, list[dict]]) -> list[str]:
    """Medians of each side, lowest and highest in brackets, and SCVI's over pyro_velo's."""
    rows = []
    for key, unit in (("epoch_s", "s per epoch"), ("epoch_cpu_s", "CPU s per epoch")):
        values = [[result[key] for result in found[side]] for side in SIDES]
        shown = [f"{number(median(v))} ({number(min(v))} to {number(max(v))})" for v in values]
        ratio = median(values[0]) / median(values[1])
        rows.append(f"| {likelihood}: {unit} | {shown[0]} | {shown[1]} | {ratio:.1f} times |")
    return rows


def bound_rows(likelihood: str, seed: int, found: dict[str, list[dict]]) -> list[str]:
    """The mean bounds, and the mean and standard error over cells of their difference."""
    peer, own = (found[side][0] for side in SIDES)
    gap = [b - a for a, b in zip(peer["bound"], own["bound"], strict=True)]
    mean = sum(gap) / len(gap)
    error = (sum((x - mean) ** 2 for x in gap) / (len(gap) - 1) / len(gap)) ** 0.5
    shown = " | ".join(f"{sum(side['bound']) / len(gap):.2f}" for side in (peer, own))
    fits = " | ".join(f"{side['epochs']} epochs, {number(side['fit_cpu_s'])}" for side in (peer, own))
    return [
        f"| {likelihood}, seed {seed}: bound per held-out cell, nats | {shown} | {mean:+.2f} ± {error:.2f} |",
        f"| {likelihood}, seed {seed}: CPU s of the fit | {fits} | |",
    ]


def main(arguments: list[str] | None = None) -> None:
    settings = options(arguments)
    lines, measured = ["| | SCVI | pyro_velo | |", "|---|---|---|---|"], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for likelihood in settings.likelihoods:
            job = {"job": "time", "likelihood": likelihood, "epochs": settings.epochs}
            speed = turns(settings, job, settings.repeats, folder)
            lines += speed_rows(likelihood, speed)
            measured[likelihood] = {"speed": speed, "bounds": {}}
            for seed in settings.seeds:
                job = {"job": "bound", "likelihood": likelihood, "seed": seed, "particles": settings.particles}
                bounds = turns(settings, job, 1, folder)
                lines += bound_rows(likelihood, seed, bounds)
                measured[likelihood]["bounds"][seed] = bounds
    versions = " and ".join(speed[side][0]["version"] for side in SIDES)
    load = max(result["load"] for side in SIDES for result in speed[side])
    print(f"{versions}; batch {settings.batch}, {settings.threads} threads; load {load:.1f} at most.\n")
    print("\n".join(lines))
    if settings.json is not None:
        settings.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
