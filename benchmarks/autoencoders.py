"""The autoencoders on data whose truth is known: rates, clusters, their number, conversions, and handwritten digits.

Each task prints a row a seed; `curves` writes a picture of the synthetic Poisson's log-likelihood and KL by epoch.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.agreement import Agreement, agreement
from pyro_velo.cluster_number import choose_clusters, judged
from pyro_velo.clustering import TRAINING, Started, elbo_for, fit_profiles
from pyro_velo.communities import spread
from pyro_velo.encoders import Encoder
from pyro_velo.evidence import evidence
from pyro_velo.last_layer import LastLayer
from pyro_velo.latent import Interval, cluster_probabilities, converted, denoised, latent_means
from pyro_velo.likelihoods import NB, ZINB, ZIP, Bernoulli, Poisson
from pyro_velo.profiles import UNKNOWN, ProfileBatch, Profiles
from pyro_velo.starts import Start, StartSettings, graph_of, mixture_start, view_of
from pyro_velo.train import Fitted, Training, TrainSettings, restore, train

SHARE_OF_LABELS = 0.05


def poisson(seed: int) -> dict[str, Any]:
    """Seed 001, 3.2: ten genes of rates 1 to 10 in 2,000 cells, a layer of seven neurons, three latent dimensions."""
    counts = simulate.simulate_poisson(seed=seed)
    cells = Profiles.of_counts(torch.from_numpy(counts), depth=False)
    model = pv.VAE(Poisson(), n_latent=3, hidden=(7,))
    settings = replace(TRAINING, seed=seed)
    found = denoised(fit_profiles(model, Encoder((7,)), cells, settings=settings, progress=False), cells).mean(0)
    rates = np.arange(1, 11)
    return {
        "worst rate, % off": 100 * np.abs(found / rates - 1).max(),
        "worst mean of the counts themselves, % off": 100 * np.abs(counts.mean(0) / rates - 1).max(),
    }


def curves(path: Path, seed: int = 0) -> None:
    """E[log p(x | z)] and KL per cell by epoch on the synthetic Poisson, from the states that training passes."""
    import matplotlib.pyplot as plt

    cells = Profiles.of_counts(torch.from_numpy(simulate.simulate_poisson(seed=seed)), depth=False)
    model, guide, states = pv.VAE(Poisson(), n_latent=3, hidden=(7,)), Encoder((7,)), list[Training]()
    settings = replace(TRAINING, seed=seed, max_steps=600, evaluate_steps=8, patience=1000, warmup=0.0)
    train(model, guide, cells, settings=settings, elbo=elbo_for(model), on_evaluation=states.append, progress=False)
    terms = np.array([_terms(restore(model, guide, cells, replace(s, best=s.parameters)), cells) for s in states])
    epochs = [state.epoch for state in states]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for ax, values, name in zip(axes, terms.T, ("E[log p(x | z)]", "KL(q(z | x) || p(z))"), strict=True):
        ax.plot(epochs, values, color="#0072b2")
        ax.set(xlabel="epoch", ylabel=f"{name}, nats per cell")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    first, last = terms[0], terms[-1]
    print(f"log-likelihood {first[0]:.3f} to {last[0]:.3f}, KL {first[1]:.3f} to {last[1]:.5f}; wrote {path}")


def _terms(fitted: Fitted, cells: Profiles) -> tuple[float, float]:
    batch = cells.batch(torch.arange(len(cells)))
    with fitted.parameters(), pyro.validation_enabled(False), torch.no_grad():
        torch.manual_seed(0)
        guide = poutine.trace(fitted.guide).get_trace(batch)
        program = poutine.trace(poutine.replay(fitted.program, trace=guide)).get_trace(batch)
    kl = kl_divergence(guide.nodes["z"]["fn"].base_dist, program.nodes["z"]["fn"].base_dist).sum()
    x = program.nodes["x"]
    return float(x["fn"].log_prob(x["value"]).sum() / len(cells)), float(kl / len(cells))


def clusters(seed: int, n_cells: int = 1000, n_genes: int = 50) -> dict[str, Any]:
    """Five clusters of negative binomial counts; and the share of cells that the truth itself would place right."""
    found = simulate.simulate_clusters(n_cells, n_genes, seed=seed)
    cells = Profiles.of_counts(torch.from_numpy(found.counts))
    fitted = fit_profiles(pv.GMVAE(5), None, cells, settings=replace(TRAINING, seed=seed), progress=False)
    score = agreement(found.label, _clusters(fitted, cells))
    return {
        "ARI": score.ari,
        "NMI": score.nmi,
        "accuracy": score.accuracy,
        "ARI of the truth's Bayes rule": _bayes(found),
    }


def _bayes(found: simulate.ClusterSimulation) -> float:
    """The ARI of the clusters to which cells go when every mean, library size and dispersion is known."""
    from scipy.stats import nbinom

    mean = found.library[:, None, None] * np.exp(found.log_mean[:, 0])
    theta = found.settings.noise.theta
    log_p = nbinom.logpmf(found.counts[:, None], theta, theta / (theta + mean)).sum(-1)
    return agreement(found.label, log_p.argmax(1)).ari


def number(seed: int, true: int = 5, n_cells: int = 1000, n_genes: int = 50) -> dict[str, Any]:
    """How many clusters there are said to be, of 1 to 3 where there is one, else of 1 and those around the truth."""
    settings = simulate.ClusterSettings(clusters=true)
    found = simulate.simulate_clusters(n_cells, n_genes, settings=settings, seed=seed)
    cells = Profiles.of_counts(torch.from_numpy(found.counts))
    candidates = (1, 2, 3) if true == 1 else (1, true - 1, true, true + 1, true + 3)
    chosen = choose_clusters(
        pv.GMVAE(1), None, cells, candidates, settings=replace(TRAINING, seed=seed, max_steps=600),
        start=StartSettings(restarts=1), progress=False,
    )  # fmt: skip
    return {"true": true, "chosen": chosen.choice, "bounds": " ".join(f"{b:.2f}" for b in chosen.bounds)}


def null(seed: int) -> dict[str, Any]:
    """As `number`, where there is one cluster."""
    return number(seed, true=1)


KINDS = {
    f"{covariance}, {start}": (covariance == "full", StartSettings(restarts=1, neighbours=neighbours))
    for covariance in ("diagonal", "full")
    for start, neighbours in (("EM", 0), ("graph", 15))
}
"""What clusters may be, and where they start: all that `--covariance` and `--neighbours` say."""


def kinds(seed: int, n_cells: int = 1000, n_genes: int = 50) -> dict[str, Any]:
    """`clusters` for each of `KINDS`, and how many clusters each says there are where there is one (`null`)."""
    found = simulate.simulate_clusters(n_cells, n_genes, seed=seed)
    cells = Profiles.of_counts(torch.from_numpy(found.counts))
    row = {}
    for name, fits in _each_kind(cells, (5,), replace(TRAINING, seed=seed)).items():
        row[f"{name}: ARI"] = agreement(found.label, _clusters(fits[5], cells)).ari
    found = simulate.simulate_clusters(n_cells, n_genes, settings=simulate.ClusterSettings(clusters=1), seed=seed)
    cells = Profiles.of_counts(torch.from_numpy(found.counts))
    for name, fits in _each_kind(cells, (1, 2, 3), replace(TRAINING, seed=seed, max_steps=600)).items():
        row[f"{name}: of one"] = judged(fits, {k: evidence(fit, cells) for k, fit in fits.items()}).choice
    return row


def _each_kind(cells: Profiles, numbers: Iterable[int], settings: TrainSettings) -> dict[str, dict[int, Fitted]]:
    """Fits with each number of clusters, of each of `KINDS`, that go on from one VAE."""
    begun = Started.of(
        pv.GMVAE(1), None, cells, settings=settings, start=StartSettings(neighbours=15), progress=False
    )  # fmt: skip
    return {
        name: {k: replace(begun, start=start).fit(pv.GMVAE(k, correlated=correlated)) for k in numbers}
        for name, (correlated, start) in KINDS.items()
    }


def transfer(seed: int, n_cells: int = 1500, n_genes: int = 60) -> dict[str, Any]:
    """Five types under two conditions; the first type is never seen under the second, to which it is converted."""
    settings = simulate.ClusterSettings(conditions=2)
    found = simulate.simulate_clusters(n_cells, n_genes, settings=settings, seed=seed)
    unseen = (found.label == 0) & (found.condition == 1)
    everyone = Profiles.of_counts(torch.from_numpy(found.counts), covariates=torch.eye(2)[found.condition])
    cells = everyone.among(torch.from_numpy(np.flatnonzero(~unseen)))
    label, condition = found.label[~unseen], found.condition[~unseen]
    fitted = fit_profiles(pv.CGMDVAE(5), None, cells, settings=replace(TRAINING, seed=seed), progress=False)
    clusters = _clusters(fitted, cells)
    source = np.flatnonzero((label == 0) & (condition == 0))
    part = cells.among(torch.from_numpy(source))
    last_layer, others = LastLayer.of(fitted, cells, seed=seed), torch.eye(2)[[1]].expand(len(part), 2)
    made = converted(fitted, part, others, mean=True, seed=seed, last_layer=last_layer)
    point = converted(fitted, part, others, mean=True, seed=seed)
    each = converted(fitted, part, others, seed=seed, last_layer=last_layer)
    # What is expected of the unseen cells, and not the mean of those that happen to be there, which scatters as much.
    expected = np.exp(found.log_mean[0, 1]) / np.exp(found.log_mean[0, 1]).sum() * float(everyone.x.sum(1).median())
    profiles = (everyone.x / everyone.size_factors).numpy()
    truth, seen = profiles[unseen].mean(0), profiles[~unseen]
    rest = label != 0
    shift = seen[rest & (condition == 1)].mean(0) - seen[rest & (condition == 0)].mean(0)
    return {
        "ARI, types": agreement(label, clusters).ari,
        "ARI, conditions": agreement(condition, clusters).ari,
        "R2 of the conversion": _r2(made.mean, truth),
        "of the mean shift": _r2(seen[source].mean(0) + shift, truth),
        "of no change": _r2(seen[source].mean(0), truth),
        "90 % intervals of the mean cover": _coverage(made, expected),
        "without the last layer's posterior": _coverage(point, expected),
        "90 % intervals of cells cover": _coverage(each, expected),
    }


DATA = Path(os.environ.get("PYRO_VELO_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
DIGITS = {"hidden": (500, 500), "correlated": True}
SPREAD = StartSettings(vae_steps=2000, restarts=1, neighbours=15, inits=30)
"""Digits are no ellipses in any latent space: clusters start as communities, and most searches miss the best."""


@dataclass(frozen=True)
class Shades(Profiles):
    """Images in shades of grey, of which each batch has zeros and ones drawn anew: a shade is the probability of a 1.

    So Salakhutdinov & Murray (2008) and Burda et al. (2016, section 5.1) make digits binary. `x` is the likelier of the
    two, which a program reads its start off.
    """

    shades: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def batch(self, index: Tensor, n_cells: int | None = None) -> ProfileBatch:
        """The images at `index` (B,), their zeros and ones drawn from torch's generator."""
        return replace(super().batch(index, n_cells), x=torch.bernoulli(self.shades[index]))

    @property
    def still(self) -> Profiles:
        """The shades themselves, which an encoder sees as the mean of what is drawn: for looks at a fit."""
        return Profiles(self.shades, labels=self.labels)


