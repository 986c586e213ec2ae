"""The clock that genes agree on: found where there is one, and its pace known only as far as it holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_velo.consensus import WINDOWS, Sightings, consensus, error_of_unit, in_unit, variation
from pyro_velo.kinetics import T_MAX

N, G = 300, 40


def sighted(time: Tensor, precision: Tensor, probability: Tensor) -> Sightings:
    """In states without ends."""
    ends = torch.full_like(time[0], math.inf)
    return Sightings(time, precision, probability, -ends, ends)


@pytest.fixture(scope="module")
def known() -> tuple[Tensor, Tensor, Sightings]:
    """Cells uniform in time; genes at paces of their own that a tenth of the cells do not follow."""
    noise = torch.Generator().manual_seed(0)
    time = T_MAX * torch.rand(N, generator=noise).sort().values
    pace = torch.exp(0.3 * torch.randn(G, generator=noise)).clamp(0.5, 0.95)
    onset = 4 * torch.rand(G, generator=noise)
    own = (pace * (time[:, None] - onset)).clamp_min(0) + 0.2 * torch.randn(N, G, generator=noise)
    astray = torch.rand(N, G, generator=noise) < 0.1
    own = torch.where(astray, T_MAX * torch.rand(N, G, generator=noise), own)
    # The other state says something else, and is the likelier one here and there.
    other = T_MAX * torch.rand(N, G, generator=noise)
    first = 0.3 + 0.7 * torch.rand(N, G, generator=noise)
    precision = torch.full((N, G, 2), 25.0) * (time[:, None] > onset).unsqueeze(-1)
    return time, pace, sighted(torch.stack((own, other), -1), precision, torch.stack((first, 1 - first), -1))


def test_finds_the_clock_and_the_paces(known: tuple[Tensor, Tensor, Sightings]) -> None:
    time, pace, seen = known
    found = consensus(seen)
    # Before the first gene comes on nothing tells the time.
    told = seen.precision.sum((1, 2)) > 0
    assert told.sum() > 0.95 * N
    assert torch.corrcoef(torch.stack((found.time[told], time[told])))[0, 1] > 0.9998
    error = found.pace.log() - pace.log()
    assert error.std() < 0.02 and error.mean().abs() < 3 * found.of_clock
    # The error of its unit is that of where a few hundred cells happen to be.
    assert 0.01 < found.of_clock < 0.1


def test_how_long_a_gene_stayed_at_its_steady_state_does_not_tell_its_pace() -> None:
    noise = torch.Generator().manual_seed(4)
    time = T_MAX * torch.rand(N, 1, generator=noise)
    pace = torch.exp(0.2 * torch.randn(G, generator=noise)).clamp(0.4, 0.8)
    switch = 6 + 6 * torch.rand(G, generator=noise)
    # Where these genes' own time has the way down begin is anybody's guess.
    stayed = torch.where(torch.arange(G) % 2 == 0, 3 * torch.rand(G, generator=noise), 0.0)
    off = time > switch
    own = pace * time + 0.2 * torch.randn(N, G, generator=noise)
    on, down = own.clamp_min(0).minimum(pace * switch), (own + stayed).maximum(pace * switch + stayed)
    probability = torch.stack((~off, off), -1).float()
    low, high = (
        torch.stack(ends, -1)
        for ends in ((0 * switch, pace * switch + stayed), (pace * switch, torch.full_like(switch, math.inf)))
    )
    seen = Sightings(torch.stack((on, down), -1), torch.full((N, G, 2), 25.0), probability, low, high)
    found = consensus(seen)
    error = found.pace.log() - pace.log()
    assert error.std() < 0.02 and error.mean().abs() < 3 * found.of_clock
    assert ((error - error.mean()).abs() < 4 * found.variation.median()).all()


def test_a_gene_that_tells_nothing_has_no_pace(known: tuple[Tensor, Tensor, Sightings]) -> None:
    *_, seen = known
    silent = torch.ones(N, G, 2)
    silent[:, 3] = 0
    found = consensus(seen._replace(precision=seen.precision * silent))
    others = torch.arange(G) != 3
    assert found.variation[3] > 10 * found.variation[others].median()
    assert found.pace.isfinite().all()


def test_genes_without_a_common_clock_vary() -> None:
    noise = torch.Generator().manual_seed(1)
    own = T_MAX * torch.rand(N, G, 2, generator=noise)
    found = consensus(sighted(own, torch.full((N, G, 2), 25.0), torch.full((N, G, 2), 0.5)))
    assert found.variation.median() > 0.3


@pytest.mark.parametrize("n_genes", [1, 2, 3, 5])
def test_a_few_genes_do_not_agree_with_themselves(n_genes: int) -> None:
    noise = torch.Generator().manual_seed(2)
    own = T_MAX * torch.rand(N, n_genes, 2, generator=noise)
    found = consensus(sighted(own, torch.full((N, n_genes, 2), 25.0), torch.full((N, n_genes, 2), 0.5)))
    assert found.variation.min() > 0.2


def test_a_gene_that_runs_backwards_is_not_told_its_unit(known: tuple[Tensor, Tensor, Sightings]) -> None:
    time, _, seen = known
    reversed_time = seen.time.clone()
    reversed_time[:, 7] = (18 - 0.9 * time[:, None]).clamp_min(0) + 0.1 * torch.randn(N, 2)
    found = consensus(seen._replace(time=reversed_time, precision=torch.full((N, G, 2), 25.0)))
    assert found.variation[7] == math.inf and found.variation.isfinite().sum() > 0.9 * G


@pytest.mark.parametrize("n_cells", [2, 5, 6, 40])
@pytest.mark.parametrize("moving", [0.0, 1.0])
def test_cells_that_cannot_be_put_in_order_tell_no_unit(n_cells: int, moving: float) -> None:
    noise = torch.Generator().manual_seed(3)
    own = T_MAX * torch.rand(n_cells, 4, 2, generator=noise)
    found = consensus(sighted(own, torch.full((n_cells, 4, 2), 25.0), moving * torch.full((n_cells, 4, 2), 0.5)))
    assert found.of_clock.isfinite() and found.pace.isfinite().all() and not found.variation.isnan().any()
    if moving == 0 or n_cells < 6:
        assert found.variation.isinf().all()


def test_a_steady_pace_is_sure_and_an_unsteady_one_as_its_parts_differ() -> None:
    time = torch.linspace(0, T_MAX, 1201, dtype=torch.float64)
    slow = time.clamp_max(10) + 2 * (time - 10).clamp_min(0)
    own = torch.stack((3 * time + 1, slow), 1)
    found = variation(torch.full_like(own, 1e6), own, time)
    assert found[0] < 1e-3
    # WINDOWS - 1 steps between the middles of windows: the error of the mean of 1, 1, 1.5, 2, 2.
    expected = float(torch.tensor([1.0, 1.0, 1.5, 2.0, 2.0]).std()) / math.sqrt(5) / 1.5
    assert WINDOWS == 6 and float(found[1]) == pytest.approx(expected, rel=0.02)


def test_the_error_of_the_unit_is_that_of_uniform_cells() -> None:
    noise = torch.Generator().manual_seed(5)
    times = [T_MAX * torch.rand(400, generator=noise, dtype=torch.float64) for _ in range(300)]
    stretch = torch.stack([(in_unit(time).max() - in_unit(time).min()) / (time.max() - time.min()) for time in times])
    told = torch.stack([error_of_unit(in_unit(time)).square() for time in times]).mean().sqrt()
    assert told == pytest.approx(float(stretch.std()), rel=0.1)
    assert told == pytest.approx((5 * 400) ** -0.5, rel=0.1)
    # Cells that are not uniform leave it open.
    assert error_of_unit(in_unit(times[0] ** 2)) > 3 * told


def test_the_unit_is_that_of_uniform_cells_whatever_the_unit_before() -> None:
    time = torch.linspace(0, 1, 500, dtype=torch.float64)[torch.randperm(500)]
    expected = T_MAX * time
    assert torch.allclose(in_unit(time), expected, atol=0.03)
    assert torch.allclose(in_unit(5 - 0.1 * (1 - time)), in_unit(time), atol=1e-9)
