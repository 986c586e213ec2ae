"""The two sides of the comparison, each in a process of its own: `python sides.py TASK.json RESULT.json`.

Nothing heavy is imported before the side is known, so that each process holds one package and its peak memory is its
own. A task is a JSON object: `side`, `job` ("simulate", "time" or "recover"), `data` (an .npz file), `threads` and the
job's own settings.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Task = dict[str, Any]


class Side(Protocol):
    """What a package must do to be compared."""

    def train(self, layers: dict[str, np.ndarray], epochs: int | None, batch: int, seed: int) -> Any: ...
    def draw(self, fitted: Any, draws: int, batch: int, everything: bool) -> None: ...
    def estimates(self, fitted: Any, draws: int, batch: int) -> dict[str, np.ndarray]: ...
    def version(self) -> str: ...


def _adata(layers: dict[str, np.ndarray]) -> Any:
    from anndata import AnnData

    ms, mu = layers["spliced"].astype(np.float32), layers["unspliced"].astype(np.float32)
    return AnnData(ms, layers={"Ms": ms, "Mu": mu, "spliced": ms, "unspliced": mu})


class Velovi:
    """scvi-tools' VELOVI with its defaults; `epochs=None` trains up to 500 epochs, with early stopping."""

    def train(self, layers: dict[str, np.ndarray], epochs: int | None, batch: int, seed: int) -> Any:
        import scvi
        from scvi.external import VELOVI

        scvi.settings.seed = seed
        adata = _adata(layers)
        VELOVI.setup_anndata(adata, spliced_layer="Ms", unspliced_layer="Mu")
        model = VELOVI(adata)
        model.train(max_epochs=epochs or 500, batch_size=batch, accelerator="cpu", enable_progress_bar=False)
        return model

    def draw(self, fitted: Any, draws: int, batch: int, everything: bool) -> None:
        """The velocity; `everything`: what pyro_velo says with it, too, for which there are three more calls."""
        fitted.get_velocity(n_samples=draws, return_mean=False, return_numpy=True, batch_size=batch)
        if everything:
            for summary in (fitted.get_latent_time, fitted.get_expression_fit, fitted.get_state_assignment):
                summary(n_samples=draws, return_numpy=True, batch_size=batch)

    def estimates(self, fitted: Any, draws: int, batch: int) -> dict[str, np.ndarray]:
        rates = fitted.get_rates()
        samples = fitted.get_velocity(n_samples=draws, return_mean=False, return_numpy=True, batch_size=batch)
        low, high = np.quantile(samples, [0.05, 0.95], axis=0)
        return {
            "ratio": np.asarray(rates["gamma"] / rates["beta"]),
            "velocity": samples.mean(axis=0),
            "low": low,
            "high": high,
            "time": fitted.get_latent_time(n_samples=draws, return_numpy=True, batch_size=batch),
        }

    def version(self) -> str:
        import scvi

        return f"scvi-tools {scvi.__version__}"


class PyroVelo:
    """pyro_velo with its defaults; `epochs=None` trains as long as it likes."""

    def train(self, layers: dict[str, np.ndarray], epochs: int | None, batch: int, seed: int) -> Any:
        import pyro_velo as pv
        from pyro_velo import compiled

        # The runs that are timed are too short for what a whole fit pays for: its step is recorded and compiled, which
        # the difference of two runs leaves out, as torch has it in its cache after the run before them.
        compiled.WORTH_FUSING = compiled.WORTH_RECORDING = 0
        adata = _adata(layers)
        settings = {"batch_size": batch} if epochs is None else {"batch_size": batch, "max_epochs": epochs}
        model = pv.VelocityModel(likelihood=pv.likelihoods.Normal(), priors=pv.Priors())
        return pv.fit(model, pv.guides.Amortized(), adata, seed=seed, settings=pv.TrainSettings(**settings)), adata

    def draw(self, fitted: Any, draws: int, batch: int, everything: bool) -> None:
        """All of it: the velocity alone is no less work."""
        fit, adata = fitted
        fit.write(adata, draws=draws, overwrite=True)

    def estimates(self, fitted: Any, draws: int, batch: int) -> dict[str, np.ndarray]:
        fit, adata = fitted
        fit.write(adata, draws=draws)
        return {
            "ratio": (adata.var["fit_gamma"] / adata.var["fit_beta"]).to_numpy(),
            "velocity": adata.layers["velocity"],
            "low": adata.layers["velocity_q05"],
            "high": adata.layers["velocity_q95"],
            "time": adata.layers["fit_t"],
        }

    def version(self) -> str:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return f"pyro_velo {version('pyro_velo')}"
        except PackageNotFoundError:
            return "pyro_velo (from the working tree)"


