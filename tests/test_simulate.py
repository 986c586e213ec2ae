"""The simulator tells the truth: its kinetics, its noise, its nulls, its seeds and its errors."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from pyro_velo import simulate as sim
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data.simulated import to_anndata
from pyro_velo.errors import InputError
from pyro_velo.kinetics import T_MAX

CLOCKS = {"shared": sim.SharedTime(), "per_gene": sim.GeneTime()}
LINEAGES = {"one": sim.Lineages(), "three": sim.Lineages(count=3)}
FLOAT64 = 1e-10


def quiet(**settings: Any) -> sim.Settings:
    return sim.Settings(noise=sim.Normal(level=0), **settings)


def same(a: sim.Simulation, b: sim.Simulation, names: set[str] | None = None) -> list[str]:
    """The names of the arrays that are equal to the bit."""
    arrays = [f.name for f in fields(a) if isinstance(getattr(a, f.name), np.ndarray)]
    return [n for n in arrays if (names is None or n in names) and np.array_equal(getattr(a, n), getattr(b, n))]


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
@pytest.mark.parametrize("lineages", LINEAGES.values(), ids=LINEAGES)
def test_velocity_is_beta_u_minus_gamma_s(clock: sim.Clock, lineages: sim.Lineages) -> None:
    x = sim.simulate(80, 40, settings=sim.Settings(clock=clock, lineages=lineages))
    assert_allclose(x.true_velocity, x.true_beta * x.true_u - x.true_gamma * x.true_s, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("lineages", LINEAGES.values(), ids=LINEAGES)
def test_velocity_is_the_slope_of_s_along_time(lineages: sim.Lineages) -> None:
    x = sim.simulate(20_000, 12, settings=quiet(lineages=lineages), seed=3)
    for label in set(x.lineage.tolist()) - {"trunk"}:
        path = np.flatnonzero(x.lineage == label)
        path = path[x.true_t[path].argsort()]
        t, row = x.true_t[path][:, None], max(int(label[-1]) - 1, 0)
        slope = np.diff(x.true_s[path], axis=0) / np.diff(t, axis=0)
        middle = (x.true_velocity[path][1:] + x.true_velocity[path][:-1]) / 2
        # Where a gene comes on or goes off between two cells, ds/dt has a kink and its mean is not the slope.
        kinks = (x.true_onset[row], x.true_switch[row])
        smooth = ~np.any([(t[:-1] <= kink) & (kink <= t[1:]) for kink in kinks], axis=0)
        assert smooth.mean() > 0.99
        assert_allclose(slope[smooth], middle[smooth], rtol=0, atol=1e-3)


@pytest.mark.parametrize("beta", [0.3, 0.4 - 1e-9, 0.4])
def test_curves_solve_the_ode_where_gamma_nears_beta(beta: float) -> None:
    x = sim.simulate(4_000, 1, settings=quiet(kinetics=sim.GivenRates((2.0,), (beta,), (0.4,))))
    order = x.true_t.argsort()
    t, switch = x.true_t[order], float(x.true_switch[0, 0])
    u = s = previous = 0.0
    euler = []
    for time in t:
        for step in np.linspace(previous, time, 21)[1:] - (time - previous) / 40:  # the midpoints of 20 steps
            h, alpha = (time - previous) / 20, 2.0 * (step < switch)
            half_u, half_s = u + h / 2 * (alpha - beta * u), s + h / 2 * (beta * u - 0.4 * s)
            u, s = u + h * (alpha - beta * half_u), s + h * (beta * half_u - 0.4 * half_s)
        previous = time
        euler.append((u, s))
    assert_allclose(np.array(euler), np.hstack([x.true_u[order], x.true_s[order]]), rtol=0, atol=1e-3)


def test_log_rates_have_the_moments_of_the_recipe() -> None:
    law = sim.LogNormalRates(drop=0)
    logs = np.log(law.draw(40_000, np.random.default_rng(0)))
    assert_allclose(logs.mean(axis=0), np.array(law.mean) - np.log([1, 3, 3]), atol=0.01)
    assert_allclose(logs.std(axis=0), 0.4, atol=0.01)
    assert_allclose(np.corrcoef(logs.T)[np.triu_indices(3, 1)], law.correlation, atol=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_the_top_percent_of_each_rate_is_dropped(seed: int) -> None:
    all_rates = sim.LogNormalRates(drop=0).draw(300, np.random.default_rng(seed))
    kept = sim.LogNormalRates().draw(300, np.random.default_rng(seed))
    below = all_rates < np.percentile(all_rates, 99, axis=0)
    assert_array_equal(kept, all_rates[below.all(axis=1)])
    assert 291 <= len(kept) <= 297
    assert len(sim.LogNormalRates().draw(99, np.random.default_rng(seed))) == 99


def test_times_are_those_of_a_poisson_process_in_random_order() -> None:
    t = sim.simulate(5_000, 1, seed=2).true_t
    gaps = np.diff(np.sort(t))
    assert t.min() > 0 and t.max() == T_MAX
    assert_allclose(gaps.std() / gaps.mean(), 1, atol=0.05)
    assert abs(np.corrcoef(t, np.arange(len(t)))[0, 1]) < 0.05


def test_genes_of_a_cell_scatter_about_its_time() -> None:
    x = sim.simulate(4_000, 20, settings=sim.Settings(clock=sim.GeneTime(sd=1.5)))
    assert x.true_gene_t is not None
    assert x.true_gene_t.min() >= 0 and x.true_gene_t.max() <= T_MAX
    inside = (x.true_t > 6) & (x.true_t < 14)
    ahead = (x.true_gene_t - x.true_t[:, None])[inside]
    assert_allclose([ahead.mean(), ahead.std()], [0, 1.5], atol=0.05)
    assert np.abs(np.corrcoef(ahead.T)[np.triu_indices(20, 1)]).max() < 0.15


def test_switches_are_uniform_between_their_bounds() -> None:
    switch = sim.simulate(1, 20_000).true_switch / T_MAX
    assert switch.min() >= 0.1 and switch.max() <= 0.5
    assert_allclose([switch.mean(), switch.std()], [0.3, 0.4 / 12**0.5], atol=0.01)


def test_normal_noise_has_the_stated_sd_and_is_clipped() -> None:
    x = sim.simulate(4_000, 30, seed=5)
    for seen, mean in ((x.unspliced, x.true_u), (x.spliced, x.true_s)):
        sd = 0.08 * np.percentile(mean, 99, axis=0)
        far = mean > 4 * sd
        z = ((seen - mean) / sd)[far]
        assert_allclose([z.mean(), z.std()], [0, 1], atol=0.02)
        assert seen.min() == 0 and (seen[mean < sd / 100] == 0).mean() > 0.4


COUNT_MOMENTS = {
    "poisson": (sim.Poisson(), lambda m: (m, m)),
    "nb": (sim.NegativeBinomial(theta=2.0), lambda m: (m, m + m**2 / 2)),
    "zinb": (
        sim.ZeroInflatedNegativeBinomial(theta=2.0, gate=0.3),
        lambda m: (0.7 * m, 0.7 * (m + m**2 / 2) + 0.3 * 0.7 * m**2),
    ),
}


@pytest.mark.parametrize(("noise", "moments"), COUNT_MOMENTS.values(), ids=COUNT_MOMENTS)
def test_counts_have_their_mean_and_variance(noise: sim.Noise, moments: Any) -> None:
    mean = np.array([0.0, 0.5, 3.0, 20.0])
    counts = noise.observe(np.tile(mean, (200_000, 1)), np.random.default_rng(1))
    expected_mean, expected_variance = moments(mean)
    assert np.issubdtype(counts.dtype, np.integer) and counts.min() == 0
    assert_allclose(counts.mean(axis=0), expected_mean, rtol=0.02)
    assert_allclose(counts.var(axis=0), expected_variance, rtol=0.03)


def test_no_zero_inflation_is_the_negative_binomial() -> None:
    mean = np.full((100_000, 1), 4.0)
    gated, plain = (
        noise.observe(mean, np.random.default_rng(seed))
        for seed, noise in enumerate([sim.ZeroInflatedNegativeBinomial(gate=0), sim.NegativeBinomial()])
    )
    frequencies = [np.bincount(counts.ravel(), minlength=60)[:60] / len(mean) for counts in (gated, plain)]
    assert_allclose(*frequencies, atol=0.006)


def test_counts_scale_with_the_library_and_the_truth_does_not() -> None:
    shallow, deep = (
        sim.simulate(2_000, 40, settings=sim.Settings(noise=sim.Poisson(library_size=sim.LibrarySize(depth, sd=0.5))))
        for depth in (2.0, 20.0)
    )
    assert same(shallow, deep, {"true_u", "true_s", "true_velocity"}) == ["true_u", "true_s", "true_velocity"]
    assert_allclose([shallow.library.mean(), deep.library.mean()], [2, 20], rtol=0.05)
    assert_allclose(np.log(deep.library).std(), 0.5, atol=0.03)
    expected = deep.library * deep.true_s.sum(axis=1)
    assert_allclose(deep.spliced.sum(axis=1), expected, atol=6 * expected.max() ** 0.5)


@pytest.mark.parametrize("noise", sim.NOISES.values(), ids=sim.NOISES)
def test_nothing_depends_on_time_in_the_null(noise: Any) -> None:
    x = sim.simulate(2_000, 50, settings=sim.Settings(noise=noise(), stationary=True), seed=7)
    assert_array_equal(x.true_velocity, 0)
    assert_allclose(x.true_u, np.tile(x.true_alpha / x.true_beta, (2_000, 1)), rtol=FLOAT64)
    assert_allclose(x.true_s, np.tile(x.true_alpha / x.true_gamma, (2_000, 1)), rtol=FLOAT64)
    assert np.isnan(x.true_switch).all() and np.isnan(x.true_onset).all()
    per_count = np.ones(2_000) if noise is sim.Normal else x.library
    for seen in (x.unspliced, x.spliced):
        r = np.array([np.corrcoef(gene / per_count, x.true_t)[0, 1] for gene in seen.T])
        assert np.abs(r).max() < 4.5 / 2_000**0.5
        # Library sizes are shared by genes, so even the mean over genes is no more than noise.
        assert abs(np.corrcoef((seen / per_count[:, None]).mean(axis=1), x.true_t)[0, 1]) < 4.5 / 2_000**0.5


def test_lineages_part_at_the_branching_and_not_before() -> None:
    x = sim.simulate(6_000, 60, settings=quiet(lineages=sim.Lineages(count=2, branch_at=0.4, specific=0.6)), seed=1)
    assert set(x.lineage.tolist()) == {"trunk", "lineage_1", "lineage_2"}
    assert_array_equal(x.lineage == "trunk", x.true_t < 8)
    fate = (x.true_onset == 8).any(axis=0)
    diverging = (x.true_onset == 0).all(axis=0) & (x.true_switch[0] != x.true_switch[1])
    common = (x.true_onset == 0).all(axis=0) & (x.true_switch[0] == x.true_switch[1])
    assert (fate.sum(), diverging.sum(), common.sum()) == (18, 18, len(fate) - 36)
    assert x.true_switch[:, diverging].min() > 8
    assert_array_equal((x.true_onset[:, fate] == T_MAX).sum(axis=0), 1)
    assert (x.true_s[x.lineage == "trunk"][:, fate] == 0).all()
    late = {label: x.true_s[(x.lineage == label) & (x.true_t > 10)] for label in ("lineage_1", "lineage_2")}
    silent = x.true_onset == T_MAX
    for row, label in enumerate(late):
        assert (late[label][:, silent[row]] == 0).all() and (late[label][:, fate & ~silent[row]] > 0).all()


def test_lineages_are_equally_frequent() -> None:
    labels, counts = np.unique(
        sim.simulate(9_000, 5, settings=quiet(lineages=LINEAGES["three"])).lineage, return_counts=True
    )
    assert labels.tolist() == ["lineage_1", "lineage_2", "lineage_3", "trunk"]
    assert_allclose(counts / 9_000, [0.7 / 3] * 3 + [0.3], atol=0.02)


@pytest.mark.parametrize("noise", sim.NOISES.values(), ids=sim.NOISES)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(noise: Any) -> None:
    settings = sim.Settings(
        noise=noise(), clock=sim.GeneTime(), lineages=sim.Lineages(count=2), kinetics=sim.LogNormalRates(drop=0)
    )
    first, again, other = (sim.simulate(60, 30, settings=settings, seed=seed) for seed in (4, 4, 5))
    drawn = {f.name for f in fields(first) if isinstance(getattr(first, f.name), np.ndarray)}
    assert set(same(first, again)) == drawn
    assert set(same(first, other)) <= ({"library"} if noise is sim.Normal else set())


def test_the_truth_does_not_depend_on_the_noise() -> None:
    truths = [sim.simulate(60, 30, settings=sim.Settings(noise=noise())) for noise in sim.NOISES.values()]
    names = {f.name for f in fields(truths[0]) if f.name.startswith("true_") and f.name != "true_gene_t"}
    for truth in truths[1:]:
        assert set(same(truths[0], truth, names)) == names


def global_state() -> list[Any]:
    return [random.getstate(), *np.random.get_state(legacy=False)["state"]["key"], *torch.get_rng_state().tolist()]  # type: ignore[index, call-overload]


def test_no_global_random_state_is_read_or_written() -> None:
    drawn = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = global_state()
        drawn.append(sim.simulate(40, 20, settings=sim.Settings(noise=sim.NegativeBinomial())))
        assert global_state() == before
    assert "spliced" in same(*drawn)


@pytest.mark.parametrize("noise", sim.NOISES.values(), ids=sim.NOISES)
@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
@pytest.mark.parametrize("lineages", LINEAGES.values(), ids=LINEAGES)
def test_anndata_keeps_the_truth_through_a_file(noise: Any, clock: Any, lineages: Any, tmp_path: Any) -> None:
    settings = sim.Settings(noise=noise(), clock=clock, lineages=lineages)
    x = sim.simulate(50, 20, settings=settings, seed=6)
    to_anndata(x).write_h5ad(tmp_path / "simulated.h5ad")
    adata = anndata.read_h5ad(tmp_path / "simulated.h5ad")
    spliced = adata.layers[keys.SPLICED]
    if noise is sim.Normal:
        assert_allclose(spliced, x.spliced, rtol=1e-6)
    else:
        assert_array_equal(spliced.toarray(), x.spliced)
        assert_array_equal(adata.layers[keys.UNSPLICED].toarray(), x.unspliced)
    for layer, truth in {keys.TRUE_U: x.true_u, keys.TRUE_S: x.true_s, keys.TRUE_VELOCITY: x.true_velocity}.items():
        assert_allclose(adata.layers[layer], truth, rtol=1e-6, atol=1e-6)
    for column, truth in {
        keys.TRUE_ALPHA: x.true_alpha,
        keys.TRUE_BETA: x.true_beta,
        keys.TRUE_GAMMA: x.true_gamma,
    }.items():
        assert_array_equal(adata.var[column], truth)
    assert_array_equal(adata.obs[keys.TRUE_TIME], x.true_t)
    assert (keys.TRUE_TIME in adata.layers) == (clock is CLOCKS["per_gene"])
    assert ("lineage" in adata.obs) == (lineages.count > 1)
    shared = (x.true_switch == x.true_switch[0]).all(axis=0)
    assert_array_equal(np.isnan(adata.var[keys.TRUE_SWITCH]), ~shared)
    assert_array_equal(adata.var[keys.TRUE_SWITCH][shared], x.true_switch[0, shared])
    assert adata.uns["simulation"]["seed"] == 6
    assert adata.uns["simulation"]["settings"]["noise"]["name"] == noise.__name__


BAD = {
    "n_cells": (lambda: sim.simulate(0), r"n_cells to be a whole number >= 1; got 0\. Ask for one cell"),
    "n_cells_float": (lambda: sim.simulate(10.5), r"n_cells to be a whole number .* got 10\.5"),  # type: ignore[arg-type]
    "n_cells_bool": (lambda: sim.simulate(True), r"n_cells .* got True"),
    "n_genes": (lambda: sim.simulate(10, -3), r"n_genes .* >= 1; got -3\. Ask for one gene"),
    "seed": (lambda: sim.simulate(10, seed=-1), r"seed .* >= 0; got -1\. Pass a seed"),
    "mean": (lambda: sim.LogNormalRates(mean=(1, 2)), r"three finite logarithms; got \(1, 2\)\. Pass"),  # type: ignore[arg-type]
    "mean_nan": (lambda: sim.LogNormalRates(mean=(1, np.nan, 0)), r"three finite logarithms; got .*nan"),
    "sd": (lambda: sim.LogNormalRates(sd=-0.1), r"sd to be a number in \[0, inf\); got -0\.1\. Pass"),
    "sd_nan": (lambda: sim.LogNormalRates(sd=np.nan), r"sd to be a number .* got nan"),
    "sd_text": (lambda: sim.LogNormalRates(sd="0.4"), r"sd to be a number .* got '0\.4'"),  # type: ignore[arg-type]
    "correlation": (
        lambda: sim.LogNormalRates(correlation=(0.9, -0.9, 0.9)),
        r"positive definite matrix; got .* nearer to zero",
    ),
    "divisor": (lambda: sim.LogNormalRates(divisor=0), r"divisor .* \(0, inf\); got 0\. Pass"),
    "drop": (lambda: sim.LogNormalRates(drop=0.5), r"drop .* \[0, 0\.3\); got 0\.5\. Pass"),
    "given_lengths": (
        lambda: sim.GivenRates((1,), (1, 2), (1,)),
        r"as many alpha as beta as gamma; got \[1, 2, 1\]\. Pass",
    ),
    "given_negative": (lambda: sim.GivenRates((1,), (-2,), (1,)), r"finite rates > 0; got \[-2\.0\]\. Leave out"),
    "given_number": (
        lambda: sim.simulate(5, 3, settings=sim.Settings(kinetics=sim.GivenRates((1,), (2,), (1,)))),
        r"n_genes to be 1, the number of rates given; got 3\. Change",
    ),
    "gene_time": (lambda: sim.GeneTime(sd=0), r"sd .* \(0, inf\); got 0\. Pass .* SharedTime"),
    "count": (lambda: sim.Lineages(count=0), r"count .* >= 1; got 0\. Pass count=1"),
    "branch_at": (lambda: sim.Lineages(branch_at=1), r"branch_at .* \(0, 1\); got 1\. Pass a fraction"),
    "specific": (lambda: sim.Lineages(specific=1.2), r"specific .* \[0, 1\]; got 1\.2\. Pass a fraction"),
    "switch": (
        lambda: sim.Lineages(switch=(0.5, 0.1)),
        r"switch .* within \[0, 1\]; got \(0\.5, 0\.1\)\. Pass fractions",
    ),
    "level": (lambda: sim.Normal(level=-1), r"level .* \[0, inf\); got -1\. Pass"),
    "depth": (lambda: sim.LibrarySize(depth=0), r"depth .* \(0, inf\); got 0\. Pass"),
    "library_sd": (lambda: sim.LibrarySize(sd=-1), r"sd .* \[0, inf\); got -1\. Pass"),
    "library_size": (lambda: sim.Poisson(library_size=5.0), r"a LibrarySize; got 5\.0\. Pass LibrarySize"),  # type: ignore[arg-type]
    "theta": (lambda: sim.NegativeBinomial(theta=0), r"theta .* \(0, inf\); got 0\. Pass an inverse dispersion"),
    "zinb_theta": (lambda: sim.ZeroInflatedNegativeBinomial(theta=np.inf), r"theta .* got inf\. Pass"),
    "gate": (lambda: sim.ZeroInflatedNegativeBinomial(gate=1), r"gate .* \[0, 1\); got 1\. Pass the probability"),
    "noise_name": (lambda: sim.Settings(noise="nb"), r"noise to be a Noise object; got 'nb'\. Pass an instance"),  # type: ignore[arg-type]
    "noise_class": (lambda: sim.Settings(noise=sim.Poisson), r"noise to be a Noise object; got <class"),  # type: ignore[arg-type]
    "kinetics": (lambda: sim.Settings(kinetics=None), r"kinetics to be a Kinetics object; got None"),  # type: ignore[arg-type]
    "stationary": (
        lambda: sim.Settings(stationary=True, lineages=sim.Lineages(count=2)),
        r"one lineage where stationary=True; got 2\. Cells without dynamics",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_settings_say_what_was_expected_what_came_and_the_remedy(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_replacing_one_part_checks_it_again() -> None:
    with pytest.raises(InputError, match="level"):
        replace(sim.Normal(), level=-1.0)
