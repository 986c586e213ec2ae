"""The sides of `reach.py`, each in a process of its own: `python -P reach_sides.py TASK.json RESULT.json`.

Each trains with its defaults and, as it goes, says what it makes of the cells that it never trains on. A task is a JSON
object: `side`, `data` (an .npz file with layers scaled to [0, 1], and the cells to train on and to score), `threads`,
`batch`, `looks` (steps between two), `draws`, `seed` and `steps` (of pyro_velo's fits; null: its default).
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
    """One draw: `weights` of the states, means and sds of both molecules, (cells, genes, states) or broadcast to it.

    `weights` are the concentrations of the Dirichlet from which a package draws the states' probabilities.
    """

    weights: np.ndarray
    u: np.ndarray
    s: np.ndarray
    u_sd: np.ndarray
    s_sd: np.ndarray


MEASURES = ("each", "pair", "one_state")


def predictive(draws: list[Mixture], u: np.ndarray, s: np.ndarray, one_state: bool) -> dict[str, float]:
    r"""Log predictive densities of cells: the mean over cells of sums over genes, each a mean over draws of a density.

    | | density of a cell and gene, pi ~ Dirichlet(weights) integrated out |
    |---|---|
    | `each` | $\sum_k E[\pi_k] p_k(u) \cdot \sum_k E[\pi_k] p_k(s)$: u and s as if they were two cells' |
    | `pair` | (u, s) in the package's model: the next one, or $\sum_{kl} E[\pi_k \pi_l] p_k(u) p_l(s)$ |
    | `one_state` | $\sum_k E[\pi_k] p_k(u) p_k(s)$: both molecules in one state |

    Integrated, so that it is of no weight whether a package samples probabilities or integrates them. In `each` the
    mean over draws is taken of u's density and of s's.

    Reference: Gelman et al. 2014, Understanding predictive information criteria for Bayesian models, eq. 5.
    """
    found = [_of_draw(draw, u, s, one_state) for draw in draws]
    means = {name: _log_mean([each[name] for each in found]).sum(-1).mean() for name in found[0]}
    return {"each": float(means["u"] + means["s"])} | {name: float(means[name]) for name in MEASURES[1:]}


def _of_draw(draw: Mixture, u: np.ndarray, s: np.ndarray, one_state: bool) -> dict[str, np.ndarray]:
    total = draw.weights.sum(-1, keepdims=True)
    mean = np.log(draw.weights / total)
    of_u, of_s = _log_normal(u, draw.u, draw.u_sd), _log_normal(s, draw.s, draw.s_sd)
    found = {"u": _log_sum(mean + of_u), "s": _log_sum(mean + of_s), "one_state": _log_sum(mean + of_u + of_s)}
    return found | {"pair": found["one_state"] if one_state else _states_apart(draw.weights, total, of_u, of_s)}


def _states_apart(weights: np.ndarray, total: np.ndarray, of_u: np.ndarray, of_s: np.ndarray) -> np.ndarray:
    """The log of the sum over k and l of E[pi_k pi_l] p_k(u) p_l(s); E[pi_k pi_l] = w_k (w_l + [k = l]) / W (W + 1)."""
    terms = []
    for k in range(weights.shape[-1]):
        both = weights[..., k, None] * (weights + np.eye(weights.shape[-1])[k]) / (total * (total + 1))
        terms.append(_log_sum(np.log(both) + of_u[..., k, None] + of_s))
    return _log_sum(np.stack(terms, -1))


def _log_normal(x: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    return -0.5 * ((x[..., None] - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)


def _log_sum(terms: np.ndarray) -> np.ndarray:
    top = terms.max(-1)
    return top + np.log(np.exp(terms - top[..., None]).sum(-1))


def _log_mean(draws: list[np.ndarray]) -> np.ndarray:
    return _log_sum(np.stack(draws, -1)) - np.log(len(draws))


class Watch:
    """Seconds since it was made, by the clock and of CPU time, less those in which it looked at the held-out cells."""

    def __init__(self, score: Callable[[Any], dict[str, float]]) -> None:
        self.score, self.start, self.course = score, self._now(), list[dict[str, float]]()

    def look(self, subject: Any) -> None:
        reached = self._now()
        seconds, cpu = reached - self.start
        self.course.append({"s": float(seconds), "cpu_s": float(cpu)} | self.score(subject))
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
        # Softplus can give 0, of which there is no logarithm.
        weights = found["px_pi_alpha"].clamp_min(torch.finfo(torch.float32).tiny)
        tensors = (weights, *(p.loc for p in parts), *(p.scale for p in parts))
        return Mixture(*(x.double().numpy() for x in tensors))

    def score(module: Any) -> dict[str, float]:
        module.eval()
        with torch.no_grad(), torch.random.fork_rng():
            found = predictive([draw(module) for _ in range(task["draws"])], u[scored], s[scored], one_state=False)
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


def states_apart() -> None:
    """From now on pyro_velo draws a state for each molecule from the same probabilities, as VELOVI does."""
    import torch

    from pyro_velo.compiled import fusible
    from pyro_velo.mixture import Scored
    from pyro_velo.models.velocity import C_K, Landmarks, Rates, VelocityProgram, spread

    @fusible
    def log_density(program: Any, log_weights: Any, timed: Any, landmarks: Any, values: Any, batch: Any) -> Any:
        like = log_weights[0]
        values = {name: spread(value, like) for name, value in values.items()}
        landmarks = Landmarks(*((spread(u, like), spread(s, like)) for u, s in landmarks))
        means = program.means(Rates(*(values[name] for name in Rates._fields)), values, timed, landmarks)
        of_u, of_s = [], []
        for log_weight, u, s, scale in zip(program.weighted(log_weights, timed), *means, C_K, strict=True):
            unspliced, spliced = program.likelihoods(u, s, values, batch, scale)
            of_u.append(log_weight + unspliced.log_prob(batch.u))
            of_s.append(log_weight + spliced.log_prob(batch.s))
        return torch.stack(of_u).logsumexp(0) + torch.stack(of_s).logsumexp(0)

    def molecules(self: Any, log_weights: Any, timed: Any, landmarks: Any, values: Any, batch: Any) -> Scored:
        density = log_density(self, log_weights, timed, landmarks, dict(values), batch)
        return Scored(density, torch.Size([2]))

    VelocityProgram.molecules = molecules


def pyro_velo_apart(layers: dict[str, np.ndarray], task: dict[str, Any]) -> Watch:
    """As `pyro_velo`, with VELOVI's likelihood: what is left are the package's start, network, guide and steps."""
    states_apart()
    return pyro_velo(layers, task, one_state=False)


def pyro_velo(layers: dict[str, np.ndarray], task: dict[str, Any], one_state: bool = True) -> Watch:
    """pyro_velo's defaults but for a Normal; at each look the parameters that the fit would keep if it ended there.

    A Normal, as VELOVI has: of zeros, a quarter of the unspliced values, a Tobit says no density but that there is no
    more than that, so that its means may lie anywhere below.
    """
    import torch
    from pyro import poutine

    import pyro_velo as pv
    from pyro_velo.batch import Cells
    from pyro_velo.kinetics import Rates
    from pyro_velo.models.velocity import C_K, RATES
    from pyro_velo.train import TrainSettings, load_parameters, train

    u, s = layers["unspliced"], layers["spliced"]
    scored = layers["scored"]
    model, guide = pv.VelocityModel(likelihood=pv.likelihoods.Normal()), pv.guides.Amortized()
    cells = Cells.of(torch.from_numpy(u), torch.from_numpy(s))
    kept: list[dict[str, Any]] = []

    def keep(training: Any) -> dict[str, float]:
        kept.append(training.best)
        return {}

    watch = Watch(keep)
    length = {} if task["steps"] is None else {"max_steps": task["steps"]}
    settings = TrainSettings(batch_size=task["batch"], seed=task["seed"], evaluate_steps=task["looks"], **length)
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
        scale = torch.tensor(C_K)
        sds = (values[f"noise_{molecule}"][:, None] * scale for molecule in ("unspliced", "spliced"))
        return Mixture(*(x.double().numpy() for x in (values["pi"], u_mean, s_mean, *sds)))

    def score(parameters: dict[str, Any]) -> dict[str, float]:
        with fitted.parameters(), torch.no_grad(), torch.random.fork_rng():
            load_parameters(parameters)
            return predictive([draw() for _ in range(task["draws"])], u[scored], s[scored], one_state)

    watch.course = [look | score(parameters) for look, parameters in zip(watch.course, kept, strict=True)]
    return watch


SIDES: dict[str, Callable[[dict[str, np.ndarray], dict[str, Any]], Watch]] = {
    "velovi": velovi,
    "pyro_velo": pyro_velo,
    "pyro_velo_apart": pyro_velo_apart,
}


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
