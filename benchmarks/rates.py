"""The guides of the rates beside NUTS: means, sds and correlations of the same posterior, on small simulated data.

The networks are fitted once. Then each guide, and NUTS, get the posterior of the gene-level sites with every cell's
sites held at the means that the fit has for them: one density, so that what differs is the guide. All numbers are on
the unconstrained scale: logarithms of rates and noise, the logit of the switching time's share of [0, 20].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from pyro.optim import ClippedAdam
from torch import Tensor
from torch.distributions import biject_to

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.batch import Cells
from pyro_velo.data.simulated import to_anndata
from pyro_velo.models.velocity import RATES
from pyro_velo.nuts import cells_at_means, nuts, target
from pyro_velo.rates import RATE_GUIDES, Auto, RateGuide, is_gene_level
from pyro_velo.train import Fitted, TrainSettings, per_cell, train

GUIDES = {name: make() for name, make in RATE_GUIDES.items()} | {
    "one Normal over all (AutoMultivariateNormal)": Auto(AutoMultivariateNormal, init_scale=0.01)
}


@dataclass(frozen=True)
class Problem:
    """A fit of simulated cells, and the values that their own sites are held at."""

    fitted: Fitted
    cells: Cells
    given: dict[str, Tensor]

    @classmethod
    def simulated(cls, n_cells: int = 100, n_genes: int = 5, *, seed: int = 0, steps: int = 1000) -> Problem:
        settings = simulate.Settings(kinetics=simulate.LogNormalRates(drop=0))
        adata = to_anndata(simulate.simulate(n_cells, n_genes, settings=settings, seed=seed))
        cells = pv.velocity_data(adata, as_is=True).cells
        settings = TrainSettings(max_steps=steps, seed=seed)
        fitted = train(pv.VelocityModel(), pv.guides.Amortized(), cells, settings=settings, progress=False)
        return cls(fitted, cells, cells_at_means(fitted, cells))

    def unconstrained(self, draws: dict[str, Tensor]) -> Tensor:
        """Draws of the gene-level sites, (n, G) each, as one tensor (n, G, K), the sites in the order of `sites`."""
        supports = self._supports()
        return torch.stack([biject_to(supports[name]).inv(draws[name]) for name in supports], -1)

    @property
    def sites(self) -> list[str]:
        return list(self._supports())

    def _supports(self) -> dict[str, object]:
        batch = self.cells.batch(torch.arange(len(self.cells)))
        with self.fitted.parameters():
            trace = poutine.trace(self.fitted.program).get_trace(batch)
        sites = {name: trace.nodes[name] for name in trace.stochastic_nodes}
        return {name: site["fn"].support for name, site in sites.items() if is_gene_level(site) and name != "genes"}


def exact(problem: Problem, *, chains: int = 2, samples: int = 500, warmup: int = 500) -> Tensor:
    """NUTS: (chains, samples, G, K)."""
    options = {"given": problem.given, "samples": samples, "warmup": warmup}
    runs = [nuts(problem.fitted, problem.cells, seed=seed, **options) for seed in range(chains)]
    return torch.stack([problem.unconstrained(run) for run in runs])


def approximate(problem: Problem, rates: RateGuide, *, steps: int = 3000, draws: int = 2000) -> Tensor:
    """A guide fitted to the same density, (draws, G, K), with a learning rate that falls from 0.02 to a hundredth."""
    n_cells = len(problem.cells)
    batch, density = problem.cells.batch(torch.arange(n_cells)), target(problem.fitted, problem.cells, problem.given)
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        guide = rates(problem.fitted.program)
        optimizer = ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / steps)})
        svi = SVI(per_cell(density, n_cells), per_cell(guide, n_cells), optimizer, Trace_ELBO())
        for _ in range(steps):
            svi.step(batch)
        with torch.no_grad():
            drawn = [guide(batch) for _ in range(draws)]
    return problem.unconstrained({name: torch.stack([each[name] for each in drawn]) for name in problem.sites})


def correlations(x: Tensor) -> Tensor:
    """Of each gene's values, (n, G, K) to (G, K, K)."""
    return torch.stack([torch.corrcoef(gene.T) for gene in x.unbind(1)])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(problem: Problem, chains: Tensor, guides: dict[str, Tensor]) -> str:
    truth, sites = chains.flatten(0, 1), problem.sites
    named = [f"`{site}`" for site in sites]
    means = [
        [name, *(f"{gap:.2f}" for gap in ((x.mean(0) - truth.mean(0)).abs() / truth.std(0)).amax(0))]
        for name, x in guides.items()
    ]
    sds = [["NUTS: sd", *(f"{sd:.3f}" for sd in truth.std(0).median(0).values)]]
    sds += [[name, *(f"{r:.2f}" for r in (x.std(0) / truth.std(0)).median(0).values)] for name, x in guides.items()]
    pairs = list(combinations([sites.index(name) for name in RATES], 2))
    of_pairs = [
        [name, *(f"{correlations(x)[:, i, j].median():.2f}" for i, j in pairs)]
        for name, x in {"NUTS": truth, **guides}.items()
        if (x.std(0) > 0).all()
    ]
    rhat, size = split_gelman_rubin(chains).max(), effective_sample_size(chains).min()
    return "\n\n".join(
        (
            f"NUTS: {len(truth)} draws in {len(chains)} chains, split R-hat at most {rhat:.3f}, "
            f"effective sample size at least {size:.0f}.",
            "|mean - NUTS' mean| in NUTS' sds, the largest over genes:\n\n" + table(["", *named], means),
            "sd / NUTS' sd, the median over genes:\n\n" + table(["", *named], sds),
            "Correlations, the median over genes:\n\n"
            + table(["", *(f"`{sites[i]}`, `{sites[j]}`" for i, j in pairs)], of_pairs),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--genes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--samples", type=int, default=500, help="draws a chain, after as many of warm-up")
    parser.add_argument("--steps", type=int, default=3000, help="gradient steps of each guide")
    asked = parser.parse_args()
    start = time.perf_counter()
    problem = Problem.simulated(asked.cells, asked.genes, seed=asked.seed)
    chains = exact(problem, chains=asked.chains, samples=asked.samples, warmup=asked.samples)
    seconds = {"NUTS": time.perf_counter() - start}
    guides = {}
    for name, rates in GUIDES.items():
        start = time.perf_counter()
        guides[name] = approximate(problem, rates, steps=asked.steps)
        seconds[name] = time.perf_counter() - start
    print(report(problem, chains, guides))
    print("\nSeconds: " + ", ".join(f"{name} {each:.0f}" for name, each in seconds.items()) + ".")


if __name__ == "__main__":
    main()
