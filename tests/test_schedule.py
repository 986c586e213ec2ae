"""The KL weight, the penalties and the plateau."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_velo.schedule import SMALLEST, KLWeight, Plateau, Warmup, WithoutPenalties


def program() -> None:
    """One site of each kind, each of log-density -1 a cell and gene."""
    minus = dist.Unit(torch.tensor(-1.0))
    genes, cells = pyro.plate("genes", 3, dim=-1), pyro.plate("cells", 4, dim=-2)
    nothing = torch.empty(0)
    pyro.sample("rate", dist.Delta(torch.tensor(1.0), log_density=-1.0))
    with genes:
        pyro.sample("always", minus, obs=nothing, infer={"penalty": False})
        pyro.sample("annealed", minus, obs=nothing, infer={"penalty": True})
    with cells:
        pyro.sample("z", dist.Delta(torch.tensor(1.0), log_density=-1.0))
        with genes:
            pyro.sample("pi", dist.Delta(torch.tensor(1.0), log_density=-1.0))
            pyro.sample("pi_kl", minus, obs=nothing, infer={"kl": True})
            pyro.sample("x", minus, obs=nothing)


def densities(handler) -> dict[str, float]:
    with handler:
        trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    return {name: float(site["log_prob_sum"]) for name, site in trace.nodes.items() if "log_prob_sum" in site}


PLAIN = {"rate": -1, "always": -3, "annealed": -3, "z": -4, "pi": -12, "pi_kl": -12, "x": -12}


@pytest.mark.parametrize("weight", [0.25, 1.0, 0.0])
def test_only_the_kl_of_cells_is_weighted_and_annealed_penalties_fade(weight):
    found = densities(KLWeight(weight))
    kl, fading = max(weight, SMALLEST), max(1 - weight, SMALLEST)
    expected = PLAIN | {name: PLAIN[name] * kl for name in ("z", "pi", "pi_kl")} | {"annealed": -3 * fading}
    assert {name: found[name] for name in PLAIN} == pytest.approx(expected)


def test_the_elbo_that_is_compared_is_at_weight_one_without_penalties():
    found = densities(WithoutPenalties())
    assert {name: found[name] for name in PLAIN} == PLAIN | {"always": 0, "annealed": 0}
    with Warmup(1000).at(0):
        pass  # the weight of a step ends with it
    assert densities(Warmup(1000).done()) == found


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_weight_rises_to_one_and_stays(steps):
    weights = [Warmup(steps).weight(step) for step in range(20)]
    assert weights == sorted(weights) and weights[max(steps - 1, 0) :] == [1.0] * (20 - max(steps - 1, 0))
    assert min(weights) > 0


def run(plateau: Plateau, values: list[float], *, warm: bool = True) -> list[tuple[bool, bool]]:
    """For every evaluation, whether it was the best and whether the rate was lowered."""
    return [(plateau.improves(value, warm=warm), plateau.lower_rate(due=False)) for value in values]


def test_one_plateau_lowers_the_rate_and_the_next_ends_the_fit():
    plateau = Plateau(patience=2)
    assert run(plateau, [1.0, 0.5]) == [(True, False), (False, False)]
    assert run(plateau, [0.9]) == [(False, True)] and not plateau.finished
    assert run(plateau, [0.9, 2.0, 1.0]) == [(False, False), (True, False), (False, False)]
    assert not plateau.finished
    assert run(plateau, [1.9]) == [(False, False)]
    assert plateau.finished and plateau.best == 2.0


def test_a_rate_that_is_due_is_lowered_once():
    plateau = Plateau(patience=5)
    assert [plateau.lower_rate(due=due) for due in (False, True, True)] == [False, True, False]


def test_nothing_is_waited_for_while_the_kl_comes_in():
    plateau = Plateau(patience=1)
    assert run(plateau, [3.0, 2.0, 1.0, 0.0], warm=False)[-1] == (False, False)
    assert plateau.waited == 0 and plateau.best == 3.0


def test_a_plateau_starts_below_every_number():
    assert Plateau().improves(-math.inf, warm=True) is False
    assert Plateau().improves(-1e300, warm=True) is True
