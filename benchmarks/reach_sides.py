"""The sides of `reach.py`, each in a process of its own: `python -P reach_sides.py TASK.json RESULT.json`.

Each trains with its defaults and, as it goes, says what it makes of the cells that it never trains on. A task is a JSON
object: `side`, `data` (an .npz file with layers scaled to [0, 1], and the cells to train on and to score), `threads`,
`batch`, `looks` (steps between two), `draws` and `seed`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Mixture(NamedTuple):
    """One draw: `weights` of the states, means and sds of both molecules, (cells, genes, states) or broadcast to it."""

    weights: np.ndarray
    u: np.ndarray
    s: np.ndarray
    u_sd: np.ndarray
    s_sd: np.ndarray


def predictive(draws: list[Mixture], u: np.ndarray, s: np.ndarray) -> float:
    """The mean over cells of the sum over genes of log p(u) + log p(s), each a mean over draws within the logarithm.

    Each molecule is a mixture of its own, as VELOVI has them. With the mean weights of a draw's Dirichlet these are
    integrated exactly, so that it is of no weight whether a package samples or integrates them.

    Reference: Gelman et al. 2014, Understanding predictive information criteria for Bayesian models, eq. 5.
    """
    found = 0.0
    for x, name in ((u, "u"), (s, "s")):
        drawn = np.stack([_log_mixture(x, d.weights, getattr(d, name), getattr(d, f"{name}_sd")) for d in draws])
        top = drawn.max(0)
        found += float((top + np.log(np.exp(drawn - top).mean(0))).sum(-1).mean())
    return found


def _log_mixture(x: np.ndarray, weights: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    terms = np.log(weights) - 0.5 * ((x[..., None] - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
    top = terms.max(-1)
    return top + np.log(np.exp(terms - top[..., None]).sum(-1))


class Watch:
    """Seconds since it was made, by the clock and of CPU time, less those in which it looked at the held-out cells."""

    def __init__(self, score: Callable[[Any], float]) -> None:
        self.score, self.start, self.course = score, self._now(), list[tuple[float, float, float]]()

    def look(self, subject: Any) -> None:
        reached = self._now()
        self.course.append((*(reached - self.start), self.score(subject)))
        self.start += self._now() - reached

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])


def velovi(layers: dict[str, np.ndarray], task: dict[str, Any]) -> Watch:
    """scvi-tools' VELOVI, up to 500 epochs, with early stopping."""
    import scvi
    import torch
    from anndata import AnnData
    from lightning.pytorch.callbacks import Callback
    from scvi.external import VELOVI

    scvi.settings.seed = task["seed"]
    u, s = layers["unspliced"], layers["spliced"]
    adata = AnnData(s, layers={"Ms": s, "Mu": u})
    seen, scored = layers["seen"], layers["scored"]
    told = {"spliced": torch.from_numpy(s[scored]), "unspliced": torch.from_numpy(u[scored])}

    def draw(module: Any) -> Mixture:
        inferred = module.inference(**told)
        names = ("z", "gamma", "beta", "alpha", "alpha_1", "lambda_alpha")
        found = module.generative(**{name: inferred[name] for name in names})
        u_mixture, s_mixture = found["mixture_dist_u"], found["mixture_dist_s"]
        parts = [each.component_distribution for each in (u_mixture, s_mixture)]
        weights = found["px_pi_alpha"] / found["px_pi_alpha"].sum(-1, keepdim=True)
        tensors = (weights, *(p.loc for p in parts), *(p.scale for p in parts))
        return Mixture(*(x.double().numpy() for x in tensors))

    def score(module: Any) -> float:
        module.eval()
        with torch.no_grad(), torch.random.fork_rng():
            found = predictive([draw(module) for _ in range(task["draws"])], u[scored], s[scored])
        module.train()
        return found

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, plan: Any) -> None:
            if trainer.current_epoch % every == 0:
                watch.look(plan.module)

    every = max(1, round(task["looks"] / np.ceil(len(seen) / task["batch"])))
    watch = Watch(score)
    VELOVI.setup_anndata(adata, spliced_layer="Ms", unspliced_layer="Mu")
    model = VELOVI(adata)
    model.train(
        max_epochs=500,
        batch_size=task["batch"],
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        external_indexing=[seen, scored, np.array([], np.int64)],
        callbacks=[Look()],
    )
    # Where it stopped, early stopping or not.
    watch.look(model.module)
    return watch


def pyro_velo(layers: dict[str, np.ndarray], task: dict[str, Any]) -> Watch:
    """pyro_velo's defaults; at each look the parameters that the fit would keep if it ended there."""
    import torch
    from pyro import poutine

    import pyro_velo as pv
    from pyro_velo.batch import Cells
    from pyro_velo.kinetics import Rates
    from pyro_velo.models.velocity import C_K, RATES
    from pyro_velo.train import TrainSettings, load_parameters, train

    u, s = layers["unspliced"], layers["spliced"]
    scored = layers["scored"]
    model, guide = pv.VelocityModel(), pv.guides.Amortized()
    cells = Cells.of(torch.from_numpy(u), torch.from_numpy(s))
    kept: list[dict[str, Any]] = []

    def keep(training: Any) -> float:
        kept.append(training.best)
        return np.nan

    watch = Watch(keep)
    settings = TrainSettings(batch_size=task["batch"], seed=task["seed"], evaluate_steps=task["looks"])
    fitted = train(model, guide, cells, settings=settings, on_evaluation=watch.look, progress=False)

    program, batch = fitted.program, cells.batch(torch.from_numpy(scored))

    def draw() -> Mixture:
        trace = poutine.trace(fitted.guide).get_trace(batch)
        values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
        rates = Rates(*(values[name] for name in RATES))
        told = batch.conditioned(program.of_kinetics(values["z"].squeeze(-2)))
        timed = program.times(told, rates.switch_time, values)
        means = program.means(rates, values, timed, program.landmarks(rates, values))
        shape = (len(scored), program.n_genes)
        ratioed = ([mean / program.ratio for mean in means.u], means.s)
        u_mean, s_mean = (torch.stack([mean.expand(shape) for mean in each], -1) for each in ratioed)
        weights = values["pi"] / values["pi"].sum(-1, keepdim=True)
        scale = torch.tensor(C_K)
        sds = (values[f"noise_{molecule}"][:, None] * scale for molecule in ("unspliced", "spliced"))
        return Mixture(*(x.double().numpy() for x in (weights, u_mean, s_mean, *sds)))

    def score(parameters: dict[str, Any]) -> float:
        with fitted.parameters(), torch.no_grad(), torch.random.fork_rng():
            load_parameters(parameters)
            return predictive([draw() for _ in range(task["draws"])], u[scored], s[scored])

    scores = [score(parameters) for parameters in kept]
    watch.course = [(*times, found) for (*times, _), found in zip(watch.course, scores, strict=True)]
    return watch


SIDES: dict[str, Callable[[dict[str, np.ndarray], dict[str, Any]], Watch]] = {"velovi": velovi, "pyro_velo": pyro_velo}


def main(task_file: str, result_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    import torch

    torch.set_num_threads(task["threads"])
    with np.load(task["data"]) as data:
        layers = dict(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watch = SIDES[task["side"]](layers, task)
    Path(result_file).write_text(json.dumps({"course": watch.course, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
