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
LINEAGES = {"one": sim.Lineages(), "three": sim.Lineages(count=3), "cycle": sim.Cycle()}
TWO_BATCHES = sim.Batches(unspliced=(1.0, 0.4), spliced=(1.0, 0.7), spread=0.2)
FLOAT64 = 1e-10


def quiet(**settings: Any) -> sim.Settings:
    return sim.Settings(noise=sim.Normal(level=0), **settings)


def same(a: sim.Simulation, b: sim.Simulation, names: set[str] | None = None) -> list[str]:
    """The names of the arrays that are equal to the bit."""
    arrays = [f.name for f in fields(a) if isinstance(getattr(a, f.name), np.ndarray)]
    return [n for n in arrays if (names is None or n in names) and np.array_equal(getattr(a, n), getattr(b, n))]


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
@pytest.mark.parametrize("lineages", LINEAGES.values(), ids=LINEAGES)
def test_velocity_is_beta_u_minus_gamma_s(clock: sim.Clock, lineages: sim.Process) -> None:
    x = sim.simulate(80, 40, settings=sim.Settings(clock=clock, lineages=lineages))
    assert_allclose(x.true_velocity, x.true_beta * x.true_u - x.true_gamma * x.true_s, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("lineages", LINEAGES.values(), ids=LINEAGES)
def test_velocity_is_the_slope_of_s_along_time(lineages: sim.Process) -> None:
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


@pytest.mark.parametrize("lineages", LINEAGES.values(), ids=LINEAGES)
def test_unspliced_rna_follows_its_own_equation(lineages: sim.Process) -> None:
    x = sim.simulate(20_000, 12, settings=quiet(lineages=lineages), seed=3)
    for label in set(x.lineage.tolist()) - {"trunk"}:
        path = np.flatnonzero(x.lineage == label)
        path = path[x.true_t[path].argsort()]
        t, row = x.true_t[path][:, None], int(label[-1]) - 1
        on, off = x.true_onset[row], x.true_switch[row]
        # A gene of a cycle may be on from its onset past the end of time and on to its switch.
        is_on = np.where(on <= off, (on <= t) & (t < off), (t < off) | (on <= t))
        slope = np.diff(x.true_u[path], axis=0) / np.diff(t, axis=0)
        law = is_on * x.true_alpha - x.true_beta * x.true_u[path]
        smooth = is_on[1:] == is_on[:-1]
        assert_allclose(slope[smooth], ((law[1:] + law[:-1]) / 2)[smooth], rtol=0, atol=1e-3)


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


def test_a_path_ends_in_walls_and_a_circle_goes_round() -> None:
    times = np.array([-T_MAX - 1, -1.0, 0.0, 3.0, T_MAX + 2, 2 * T_MAX + 5])
    assert_allclose(sim.Lineages().fold(times), [T_MAX - 1, 1, 0, 3, T_MAX - 2, 5])
    assert_allclose(sim.Cycle().fold(times), [T_MAX - 1, T_MAX - 1, 0, 3, 2, 5])
    x = sim.simulate(2_000, 10, settings=sim.Settings(clock=sim.GeneTime(sd=1.5), lineages=sim.Cycle()))
    assert x.true_gene_t is not None
    around = np.angle(np.exp(2j * np.pi * (x.true_gene_t - x.true_t[:, None]) / T_MAX)) / (2 * np.pi) * T_MAX
    assert_allclose([around.mean(), around.std()], [0, 1.5], atol=0.05)


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


def test_zero_inflation_is_planted_where_it_is_said_to_be() -> None:
    library = sim.LibrarySize(depth=20.0)
    noise = sim.ZeroInflatedNegativeBinomial(gate=0.3, inflated=0.25, library_size=library)
    everywhere = sim.Settings(noise=noise, kinetics=sim.LogNormalRates(drop=0), stationary=True)
    x = sim.simulate(2_000, 40, settings=everywhere)
    assert_array_equal(x.true_gate, [0.3] * 10 + [0.0] * 30)
    for counts, abundance in ((x.unspliced, x.true_u), (x.spliced, x.true_s)):
        # Of NB(theta = 10) with means of 20 and more, next to nothing is zero by itself.
        by_itself = ((10 / (10 + x.library[:, None] * abundance)) ** 10).mean(axis=0)
        expected = x.true_gate + (1 - x.true_gate) * by_itself
        assert (np.abs((counts == 0).mean(axis=0) - expected) < 5 * (0.25 / 2_000) ** 0.5).all()
        seen = (counts / x.library[:, None]).mean(axis=0) / abundance[0]
        assert_allclose(seen, 1 - x.true_gate, atol=0.06)


@pytest.mark.parametrize("noise", sim.NOISES.values(), ids=sim.NOISES)
def test_gates_are_those_of_the_noise(noise: Any) -> None:
    gates = sim.simulate(5, 30, settings=sim.Settings(noise=noise())).true_gate
    assert_array_equal(gates, 0.2 if noise is sim.ZeroInflatedNegativeBinomial else 0.0)


def test_counts_of_2000_cells_and_200_genes_are_negative_binomial_with_library_sizes() -> None:
    noise = sim.NegativeBinomial(theta=4.0, library_size=sim.LibrarySize(depth=3.0, sd=0.5))
    x = sim.simulate(2_000, 200, settings=sim.Settings(noise=noise, kinetics=sim.LogNormalRates(drop=0)), seed=11)
    assert x.spliced.shape == x.unspliced.shape == (2_000, 200)
    for counts, abundance in ((x.unspliced, x.true_u), (x.spliced, x.true_s)):
        mean = x.library[:, None] * abundance
        z = ((counts - mean) / np.sqrt(mean + mean**2 / 4))[mean > 1]
        assert_allclose([z.mean(), z.var()], [0, 1], atol=0.02)
        # Sums over genes show the cells' library sizes.
        full = x.true_t > 2
        ratio = counts[full].sum(axis=1) / abundance[full].sum(axis=1)
        assert np.corrcoef(np.log(ratio), np.log(x.library[full]))[0, 1] > 0.98


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


def test_a_cycle_closes_and_its_genes_are_on_for_as_long_as_they_should_be() -> None:
    settings = quiet(lineages=sim.Cycle(on=(0.3, 0.5)), kinetics=sim.LogNormalRates(drop=0))
    x = sim.simulate(2_000, 400, settings=settings)
    share = np.mod(x.true_switch - x.true_onset, T_MAX)[0] / T_MAX
    assert share.min() >= 0.3 and share.max() <= 0.5
    assert_allclose([share.mean(), share.std()], [0.4, 0.2 / 12**0.5], atol=0.01)
    for times in (x.true_onset, x.true_switch):
        assert times.shape == (1, 400)
        assert_allclose([times.mean(), times.std()], [T_MAX / 2, T_MAX / 12**0.5], atol=1)
    assert (x.true_switch < x.true_onset).any(), "an interval that goes past the end of the circle"
    first, last = x.true_t.argmin(), x.true_t.argmax()
    gap = x.true_t[first] + T_MAX - x.true_t[last]
    for values, speed in ((x.true_u, x.true_alpha), (x.true_s, np.abs(x.true_velocity).max(axis=0))):
        assert (np.abs(values[first] - values[last]) <= 1.01 * gap * speed).all()
    assert set(x.lineage.tolist()) == {"lineage_1"}


def test_a_cycle_makes_as_much_rna_as_it_degrades() -> None:
    x = sim.simulate(20_000, 50, settings=quiet(lineages=sim.Cycle(), kinetics=sim.LogNormalRates(drop=0)))
    order = x.true_t.argsort()
    t = x.true_t[order]
    # The trapezoidal rule, the last cell being followed by the first.
    weight = (np.diff(t, append=t[0] + T_MAX) + np.diff(t, prepend=t[-1] - T_MAX)) / 2 / T_MAX
    made = x.true_alpha * np.mod(x.true_switch - x.true_onset, T_MAX)[0] / T_MAX
    assert_allclose(weight @ x.true_u[order], made / x.true_beta, rtol=1e-5)
    assert_allclose(weight @ x.true_s[order], made / x.true_gamma, rtol=1e-5)
    assert_allclose(weight @ x.true_velocity[order], 0, atol=1e-5)


@pytest.mark.parametrize("noise", sim.NOISES.values(), ids=sim.NOISES)
def test_batches_change_what_is_seen_and_nothing_that_is_true(noise: Any) -> None:
    alike = sim.Batches((1.0, 1.0), (1.0, 1.0))
    one, same_twice, two = (
        sim.simulate(200, 30, settings=sim.Settings(noise=noise(), batches=batches), seed=2)
        for batches in (sim.Batches(), alike, TWO_BATCHES)
    )
    true = {f.name for f in fields(one) if f.name.startswith("true_")} - {"true_gene_t"}
    capture = {"true_capture_u", "true_capture_s"}
    assert set(same(one, two, true | {"lineage", "library"})) == (true - capture) | {"lineage", "library"}
    assert set(same(same_twice, two, {"batch"})) == {"batch"}
    assert set(one.batch.tolist()) == {"batch_1"} and set(two.batch.tolist()) == {"batch_1", "batch_2"}
    # Capture that is the same everywhere is no batch effect: not a bit of the measurement changes.
    assert set(same(one, same_twice, {"spliced", "unspliced"})) == {"spliced", "unspliced"}
    assert (same_twice.true_capture_u == 1).all() and (same_twice.true_capture_s == 1).all()
    assert same(one, two, {"spliced", "unspliced"}) == []


def test_the_capture_of_a_batch_is_seen_in_its_means() -> None:
    batches = sim.Batches(unspliced=(1.0, 0.3, 2.0), spliced=(1.0, 0.8, 0.5), spread=0.3)
    settings = sim.Settings(
        noise=sim.Poisson(library_size=sim.LibrarySize(depth=50.0)),
        batches=batches,
        kinetics=sim.LogNormalRates(drop=0),
    )
    x = sim.simulate(6_000, 400, settings=settings, seed=9)
    names, counts = np.unique(x.batch, return_counts=True)
    assert names.tolist() == ["batch_1", "batch_2", "batch_3"]
    assert_allclose(counts / 6_000, 1 / 3, atol=0.03)
    for seen, abundance, capture, factors in (
        (x.unspliced, x.true_u, x.true_capture_u, batches.unspliced),
        (x.spliced, x.true_s, x.true_capture_s, batches.spliced),
    ):
        assert capture.shape == (3, 400)
        for b, name in enumerate(names):
            here = x.batch == name
            expected = (x.library[here, None] * abundance[here]).sum(axis=0)
            assert_allclose(seen[here].sum(axis=0) / expected, capture[b], rtol=0.05)
        # Genes scatter about the batch's factor, which is their mean.
        assert_allclose(capture.mean(axis=1), factors, rtol=0.08)
        assert_allclose(np.log(capture).std(axis=1), 0.3, atol=0.04)


@pytest.mark.parametrize("noise", sim.NOISES.values(), ids=sim.NOISES)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(noise: Any) -> None:
    settings = sim.Settings(
        noise=noise(),
        clock=sim.GeneTime(),
        lineages=sim.Lineages(count=2),
        kinetics=sim.LogNormalRates(drop=0),
        batches=TWO_BATCHES,
    )
    first, again, other = (sim.simulate(60, 30, settings=settings, seed=seed) for seed in (4, 4, 5))
    drawn = {f.name for f in fields(first) if isinstance(getattr(first, f.name), np.ndarray)}
    assert set(same(first, again)) == drawn
    assert set(same(first, other)) <= {"true_gate"} | ({"library"} if noise is sim.Normal else set())


@pytest.mark.parametrize("lineages", LINEAGES.values(), ids=LINEAGES)
def test_every_process_gives_the_same_bits_again(lineages: sim.Process) -> None:
    first, again = (sim.simulate(60, 30, settings=sim.Settings(lineages=lineages), seed=4) for _ in range(2))
    assert set(same(first, again)) == {f.name for f in fields(first) if isinstance(getattr(first, f.name), np.ndarray)}


def test_the_truth_does_not_depend_on_the_noise() -> None:
    truths = [sim.simulate(60, 30, settings=sim.Settings(noise=noise())) for noise in sim.NOISES.values()]
    names = {f.name for f in fields(truths[0]) if f.name.startswith("true_")} - {"true_gene_t", "true_gate"}
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
    batches = TWO_BATCHES if lineages is LINEAGES["three"] else sim.Batches()
    settings = sim.Settings(noise=noise(), clock=clock, lineages=lineages, batches=batches)
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
    assert ("lineage" in adata.obs) == (lineages is LINEAGES["three"])
    if lineages is LINEAGES["three"]:
        assert adata.obs["batch"].tolist() == x.batch.tolist()
        assert_array_equal(adata.varm["true_capture_u"], x.true_capture_u.T)
        assert_array_equal(adata.varm["true_capture_s"], x.true_capture_s.T)
        assert_array_equal(adata.varm["true_onset"], x.true_onset.T)
    else:
        assert "batch" not in adata.obs and len(adata.varm) == 0
        assert ("true_onset" in adata.var) == (lineages is LINEAGES["cycle"])
    if lineages is LINEAGES["cycle"]:
        assert_array_equal(adata.var["true_onset"], x.true_onset[0])
    assert ("true_gate" in adata.var) == (noise is sim.ZeroInflatedNegativeBinomial)
    if noise is sim.ZeroInflatedNegativeBinomial:
        assert_array_equal(adata.var["true_gate"], x.true_gate)
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
        r"one lineage where stationary=True; got Lineages\(count=2.*Cells without dynamics",
    ),
    "stationary_cycle": (
        lambda: sim.Settings(stationary=True, lineages=sim.Cycle()),
        r"one lineage where stationary=True; got Cycle\(.*Cells without dynamics",
    ),
    "lineages": (lambda: sim.Settings(lineages=3), r"lineages to be a Process object; got 3\. Pass an instance"),  # type: ignore[arg-type]
    "batches": (lambda: sim.Settings(batches=2), r"batches to be a Batches object; got 2\. Pass an instance"),  # type: ignore[arg-type]
    "batch_lengths": (
        lambda: sim.Batches((1.0, 0.5), (1.0,)),
        r"as many unspliced as spliced factors, one at least; got \[2, 1\]\. Pass one a batch",
    ),
    "no_batch": (lambda: sim.Batches((), ()), r"one at least; got \[0, 0\]\. Pass one a batch"),
    "batch_factor": (
        lambda: sim.Batches((1.0, 0.0), (1.0, 1.0)),
        r"each factor of unspliced .* \(0, inf\); got 0\.0\. Pass factors",
    ),
    "batch_spread": (lambda: sim.Batches(spread=-1.0), r"spread .* \[0, inf\); got -1\.0\. Pass the sd"),
    "cycle_on": (
        lambda: sim.Cycle(on=(0.0, 0.5)),
        r"on to be \(low, high\) within \(0, 1\); got \(0\.0, 0\.5\)\. Pass",
    ),
    "inflated": (
        lambda: sim.ZeroInflatedNegativeBinomial(inflated=1.5),
        r"inflated .* \[0, 1\]; got 1\.5\. Pass a fraction",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_settings_say_what_was_expected_what_came_and_the_remedy(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_replacing_one_part_checks_it_again() -> None:
    with pytest.raises(InputError, match="level"):
        replace(sim.Normal(), level=-1.0)