def mnist(seed: int) -> dict[str, Any]:
    """10,000 images of digits, zeros and ones, without labels."""
    fitted = _started(seed).fit(pv.GMVAE(10, Bernoulli(), **DIGITS))
    cells, digit = _digits()
    score = agreement(digit, _clusters(fitted, cells.still))
    return {"accuracy": score.accuracy, "ARI": score.ari, "NMI": score.nmi}


def mnist_labels(seed: int) -> dict[str, Any]:
    """The same with the labels of 5 % of them; the accuracy is that of the others."""
    cells, digit = _digits()
    known = np.random.default_rng(seed).random(len(digit)) < SHARE_OF_LABELS
    labels = np.where(known, digit, UNKNOWN)
    cells, begun = replace(cells, labels=torch.from_numpy(labels)), _started(seed)
    begun = replace(begun, cells=cells, start=replace(SPREAD, neighbours=5, sure=0.9))
    fitted = begun.fit(pv.CGMDVAE(10, Bernoulli(), classify=5.0, **DIGITS))
    reached = spread(graph_of(begun.z, begun.view, 5), labels, 10)
    return {
        "accuracy of the others": float((_clusters(fitted, cells.still) == digit)[~known].mean()),
        "that of labels spread along the graph": float((reached.argmax(1) == digit)[~known].mean()),
    }


