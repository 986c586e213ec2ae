"""Every part with every other: one step, a gradient in every parameter, and the sites that each part brings."""

from __future__ import annotations

from itertools import product
from operator import ne

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_velo as pv
from pyro_velo.batch import Cells, Counts
from pyro_velo.likelihoods import LIKELIHOODS
from pyro_velo.rates import RATE_GUIDES
from pyro_velo.states import STATE_FAMILIES
from pyro_velo.times import TIMES
from pyro_velo.transcription import TRANSCRIPTIONS

N, G, D = 9, 4, 2
DEFAULT = ("normal", "collapsed", "mean-field", "per-gene")
GRID = list(product(LIKELIHOODS, STATE_FAMILIES, RATE_GUIDES, TIMES))
TWO_SWAPS = [parts for parts in GRID if sum(map(ne, parts, DEFAULT)) <= 2]


def cells_for(counts: bool) -> Cells:
    """A few cells without structure, scaled or counted."""
    scaled = torch.rand(2, N, G)
    ratio = torch.linspace(0.5, 1.0, G)
    if not counts:
        return Cells(scaled, ratio)
    unit, size = torch.full((2, 1, G), 8.0), 0.5 + torch.rand(2, N, 1)
    molecules = torch.poisson(size * unit * scaled)
    return Cells(molecules, ratio, Counts(size, 0.01 * unit, unit, scaled))


def a_step(model: pv.VelocityModel, guide: pv.guides.Amortized, cells: Cells) -> dict[str, torch.Tensor]:
    """Gradients of every parameter."""
    with pyro.get_param_store().scope():
        program = model.build(cells)
        its_guide = guide(program)
        batch = cells.batch(torch.arange(N))
        # Everything has to have an effect: no weight may start at zero.
        for parameter in program.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        loss = Trace_ELBO().differentiable_loss(program, its_guide, batch)
        loss.backward()
        return {name: pyro.param(name).unconstrained().grad for name in pyro.get_param_store()}


def latent_sites(model: pv.VelocityModel, cells: Cells) -> set[str]:
    """What the model draws, by tracing."""
    with pyro.get_param_store().scope():
        trace = poutine.trace(model.build(cells)).get_trace(cells.batch(torch.arange(N)))
    return set(trace.stochastic_nodes) - {"genes", "cells"}


def test_any_two_swaps_take_a_step_with_a_gradient_everywhere() -> None:
    assert without_gradient(TWO_SWAPS) == []


@pytest.mark.slow
def test_every_combination_takes_a_step_with_a_gradient_everywhere() -> None:
    assert without_gradient(GRID) == []


def without_gradient(grid: list[tuple[str, ...]]) -> list[str]:
    """The parameters that a step leaves without a gradient, by the combination."""
    without: list[str] = []
    for likelihood, states, rates, times in grid:
        recipe = LIKELIHOODS[likelihood]()
        model = pv.VelocityModel(
            likelihood=recipe, states=STATE_FAMILIES[states](), times=TIMES[times](), n_latent=D, hidden=(5,)
        )
        guide = pv.guides.Amortized(rates=RATE_GUIDES[rates](), hidden=(5,), hidden_states=(5,))
        gradients = a_step(model, guide, cells_for(recipe.counts))
        for name, gradient in gradients.items():
            if gradient is None or not gradient.isfinite().all() or not gradient.abs().max() > 0:
                without.append(f"{likelihood} {states} {rates} {times}: {name}")
    return without


@pytest.mark.parametrize(
    ("part", "brings"),
    [
        ({}, {"noise"}),
        ({"likelihood": "studentt"}, {"noise"}),
        ({"likelihood": "tobit"}, {"noise"}),
        ({"likelihood": "poisson"}, set()),
        ({"likelihood": "nb"}, {"dispersion"}),
        ({"likelihood": "zip"}, {"gate"}),
        ({"likelihood": "zinb"}, {"dispersion", "gate"}),
        ({"times": "hierarchical"}, {"noise", "onset", "deviation"}),
        ({"times": "shared"}, {"noise", "onset"}),
        ({"transcription": "time-dependent"}, {"noise", "alpha_1", "ramp"}),
    ],
    ids=lambda value: "-".join(value.values()) or "default" if isinstance(value, dict) else "",
)
def test_a_part_brings_its_sites_and_no_others(part: dict[str, str], brings: set[str]) -> None:
    tables = {"likelihood": LIKELIHOODS, "times": TIMES, "transcription": TRANSCRIPTIONS}
    chosen = {name: tables[name][value]() for name, value in part.items()}
    model = pv.VelocityModel(**chosen, n_latent=D, hidden=(5,))
    cells = cells_for(model.likelihood.counts)
    sites = latent_sites(model, cells)
    expected = {"alpha", "beta", "gamma", "switch_time", "z", "pi"}
    for kind in brings:
        per_molecule = kind in model.likelihood.parameters
        expected |= {f"{kind}_unspliced", f"{kind}_spliced"} if per_molecule else {kind}
    assert sites == expected


def test_a_linear_decoder_has_loadings_and_nothing_else() -> None:
    cells = cells_for(counts=False)
    program = pv.VelocityModel(n_latent=D, hidden=()).build(cells)
    names = {name: tuple(value.shape) for name, value in program.named_parameters()}
    assert names == {"times.decoder.weight": (2, D, G), "times.decoder.bias": (2, 1, G)}
