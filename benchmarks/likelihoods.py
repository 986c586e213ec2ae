"""Each likelihood beside Pyro's stock distribution: ms for a log-density and its gradients, as a training step asks.

    python benchmarks/likelihoods.py --threads 2

The two take turns, so that whatever else the machine does falls on both; the table shows medians (lowest to highest).
The gradients are by the mean and by every parameter, validation is off on both sides.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from statistics import median

# Threads that wait for one another must not spin: on a shared machine that is what would be measured.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_velo.likelihoods import LIKELIHOODS

Parameters = Mapping[str, Tensor]


def gamma_poisson(mean: Tensor, p: Parameters) -> dist.TorchDistribution:
    return dist.GammaPoisson(p["dispersion"], p["dispersion"] / mean)


def inflated(base: dist.TorchDistribution, p: Parameters) -> dist.TorchDistribution:
    return dist.ZeroInflatedDistribution(base, gate_logits=p["gate"])


STOCK: dict[str, tuple[str, Callable[[Tensor, Parameters], dist.TorchDistribution]]] = {
    "normal": ("Normal", lambda mean, p: dist.Normal(mean, p["noise"])),
    "studentt": ("StudentT", lambda mean, p: dist.StudentT(4.0, mean, p["noise"])),
    "poisson": ("Poisson", lambda mean, p: dist.Poisson(mean)),
    "nb": ("GammaPoisson", gamma_poisson),
    "zip": ("ZeroInflatedDistribution(Poisson)", lambda mean, p: inflated(dist.Poisson(mean), p)),
    "zinb": ("ZeroInflatedDistribution(GammaPoisson)", lambda mean, p: inflated(gamma_poisson(mean, p), p)),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=4)
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15, help="turns of each side")
    return parser.parse_args()


def step(
    make: Callable[..., dist.TorchDistribution], x: Tensor, mean: Tensor, p: Parameters, weights: Tensor
) -> Tensor:
    """The log-density; its gradients are left in `mean` and `p`."""
    for leaf in (mean, *p.values()):
        leaf.grad = None
    value = make(mean, p).log_prob(x)
    value.backward(weights)
    return value.detach()


def timed(*call: object) -> tuple[float, float]:
    """Wall and CPU ms of a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step(*call)  # type: ignore[arg-type]
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def compare(name: str, at: argparse.Namespace) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    likelihood, (stock_name, stock) = LIKELIHOODS[name](), STOCK[name]
    mean = (0.01 + 5 * torch.rand(at.states, at.cells, at.genes)).requires_grad_()
    ranges = {"noise": (0.1, 1.0), "dispersion": (0.1, 10.0), "gate": (-3.0, 0.0)}
    p = {kind: torch.linspace(*ranges[kind], at.genes).requires_grad_() for kind in likelihood.parameters}
    x, weights = torch.poisson(3 * torch.rand(at.cells, at.genes)), torch.rand_like(mean)
    sides = {"ours": likelihood, "stock": stock}
    values = [step(make, x, mean, p, weights) for make in sides.values()]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(at.repeats):
        for side, make in sides.items():
            taken[side].append(timed(make, x, mean, p, weights))
    wall = {side: [each[0] for each in times] for side, times in taken.items()}
    cpu = {side: median(each[1] for each in times) for side, times in taken.items()}
    ours, theirs = (f"{median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})" for ms in wall.values())
    ratios = (median(wall["stock"]) / median(wall["ours"]), cpu["stock"] / cpu["ours"])
    return f"| {name} | {ours} | {stock_name} | {theirs} | {ratios[0]:.1f} | {ratios[1]:.1f} |"


def main() -> None:
    at = options()
    torch.set_num_threads(at.threads)
    pyro.enable_validation(False)
    shape = f"({at.states}, {at.cells}, {at.genes})"
    print(f"{shape}, float32, {at.threads} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    print("| likelihood | ms | Pyro's | ms | ratio | ratio of CPU time |")
    print("|---|---|---|---|---|---|")
    for name in LIKELIHOODS:
        print(compare(name, at), flush=True)


if __name__ == "__main__":
    main()