@cache
def _started(seed: int) -> Started:
    """The digits' VAE, which knows of no clusters: both tasks go on from one, where both are run."""
    model, settings = pv.GMVAE(10, Bernoulli(), **DIGITS), replace(TRAINING, seed=seed)
    cells, _ = _digits()
    begun = Started.of(model, Encoder(DIGITS["hidden"]), cells, settings=settings, start=SPREAD, progress=False)
    return replace(begun, z=latent_means(begun.vae, cells.still), view=view_of(cells.still, seed))


def _digits() -> tuple[Shades, NDArray[np.int64]]:
    with np.load(DATA / "mnist_10k.npz") as file:
        images, digit = file["images"].reshape(10_000, -1), file["labels"].astype(np.int64)
    shades = torch.from_numpy(images.astype(np.float32) / 255)
    return Shades((shades > 0.5).float(), shades=shades), digit


def _pancreas() -> tuple[Any, Profiles]:
    """The AnnData, and its spliced counts of the genes that vary."""
    from pyro_velo.data import read

    adata = read(DATA / "pancreas.h5ad")
    return adata, pv.profile_data(adata, layer="spliced").profiles


def likelihoods(seed: int) -> dict[str, Any]:
    """The pancreas: the held-out bound per cell of each likelihood, and how far it is from that of NB, cell by cell.

    Zero inflation is a gate for each gene (`ZINB`), or, decoded, for each cell and gene (`ZINB, decoded`).
    """
    _, cells = _pancreas()
    kinds = {"NB": (NB(), ()), "Poisson": (Poisson(), ()), "ZIP": (ZIP(), ()), "ZINB": (ZINB(), ()),
             "ZINB, decoded": (ZINB(), ("gate",))}  # fmt: skip
    bounds = {}
    for name, (likelihood, decoded) in kinds.items():
        model = pv.VAE(likelihood, decoded=decoded)
        fitted = fit_profiles(model, None, cells, settings=replace(TRAINING, seed=seed), progress=False)
        bounds[name] = evidence(fitted, cells, draws=1).iw_bound
    gaps = {name: bound - bounds["NB"] for name, bound in bounds.items()}
    return {
        name: f"{bound.mean():.1f} ({gaps[name].mean():+.2f} ± {gaps[name].std(ddof=1) / len(bound) ** 0.5:.2f})"
        for name, bound in bounds.items()
    }


