"""What a training step is made of: the CPU time of its parts, plain and fused turn by turn, and torch's profile of it.

`python benchmarks/step.py velocity` (simulated cells, the defaults) or `vae` (counts drawn from a Gamma-Poisson, hidden
128). step.md holds what it found.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.profiler import ProfilerActivity, profile

import pyro_velo as pv
from pyro_velo.batch import Cells
from pyro_velo.clustering import TRAINING
from pyro_velo.compiled import WORTH_FUSING, fusing
from pyro_velo.encoders import Encoder
from pyro_velo.optimizer import step_together
from pyro_velo.profiles import Profiles
from pyro_velo.simulate import LogNormalRates, Settings, simulate
from pyro_velo.train import TrainSettings, _Loop, apart

PARTS = ("batch", "guide", "model", "densities", "backward", "norm", "optimiser", "whole step")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=["velocity", "vae"])
    parser.add_argument("--cells", type=int, default=1500)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10, help="steps of each kind")
    parser.add_argument("--rows", type=int, default=0, help="rows of torch's profile of the fused step")
    return parser.parse_args()


def velocity(given: argparse.Namespace) -> tuple[Any, Any, Any, TrainSettings]:
    """The default model and guide on layers that are scaled to [0, 1]."""
    found = simulate(given.cells, given.genes, settings=Settings(kinetics=LogNormalRates(drop=0.0)), seed=0)
    layers = [(x - x.min(0)) / np.ptp(x, axis=0) for x in (found.unspliced, found.spliced)]
    cells = Cells.of(*(torch.as_tensor(x, dtype=torch.float32) for x in layers))
    return pv.VelocityModel(), pv.guides.Amortized(), cells, TrainSettings(batch_size=given.batch)


def vae(given: argparse.Namespace) -> tuple[Any, Any, Any, TrainSettings]:
    """The VAE of counts, NB, of which 40 % are not zero."""
    draw = np.random.default_rng(0)
    counts = draw.poisson(draw.gamma(0.3, 4.0, (given.cells, given.genes))).astype(np.float32)
    cells = Profiles.of_counts(torch.from_numpy(counts))
    return pv.VAE(pv.likelihoods.NB(), 10, (128,)), Encoder((128,)), cells, TRAINING


class Clock:
    """CPU milliseconds by part."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.found.setdefault(part, []).append(1e3 * (time.process_time() - start))


def taken_apart(loop: _Loop, batch_of: Callable[[], Any], clock: Clock) -> None:
    """One step, as `_Loop._step` with `Trace_ELBO` takes it."""
    with clock.of("whole step"):
        with clock.of("batch"):
            batch = batch_of()
        with poutine.trace(param_only=True) as capture:
            with clock.of("guide"):
                guide = poutine.trace(loop.svi.guide).get_trace(batch)
            with clock.of("model"):
                model = poutine.trace(poutine.replay(loop.svi.model, trace=guide)).get_trace(batch)
        with clock.of("densities"):
            model.compute_log_prob()
            guide.compute_score_parts()
            loss = guide.log_prob_sum() - model.log_prob_sum()
        with clock.of("backward"):
            loss.backward()
        values = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        with clock.of("norm"):
            torch.nn.utils.get_total_norm([value.grad for value in values if value.grad is not None]).item()
        with clock.of("optimiser"):
            step_together(loop.optimizer, values)
            for value in values:
                value.grad = None


def main() -> None:
    given = options()
    torch.set_num_threads(1)
    model, guide, cells, settings = {"velocity": velocity, "vae": vae}[given.what](given)
    clocks = {0: Clock(), WORTH_FUSING: Clock()}
    with apart(cells, 0):
        program = model.build(cells)
        loop = _Loop(program, guide(program), cells, settings, Trace_ELBO(), None)
        parts = loop.train_index.tensor_split(loop.n_batches)

        def step(number: int, much: int, clock: Clock) -> None:
            index = parts[number % len(parts)]
            with loop.warmup.at(number), fusing(much, cells.device):
                taken_apart(loop, lambda: cells.batch(index, loop.n_train), clock)

        for much in clocks:
            start = time.process_time(), time.perf_counter()
            step(0, much, Clock())
            spent = time.process_time() - start[0], time.perf_counter() - start[1]
            print(f"First step {'fused' if much else 'plain'}: {spent[0]:.1f} s of CPU time, {spent[1]:.1f} s.")
        for number in range(given.steps):
            for much, clock in clocks.items():
                step(number, much, clock)
        look = Clock()
        with look.of("look"):
            loop._look(0)
        print(f"\n{given.what}, {len(parts[0])} cells x {cells.n_genes} genes; CPU ms, median (lowest)\n")
        print("| | plain | fused |\n|---|---|---|")
        for part in PARTS:
            shown = (f"{median(c.found[part]):.1f} ({min(c.found[part]):.1f})" for c in clocks.values())
            print(f"| {part} | {' | '.join(shown)} |")
        held = len(loop.held_index)
        print(f"\nA look at {held} held-out cells, and as many training cells: {look.found['look'][0]:.0f} ms.")
        if given.rows:
            with profile(activities=[ProfilerActivity.CPU]) as found:
                for number in range(5):
                    step(number, WORTH_FUSING, Clock())
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=given.rows))


if __name__ == "__main__":
    main()
