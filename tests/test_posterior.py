"""The summaries of the posterior: streamed, and yet what all draws at once would give."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from pyro import poutine
from small import GUIDE, settings, small_cells, small_fit
from test_fusing import VELOCITY, abundances, counted
from tolerances import STANDARD_ERRORS

import pyro_velo as pv
from pyro_velo import posterior as module
from pyro_velo.errors import InputError
from pyro_velo.posterior import GOLDEN, directional_uncertainty, quantiles, summarise
from pyro_velo.state_posterior import drawn_states
from pyro_velo.train import train

DRAWS = 40
LAYERS = ("velocity", "velocity_sd", "velocity_q05", "velocity_q95", "t", "t_sd", "u", "s")


@pytest.fixture(scope="module")
def cells():
    return small_cells()


@pytest.fixture(scope="module")
def fitted(cells):
    return small_fit(cells)


@pytest.fixture(scope="module")
def summary(fitted, cells):
    return summarise(fitted, cells, draws=DRAWS, over_states="expected", progress=False)


def all_at_once(fitted, cells, over_states, seed=0):
    """Every draw of every cell, (draws, cells, genes): rates once a draw, then the cells given them."""
    batch = cells.batch(torch.arange(len(cells)))
    names = (*module.RATES, "noise_unspliced", "noise_spliced")
    out = {name: [] for name in ("velocity", "t", "u", "s", "p", "log_p", "z", *names)}
    with fitted.parameters(), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        one_cell = cells.batch(torch.arange(1))
        rates = [poutine.trace(fitted.guide).get_trace(one_cell).nodes for _ in range(DRAWS)]
        rates = [{name: nodes[name]["value"] for name in nodes if shared(nodes[name])} for nodes in rates]
        place = torch.rand_like(batch.u) if over_states == "drawn" else None
        for given in rates:
            trace = poutine.trace(pyro.condition(fitted.guide, data=given)).get_trace(batch)
            values = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
            explained = fitted.program.explain(values, batch, module.of_draw(fitted.program, values))
            log_joint = torch.stack(explained.log_joint)
            p = torch.softmax(log_joint, 0)
            state = p.argmax(0)
            if over_states == "drawn":
                # The golden ratio's steps, by which states come up in their share.
                state = ((place + len(out["p"]) * 0.6180339887498949) % 1 >= p.cumsum(0)[:3]).sum(0)
            w = p if over_states == "expected" else torch.nn.functional.one_hot(state, 4).movedim(-1, 0)
            for name in ("velocity", "t", "u", "s"):
                each = [torch.as_tensor(x).expand_as(batch.u) for x in getattr(explained, name)]
                out[name].append((w * torch.stack(each)).sum(0))
            out["p"].append(p)
            out["log_p"].append(torch.logsumexp(log_joint, 0))
            out["z"].append(values["z"].squeeze(-2))
            for name in names:
                out[name].append(values[name])
    return {name: torch.stack(values) for name, values in out.items()}


def shared(site):
    return site["type"] == "sample" and [frame.name for frame in site["cond_indep_stack"]] == ["genes"]


@pytest.mark.parametrize("over_states", ["expected", "most likely", "drawn"])
def test_streaming_gives_what_all_draws_at_once_give(fitted, cells, over_states):
    found = summarise(fitted, cells, draws=DRAWS, over_states=over_states, progress=False)
    whole = all_at_once(fitted, cells, over_states)
    v, close = whole["velocity"], {"rtol": 1e-4, "atol": 1e-5}
    assert_allclose(found.velocity, v.mean(0), **close)
    assert_allclose(found.velocity_sd, v.std(0), **close)
    assert_allclose(found.velocity_q05, torch.quantile(v, 0.05, 0), **close)
    assert_allclose(found.velocity_q95, torch.quantile(v, 0.95, 0), **close)
    assert_allclose(found.t, whole["t"].mean(0), **close)
    assert_allclose(found.t_sd, whole["t"].std(0), rtol=1e-3, atol=1e-4)
    for name in ("u", "s", "z"):
        assert_allclose(getattr(found, name), whole[name].mean(0), **close)
    probability = whole["p"].mean(0)
    assert_array_equal(found.state, probability.argmax(0))
    assert_allclose(found.state_use, probability.mean(1), **close)
    assert_allclose(found.log_likelihood, whole["log_p"].mean((0, 1)), **close)
    for name in module.RATES:
        assert_allclose(found.rates[name], whole[name].mean(0), **close)
        assert_allclose(found.rates_sd[name], whole[name].std(0), **close)
    mean = v.mean(0)
    # A draw of no velocity at all points nowhere: its cosine counts 0.
    cosine = ((v * mean).sum(-1) / (v.norm(dim=-1) * mean.norm(dim=-1))).nan_to_num(0.0)
    assert_allclose(found.uncertainty, cosine.var(0), rtol=1e-3, atol=1e-6)


def in_batches_of(monkeypatch, n_cells):
    """Batches of at most `n_cells` of the five genes; all of one size, the last filled up with cells seen already."""
    monkeypatch.setattr(module, "CELLS_GENES_AT_ONCE", 5 * n_cells)


@pytest.mark.parametrize("size", [7, 39])
def test_the_size_of_a_batch_changes_the_noise_and_nothing_else(fitted, cells, summary, monkeypatch, size):
    in_batches_of(monkeypatch, size)
    other = summarise(fitted, cells, draws=DRAWS, over_states="expected", progress=False)
    # The rates are drawn first, for all cells: they are the same to the bit.
    for name in module.RATES:
        assert_array_equal(other.rates[name], summary.rates[name])
    error = np.hypot(summary.velocity_sd, other.velocity_sd) / np.sqrt(DRAWS)
    scores = (other.velocity - summary.velocity) / error
    assert np.abs(scores).max() < 5 and np.sqrt(np.mean(scores**2)) < 1.5
    assert other.z.shape == summary.z.shape


def test_cells_stay_in_their_order(fitted, cells, summary):
    """Cells that come in reverse get reversed summaries: nothing depends on the place in a batch but the noise."""
    backwards = type(cells)(cells.molecules.flip(1), cells.ratio)
    other = summarise(fitted, backwards, draws=DRAWS, over_states="expected", progress=False)
    error = np.hypot(summary.velocity_sd, other.velocity_sd[::-1]) / np.sqrt(DRAWS)
    assert (np.abs(other.velocity[::-1] - summary.velocity) < 5 * error).all()


def test_a_draws_rates_are_shared_by_all_cells(fitted, cells, monkeypatch):
    seen = []
    explain = type(fitted.program).explain

    def spy(self, values, batch, *given):
        seen.append((values["alpha"].clone(), values["z"].shape[0]))
        return explain(self, values, batch, *given)

    monkeypatch.setattr(type(fitted.program), "explain", spy)
    in_batches_of(monkeypatch, 16)
    summarise(fitted, cells, draws=DRAWS, progress=False)
    assert [n for _, n in seen[::DRAWS]] == [14, 14, 14]
    draws = [torch.stack([alpha for alpha, _ in seen[i : i + DRAWS]]) for i in range(0, len(seen), DRAWS)]
    assert all(torch.equal(part, draws[0]) for part in draws)
    assert len(torch.unique(draws[0][:, 0])) == DRAWS


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state(fitted, cells, summary):
    torch.manual_seed(5)
    before, stored = torch.get_rng_state(), set(pyro.get_param_store().keys())
    again = summarise(fitted, cells, draws=DRAWS, over_states="expected", progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    for name in (*LAYERS, "state", "z", "uncertainty", "log_likelihood"):
        assert_array_equal(getattr(again, name), getattr(summary, name))
    # A gene at rest in a cell has a velocity of 0 whatever the draw.
    moving = summary.velocity != 0
    other = summarise(fitted, cells, draws=DRAWS, over_states="expected", seed=1, progress=False)
    assert moving.mean() > 0.5 and (other.velocity != summary.velocity)[moving].all()
    assert set(pyro.get_param_store().keys()) == stored


def test_numbers_are_in_their_ranges(summary):
    for name in LAYERS:
        assert getattr(summary, name).shape == (40, 5) and np.isfinite(getattr(summary, name)).all()
    assert (summary.velocity_q05 <= summary.velocity_q95).all() and (summary.velocity_sd > 0).all()
    assert (summary.t >= 0).all() and (summary.t <= 20).all() and (summary.u >= 0).all() and (summary.s >= 0).all()
    assert set(np.unique(summary.state)) <= {0, 1, 2, 3}
    assert_allclose(summary.state_use.sum(0), 1, rtol=1e-5)
    assert (summary.uncertainty >= 0).all() and (summary.uncertainty <= 1).all()
    assert {*module.RATES, "noise_unspliced", "noise_spliced"} == summary.rates.keys()


@pytest.mark.parametrize("n", [2, 3, 20, 101])
@pytest.mark.parametrize("level", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_quantiles_are_torchs(n, level):
    draws = torch.randn(n, 4, 3, dtype=torch.float64)
    (found,) = quantiles(draws, (level,))
    torch.testing.assert_close(found, torch.quantile(draws, level, 0))


def test_uncertainty_is_none_where_all_draws_agree_and_large_where_they_oppose():
    agree = torch.rand(1, 3, 5).expand(10, 3, 5) * torch.rand(10, 3, 1)
    assert_allclose(directional_uncertainty(agree, agree.mean(0)), 0, atol=1e-10)
    across = torch.tensor([[1.0, 0.1], [-1.0, 0.1]]).repeat(5, 1)[:, None]
    cosine = 0.1 / np.hypot(1.0, 0.1)
    assert_allclose(directional_uncertainty(across, across.mean(0)), 0, atol=1e-6)
    some = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])[:, None]
    assert_allclose(directional_uncertainty(some, some.mean(0)), np.var([1, 1, -1], ddof=1), rtol=1e-6)
    assert cosine < 0.2
    # The length of the velocity says nothing of its direction.
    draws = torch.randn(20, 4, 6)
    torch.testing.assert_close(
        directional_uncertainty(draws, draws.mean(0)), directional_uncertainty(7 * draws, 7 * draws.mean(0))
    )


@pytest.mark.parametrize("over_states", ["drawn", pytest.param("expected", marks=pytest.mark.slow)])
def test_the_compiled_functions_say_the_same(fitted, cells, monkeypatch, over_states):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    plain = summarise(fitted, cells, draws=DRAWS, over_states=over_states, progress=False)
    monkeypatch.setattr("pyro_velo.compiled.WORTH_COMPILING", 0)
    with warnings.catch_warnings():
        # What torch says of itself while it compiles is its own affair.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "torch.compile failed")
        fused = summarise(fitted, cells, draws=DRAWS, over_states=over_states, progress=False)
    for name in (*LAYERS, "z", "uncertainty", "log_likelihood"):
        assert_allclose(getattr(fused, name), getattr(plain, name), rtol=2e-3, atol=2e-4)


ALWAYS = ("tobit", "library")
PARTS = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in VELOCITY]


@pytest.mark.parametrize("name", PARTS)
def test_a_draw_is_compiled_in_one_piece(name, monkeypatch):
    """In pieces it would pass over memory several times."""
    model = pv.VelocityModel(n_latent=2, hidden=(8,), **{part: make() for part, make in VELOCITY[name].items()})
    cells = (counted if model.likelihood.counts else abundances)(torch.float32)
    fitted = train(model, GUIDE, cells, settings=settings(max_epochs=1), progress=False)
    compile_with, graphs = torch.compile, list[Any]()
    monkeypatch.setattr("pyro_velo.compiled.WORTH_COMPILING", 0)
    monkeypatch.setattr("pyro_velo.compiled.shutil.which", lambda _: "g++")

    def noted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def read(function: Any, *, options: Any, **asked: Any) -> Any:
        """As it is read for the compiler, and not compiled, which takes long."""
        return compile_with(function, backend=noted, **asked)

    monkeypatch.setattr(torch, "compile", read)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "torch.compile failed")
        summarise(fitted, cells, draws=3, progress=False)
    assert len(graphs) == 1


def test_a_drawn_state_has_its_posterior_probability():
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])[:, None, None].expand(4, 2000, 10)
    drawn = torch.stack(drawn_states(tuple(probability), torch.rand(2000, 10)))
    assert (drawn.sum(0) == 1).all()
    share, error = drawn.mean((1, 2)), (0.25 / 20_000) ** 0.5
    assert ((share - probability[:, 0, 0]).abs() < STANDARD_ERRORS * error).all()
    # Rounding leaves no gap: what probabilities lack to one falls to the last.
    assert drawn_states((torch.tensor([0.5]), torch.tensor([0.4999999])), torch.tensor([0.99999994]))[1] == 1


def test_states_come_up_in_their_share_in_few_draws():
    probability = torch.rand(4, 50, 20)
    probability = probability / probability.sum(0)
    place = torch.rand(50, 20)
    drawn = torch.stack([torch.stack(drawn_states(tuple(probability), (place + i * GOLDEN) % 1)) for i in range(100)])
    # At random the sd of a share would be .05 at most, five of which are .25.
    assert (drawn.mean(0) - probability).abs().max() < 0.06


def test_states_that_are_drawn_add_their_variance_and_leave_the_mean(fitted, cells):
    expected = summarise(fitted, cells, draws=200, over_states="expected", progress=False)
    drawn = summarise(fitted, cells, draws=200, progress=False)
    wider = drawn.velocity_sd > 1.2 * expected.velocity_sd
    # A state of little weight may never come up, and what its weight varies by is left out.
    assert wider.mean() > 0.2 and (drawn.velocity_sd + 2e-3 > 0.8 * expected.velocity_sd).mean() > 0.95
    # Draws that step through the states evenly have their mean to a few in 200, of velocities of some .05.
    gap = np.abs(drawn.velocity - expected.velocity)
    assert (gap < 4 * np.hypot(drawn.velocity_sd, expected.velocity_sd) / np.sqrt(200) + 1e-3).mean() > 0.99


@pytest.mark.parametrize("draws", [1, 0, -2])
def test_one_draw_has_no_spread(fitted, cells, draws):
    with pytest.raises(InputError, match=f"Expected 2 draws or more.*got {draws}"):
        summarise(fitted, cells, draws=draws)