NUMBERS = (5, 6, 8, 10)
"""Of clusters, of which the best is taken as the best resolution is of Leiden."""
RESOLUTIONS = tuple(np.arange(0.1, 1.55, 0.1))
ITERATIONS = 20
"""Of Leiden, which is not bounded by itself: it goes on until one changes nothing, here the third to the twelfth."""


FITTED = ("full, EM",)
"""Of `KINDS`, those that are fitted to the pancreas; of all, the starts are scored, which a fit moves little."""


def pancreas(seed: int) -> dict[str, Any]:
    """ARI and NMI against the eight annotated types: GMVAE, and Leiden on PCA and on a VAE's latent means.

    Each at the number of clusters, or the resolution, that agrees best; of GMVAE also that which the held-out bound
    chooses.
    """
    import scanpy as sc

    adata, cells = _pancreas()
    types = adata.obs["clusters"].astype(str).to_numpy()
    settings = replace(TRAINING, seed=seed, max_steps=400)
    start = StartSettings(neighbours=15)
    begun = Started.of(pv.GMVAE(1), None, cells, settings=settings, start=start, progress=False)
    row: dict[str, Any] = {}
    for name, (correlated, kind) in KINDS.items():
        model, here = pv.GMVAE(1, correlated=correlated), replace(begun, start=kind)
        begins = {k: mixture_start(here.z, k, correlated=correlated, settings=kind, seed=seed, view=here.view)
                  for k in NUMBERS}  # fmt: skip
        row |= {f"start, {name}: ARI of {k}": agreement(types, _placed(each, here.z)).ari for k, each in begins.items()}
        if name not in FITTED:
            continue
        fits = {k: here.fit(replace(model, n_clusters=k)) for k in NUMBERS}
        found = {k: agreement(types, _clusters(fit, cells)) for k, fit in fits.items()}
        chosen = judged(fits, {k: evidence(fit, cells, draws=1) for k, fit in fits.items()}).choice
        row |= _best(f"GMVAE, {name}", found)
        row |= {f"GMVAE, {name}: ARI of {k}": each.ari for k, each in found.items()}
        row |= {f"GMVAE, {name}: chosen": chosen, f"GMVAE, {name}: ARI of the chosen": found[chosen].ari}
    log = type(adata)(adata.layers["spliced"].copy())
    sc.pp.normalize_total(log)
    sc.pp.log1p(log)
    sc.pp.pca(log, n_comps=30, random_state=seed)
    return {
        **row,
        **_best("Leiden on the VAE", _leiden(begun.z, types, seed)),
        **_best("Leiden on PCA", _leiden(log.obsm["X_pca"], types, seed)),
    }


