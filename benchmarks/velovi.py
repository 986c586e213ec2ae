"""pyro_velo beside scvi-tools' VELOVI: seconds per epoch and per posterior draw, peak memory, and recovery.

Each measurement is a process of its own. The sides take turns, so that whatever else the machine does falls on both,
and the table shows medians. See README.md for the commands that make VELOVI's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
UNITS = {
    "epoch_s": "s per epoch",
    "epoch_cpu_s": "CPU s per epoch",
    "draw_s": "s per draw",
    "draw_cpu_s": "CPU s per draw",
    "all_s": "s per draw, all summaries",
    "all_cpu_s": "CPU s per draw, all summaries",
    "train_mb": "MB, training",
    "peak_mb": "MB, training and draws",
}
SCORES = ("ratio", "velocity", "velocity_p10", "time", "coverage", "fit_s")
# This process stays small: on Linux a child's peak memory starts at that of the process which started it.


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="Python that has scvi-tools")
    parser.add_argument("--own-python", default=sys.executable, help="Python that has pyro_velo's dependencies")
    parser.add_argument("--sides", nargs="+", default=["velovi", "pyro_velo"], choices=["velovi", "pyro_velo"])
    parser.add_argument(
        "--genes", nargs="*", type=int, default=[400, 2000], help="numbers of genes; none: recovery only"
    )
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="epochs timed, beyond the first")
    parser.add_argument("--draws", type=int, default=10, help="VELOVI's draws timed, beyond the first two")
    parser.add_argument("--own-draws", type=int, default=98, help="pyro_velo's: with 100 it compiles, as users' do")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument(
        "--recovery", type=int, default=0, metavar="SEEDS", help="also fit the recovery recipe, SEEDS times"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    return parser.parse_args(arguments)


def run(python: str, task: dict[str, Any], folder: Path, script: str = "sides.py") -> dict[str, Any]:
    """The result of a task, done by `script` in a process of its own."""
    task_file, result_file = folder / "task.json", folder / "result.json"
    task_file.write_text(json.dumps(task))
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(task["threads"]),
        "MKL_NUM_THREADS": str(task["threads"]),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)) if python_is_own(task) else os.environ.get("PYTHONPATH", ""),
    }
    # Without this folder on its path, where `scvi.py` would hide the package of that name.
    command = [python, "-P", str(HERE / script), str(task_file), str(result_file)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed on {task}:\n{done.stderr[-3000:]}")
    return json.loads(result_file.read_text())


def python_is_own(task: dict[str, Any]) -> bool:
    return task["side"].startswith("pyro_velo")


def turns(
    settings: argparse.Namespace, job: dict[str, Any], repeats: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Every side's results, the sides taking turns."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in settings.sides}
    for number in range(repeats):
        for side in settings.sides:
            draws = settings.own_draws if side == "pyro_velo" else settings.draws
            task = {"side": side, "threads": settings.threads, "batch": settings.batch, "draws": draws} | job
            results[side].append(run(pythons(settings)[side], task, folder))
            print(f"  {job['job']} {job['data']} {side} {number + 1}/{repeats}: {results[side][-1]}", file=sys.stderr)
    return results


def pythons(settings: argparse.Namespace) -> dict[str, str]:
    return {"velovi": settings.peer_python, "pyro_velo": settings.own_python}


def simulated(settings: argparse.Namespace, folder: Path, cells: int, genes: int, drop: float, seed: int) -> str:
    """A file with simulated layers and their truth."""
    data = str(folder / f"{cells}x{genes}_{seed}.npz")
    task = {"side": "pyro_velo", "job": "simulate", "threads": 1, "data": data}
    run(settings.own_python, task | {"cells": cells, "genes": genes, "drop": drop, "seed": seed}, folder)
    return data


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def speed_table(speed: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Medians of each side, lowest and highest in brackets, and VELOVI's over pyro_velo's."""
    lines = ["| genes | measure | VELOVI | pyro_velo | VELOVI / pyro_velo |", "|---|---|---|---|---|"]
    for genes, sides in speed.items():
        for key, unit in UNITS.items():
            values = {side: [result[key] for result in results] for side, results in sides.items()}
            shown = {side: f"{number(median(v))} ({number(min(v))} to {number(max(v))})" for side, v in values.items()}
            both = len(values) == 2
            ratio = f"{median(values['velovi']) / median(values['pyro_velo']):.1f}" if both else "-"
            lines.append(f"| {genes} | {unit} | {shown.get('velovi', '-')} | {shown.get('pyro_velo', '-')} | {ratio} |")
    return "\n".join(lines)


def recovery_table(recovery: dict[str, list[dict[str, Any]]]) -> str:
    """Mean over seeds of each score."""
    heads = (
        "| | gamma/beta | velocity, median gene | velocity, 10th percentile | time | 90 % interval covers | fit, s |"
    )
    lines = [heads, "|---|---|---|---|---|---|---|"]
    for side, results in recovery.items():
        means = [sum(result[key] for result in results) / len(results) for key in SCORES]
        lines.append(f"| {side} | " + " | ".join(f"{mean:.3g}" for mean in means) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    settings = options(arguments)
    speed: dict[str, dict[str, list[dict[str, Any]]]] = {}
    recovery: dict[str, list[dict[str, Any]]] = {side: [] for side in settings.sides} if settings.recovery else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for genes in settings.genes:
            data = simulated(settings, folder, settings.cells, genes, drop=0.0, seed=0)
            job = {"job": "time", "data": data, "epochs": settings.epochs}
            speed[str(genes)] = turns(settings, job, settings.repeats, folder)
        for seed in range(settings.recovery):
            data = simulated(settings, folder, 1000, 300, drop=0.01, seed=seed)
            job = {"job": "recover", "data": data, "epochs": None, "draws": 100}
            for side, results in turns(settings, job, 1, folder).items():
                recovery[side] += results
    if speed:
        load = max(result["load"] for sides in speed.values() for results in sides.values() for result in results)
        print(f"{settings.cells} cells, batch {settings.batch}, {settings.threads} threads.", end=" ")
        print(f"Median of {settings.repeats} turns (lowest to highest); the machine's load was {load:.1f} at most.\n")
        print(speed_table(speed))
    if recovery:
        print(f"\nThe recovery recipe, 1,000 cells, mean of {settings.recovery} seeds\n\n{recovery_table(recovery)}")
    if settings.json is not None:
        shown = {key: value for key, value in vars(settings).items() if key != "json"}
        settings.json.write_text(json.dumps({"settings": shown, "speed": speed, "recovery": recovery}, indent=1))


if __name__ == "__main__":
    main()