SIDES: dict[str, Callable[[], Side]] = {"velovi": Velovi, "pyro_velo": PyroVelo}


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB (Linux counts in kB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _seconds(call: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Seconds by the clock on the wall and of CPU time, and what the call returned."""
    gc.collect()
    start = time.perf_counter(), time.process_time()
    result = call()
    return np.subtract((time.perf_counter(), time.process_time()), start), result


def simulate(task: Task) -> dict[str, Any]:
    """Draw the recipe's data, and write it with its truth to the .npz file."""
    from pyro_velo.simulate import LogNormalRates, Settings, simulate

    settings = Settings(kinetics=LogNormalRates(drop=task["drop"]))
    x = simulate(task["cells"], task["genes"], settings=settings, seed=task["seed"])
    truth = {"ratio": x.true_gamma / x.true_beta, "velocity": x.true_velocity, "time": x.true_t}
    np.savez(task["data"], spliced=x.spliced, unspliced=x.unspliced, **truth)
    return {"shape": x.spliced.shape}


def timing(task: Task) -> dict[str, Any]:
    """Seconds per epoch, per draw and per draw of everything (`all_`), and peak memory.

    All times are differences between a long and a short run, so that what happens once a run (checking the data,
    starting values, the first call of every kernel) is in none. `..._cpu_s` counts the seconds of all threads: it
    tells how much of the wall clock went to other programs.
    """
    side, layers = SIDES[task["side"]](), _layers(task["data"], scaled=True)
    epochs, draws, batch = task["epochs"], task["draws"], task["batch"]
    side.version()
    imported = peak_mb()
    side.train(layers, 1, batch, 0)
    short, _ = _seconds(lambda: side.train(layers, 1, batch, 0))
    long, fitted = _seconds(lambda: side.train(layers, 1 + epochs, batch, 0))
    trained = peak_mb()

    def per_draw(everything: bool) -> np.ndarray:
        side.draw(fitted, 2 + draws, batch, everything)
        few, _ = _seconds(lambda: side.draw(fitted, 2, batch, everything))
        many, _ = _seconds(lambda: side.draw(fitted, 2 + draws, batch, everything))
        return (many - few) / draws

    (draw_s, draw_cpu_s), drawn = per_draw(False), peak_mb()
    all_s, all_cpu_s = per_draw(True)
    epoch_s, epoch_cpu_s = (long - short) / epochs
    return {
        "version": side.version(),
        "epoch_s": epoch_s,
        "epoch_cpu_s": epoch_cpu_s,
        "draw_s": draw_s,
        "draw_cpu_s": draw_cpu_s,
        "all_s": all_s,
        "all_cpu_s": all_cpu_s,
        "load": os.getloadavg()[0],
        "imported_mb": imported,
        "train_mb": trained,
        "peak_mb": drawn,
    }


def recover(task: Task) -> dict[str, Any]:
    """How well a fit with default settings recovers the truth."""
    side = SIDES[task["side"]]()
    seconds, fitted = _seconds(
        lambda: side.train(_layers(task["data"], scaled=False), task["epochs"], task["batch"], 0)
    )
    found = side.estimates(fitted, task["draws"], task["batch"])
    with np.load(task["data"]) as truth:
        return {"version": side.version(), "fit_s": float(seconds[0]), **scores(found, truth)}


def scores(found: dict[str, np.ndarray], truth: Any) -> dict[str, float]:
    """Correlations with the truth, and the share of true velocities within the 90 % interval, of the genes fitted."""
    fitted = np.isfinite(found["ratio"])
    velocity = truth["velocity"][:, fitted]
    by_gene = _pearson(found["velocity"][:, fitted], velocity)
    times = _pearson(_ranks(found["time"][:, fitted]), _ranks(truth["time"])[:, None])
    inside = (found["low"][:, fitted] <= velocity) & (velocity <= found["high"][:, fitted])
    return {
        "genes": int(fitted.sum()),
        "ratio": float(_pearson(found["ratio"][fitted], truth["ratio"][fitted])),
        "velocity": float(np.median(by_gene)),
        "velocity_p10": float(np.percentile(by_gene, 10)),
        "time": float(np.median(times)),
        "coverage": float(inside.mean()),
    }


def _ranks(x: np.ndarray) -> np.ndarray:
    return x.argsort(axis=0).argsort(axis=0).astype(float)


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


def _layers(path: str, scaled: bool) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        layers = {name: data[name] for name in ("spliced", "unspliced")}
    return {name: (x - x.min(axis=0)) / np.ptp(x, axis=0) for name, x in layers.items()} if scaled else layers


JOBS: dict[str, Callable[[Task], dict[str, Any]]] = {"simulate": simulate, "time": timing, "recover": recover}


def main(task_file: str, result_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    import torch

    torch.set_num_threads(task["threads"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = JOBS[task["job"]](task)
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