def _placed(begun: Start, z: NDArray) -> NDArray[np.int64]:
    """The likeliest cluster of each z (N, d)."""
    each = MultivariateNormal(begun.loc, scale_tril=begun.root)
    return (each.log_prob(torch.from_numpy(z).to(begun.loc)[:, None]) + begun.shares.log()).argmax(1).numpy()


def _leiden(positions: NDArray, types: NDArray, seed: int) -> dict[float, Agreement]:
    import scanpy as sc
    from anndata import AnnData

    cells = AnnData(np.asarray(positions, np.float32))
    sc.pp.neighbors(cells, n_neighbors=15, use_rep="X", random_state=seed)
    found = {}
    for resolution in RESOLUTIONS:
        sc.tl.leiden(cells, resolution, random_state=seed, flavor="igraph", n_iterations=ITERATIONS, directed=False)
        found[resolution] = agreement(types, cells.obs["leiden"].to_numpy())
    return found


def _best(name: str, found: Mapping[Any, Agreement]) -> dict[str, Any]:
    best = max(found, key=lambda key: found[key].ari)
    return {f"{name}: ARI": found[best].ari, f"{name}: NMI": found[best].nmi, f"{name} at": float(best)}


def _clusters(fitted: Fitted, cells: Profiles) -> NDArray[np.int64]:
    return cluster_probabilities(fitted, cells, draws=20).argmax(1)


def _coverage(found: Interval, truth: NDArray) -> float:
    return float(((found.q05 <= truth) & (truth <= found.q95)).mean())


def _r2(made: NDArray, truth: NDArray) -> float:
    """The share of the variance over genes that is explained."""
    return float(1 - ((made - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


TASKS: dict[str, Callable[[int], dict[str, Any]]] = {
    task.__name__: task
    for task in (poisson, clusters, number, null, kinds, transfer, mnist, mnist_labels, likelihoods, pancreas)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=[*TASKS, "curves"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--picture", type=Path, default=Path("autoencoders.png"), help="what `curves` writes")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.tasks:
        if name == "curves":
            curves(asked.picture)
            continue
        for seed in asked.seeds:
            start = time.process_time()
            row = TASKS[name](seed)
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{name} {seed}: {shown} ({time.process_time() - start:.0f} s of CPU)", flush=True)


if __name__ == "__main__":
    main()
