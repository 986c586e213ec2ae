"""Pictures: what is drawn is what was fitted, on the ax that was given, and nothing else changes."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fitted import fitted_adata
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy import sparse
from scipy.integrate import solve_ivp

from pyro_velo import kinetics, plots
from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.plots.canvas import STATE_COLORS
from pyro_velo.plots.curves import gene_fit, inside_probability
from pyro_velo.plots.elbo import best_epoch
from pyro_velo.plots.intervals import interval, lognormal

PICTURES = {
    "elbo": lambda adata, ax: plots.elbo(adata, ax=ax),
    "phase by state": lambda adata, ax: plots.phase_portrait(adata, "Gene0", ax=ax),
    "phase by time": lambda adata, ax: plots.phase_portrait(adata, "Gene0", color="time", ax=ax),
    "phase by cluster": lambda adata, ax: plots.phase_portrait(adata, "Gene0", color="clusters", ax=ax),
    "phase by number": lambda adata, ax: plots.phase_portrait(adata, "Gene0", color="latent_time", ax=ax),
    "stream": lambda adata, ax: plots.stream(adata, color="clusters", ax=ax),
    "stream shaded": lambda adata, ax: plots.stream(adata, "X_umap", shade="velocity_uncertainty", ax=ax),
    "grid": lambda adata, ax: plots.grid(adata, color="clusters", labels="beside", ax=ax),
    "grid shaded": lambda adata, ax: plots.grid(adata, shade="velocity_uncertainty", ax=ax),
    "arrows": lambda adata, ax: plots.arrows(adata, color="latent_time", n_cells=50, ax=ax),
    "arrows shaded": lambda adata, ax: plots.arrows(adata, shade="velocity_uncertainty", ax=ax),
    "latent time": lambda adata, ax: plots.latent_time(adata, ax=ax),
    "uncertainty": lambda adata, ax: plots.uncertainty(adata, ax=ax),
    "rates": lambda adata, ax: plots.rates(adata, ["Gene0", "Gene3"], ax=ax),
    "ranking": lambda adata, ax: plots.gene_ranking(adata, 5, ax=ax),
}
each_picture = pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES.keys())


@pytest.fixture
def adata():
    return fitted_adata()


@each_picture
def test_a_picture_is_on_the_ax_given_and_changes_nothing_else(draw, adata):
    settings, untouched = dict(mpl.rcParams), fitted_adata()
    figure = Figure()
    ax, other = figure.subplots(1, 2)
    assert draw(adata, ax) is ax
    figure.savefig("/dev/null", format="png")
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == []
    assert ax.has_data()
    assert not other.has_data()
    assert adata.obs.equals(untouched.obs) and adata.var.equals(untouched.var)
    assert all((adata.layers[k] == untouched.layers[k])[:, :-1].all() for k in untouched.layers)


@each_picture
def test_without_an_ax_one_figure_is_made(draw, adata):
    ax = draw(adata, None)
    assert plt.get_fignums() == [ax.figure.number]
    assert ax.has_data()


def drawn_curve(ax):
    solid, dashed = (line.get_xydata() for line in ax.lines[:2])
    return solid, dashed


@pytest.mark.parametrize("gene", ["Gene0", "Gene5"])
def test_the_curve_is_the_trajectory_in_the_units_of_the_layers(gene, adata):
    solid, dashed = drawn_curve(plots.phase_portrait(adata, gene))
    row, median = adata.var.loc[gene], gene_fit(adata, gene).median
    rates, switch = kinetics.Rates(*(torch.tensor([each], dtype=torch.float64) for each in median)), median[3]
    share = np.linspace(0, 1, len(solid)) ** 2
    times = switch * share, switch + (kinetics.T_MAX - switch) * share
    for branch, t in zip((solid, dashed), times, strict=True):
        u, s = kinetics.trajectory(rates, torch.as_tensor(t)[:, None])
        expected = np.column_stack([s.numpy() + row.fit_s0, u.numpy() + row.fit_u0])
        np.testing.assert_allclose(branch, expected, rtol=1e-10, atol=1e-12)


def test_the_curve_solves_the_ode_and_turns_at_the_switch(adata):
    ax = plots.phase_portrait(adata, "Gene2")
    solid, dashed = drawn_curve(ax)
    row = adata.var.loc["Gene2"]
    offset = np.array([row.fit_u0, row.fit_s0])
    alpha, beta, gamma, switch = gene_fit(adata, "Gene2").median

    def slope(alpha):
        return lambda t, y: [alpha - beta * y[0], beta * y[0] - gamma * y[1]]

    on = solve_ivp(slope(alpha), (0, switch), [0, 0], rtol=1e-10, atol=1e-12).y[:, -1]
    off = solve_ivp(slope(0.0), (switch, kinetics.T_MAX), on, rtol=1e-10, atol=1e-12).y[:, -1]
    assert tuple(solid[0][::-1]) == tuple(offset)
    for point in (solid[-1], dashed[0], ax.lines[2].get_xydata()[0]):
        np.testing.assert_allclose(point[::-1], on + offset, rtol=1e-7)
    np.testing.assert_allclose(dashed[-1][::-1], off + offset, rtol=1e-6, atol=1e-9)
    steady = solve_ivp(slope(alpha), (0, 100 / min(beta, gamma)), [0, 0], rtol=1e-10, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(ax.lines[3].get_xydata()[0][::-1], steady + offset, rtol=1e-7)
    assert ax.lines[0].get_linestyle() == "-" and ax.lines[1].get_linestyle() == "--"


def test_the_fitted_curve_runs_through_its_band_and_the_band_widens_with_the_sd(adata):
    def area(factor):
        # Beta is known: what all rates share is the unit of time, which no curve shows.
        factors = factor * np.array([1, 0, 1, 1])
        adata.var.loc["Gene1", list(keys.RATES_SD)] = factors * adata.var.loc["Gene1", list(keys.RATES)].to_numpy()
        fit = gene_fit(adata, "Gene1")
        tops = fit.offset + 1.5 * fit.mean[0] / fit.mean[1:3][::-1]
        s, u = (np.linspace(start, top, 200) for start, top in zip(fit.offset, tops, strict=True))
        inside = inside_probability(fit, s, u)
        return s, u, inside, np.mean((inside > 0.05) & (inside < 0.95))

    assert area(0.0)[-1] == 0
    areas = [area(factor)[-1] for factor in (0.02, 0.05, 0.1, 0.2)]
    assert areas == sorted(areas) and areas[0] < areas[-1] / 4
    s, u, inside, _ = area(0.1)
    solid, dashed = drawn_curve(plots.phase_portrait(adata, "Gene1"))
    for x, y in [*solid[60:-5:10], *dashed[5:-60:10]]:
        near = inside[np.abs(u - y).argmin(), np.abs(s - x).argmin()]
        assert 0.05 < near < 0.95
    assert (inside[-1] == 0).all() and np.nanmax(inside) == 1


def test_a_unit_of_time_that_is_not_known_widens_no_band(adata):
    rates = adata.var.loc["Gene1", list(keys.RATES)].to_numpy(float)
    # Three rates faster by e^x and a switch earlier by as much, x Normal with sd .3: the LogNormals' means and sds.
    adata.var.loc["Gene1", list(keys.RATES)] = rates * np.exp(0.3**2 / 2)
    adata.var.loc["Gene1", list(keys.RATES_SD)] = rates * np.exp(0.3**2 / 2) * np.sqrt(np.expm1(0.3**2))
    fit = gene_fit(adata, "Gene1")
    np.testing.assert_allclose(fit.median, rates, rtol=1e-6)
    np.testing.assert_allclose(fit.of_shape, 0, atol=1e-6)


def test_cells_wear_the_colour_of_their_state(adata):
    ax = plots.phase_portrait(adata, "Gene0", key=False)
    cells = ax.collections[0]
    where = {
        tuple(point): to_rgba(color)[:3]
        for point, color in zip(cells.get_offsets(), cells.get_facecolors(), strict=True)
    }
    states = adata.layers[keys.FIT_STATE][:, 0]
    for s, u, state in zip(adata.layers["Ms"][:, 0], adata.layers["Mu"][:, 0], states, strict=True):
        assert where[float(s), float(u)] == pytest.approx(to_rgba(STATE_COLORS[state])[:3])


def test_sparse_layers_draw_the_same_cells(adata):
    dense = plots.phase_portrait(adata, "Gene0").collections[0].get_offsets()
    adata.layers["Ms"], adata.layers["Mu"] = (
        sparse.csr_matrix(adata.layers["Ms"]),
        sparse.csc_matrix(adata.layers["Mu"]),
    )
    assert (plots.phase_portrait(adata, "Gene0").collections[0].get_offsets() == dense).all()


def test_layers_that_were_fitted_as_they_stand_are_drawn(adata):
    adata.layers["spliced"], adata.layers["unspliced"] = adata.layers.pop("Ms"), adata.layers.pop("Mu")
    ax = plots.phase_portrait(adata, "Gene0")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("spliced (spliced)", "unspliced (unspliced)")


@pytest.mark.parametrize("draw", [plots.stream, plots.grid])
def test_fields_are_float64_and_follow_the_cells(draw, adata, monkeypatch):
    seen = {}
    for name in ("streamplot", "quiver"):
        original = getattr(mpl.axes.Axes, name)

        def spy(self, *arguments, original=original, **options):
            seen["arrays"] = arguments[:4]
            return original(self, *arguments, **options)

        monkeypatch.setattr(mpl.axes.Axes, name, spy)
    adata.obsm["X_umap"] = adata.obsm["X_umap"].astype(np.float32)
    assert adata.obsm["velocity_umap"].dtype == np.float32
    draw(adata)
    assert [np.asarray(a).dtype for a in seen["arrays"]] == [np.float64] * 4
    # The cells of the fixture run over an arc from left to right.
    assert np.nanmedian(seen["arrays"][2]) > 0


@pytest.mark.parametrize("offset", [0.0, 1e4, -3.3e3])
def test_streams_survive_float32_embeddings_far_from_the_origin(offset, adata):
    adata.obsm["X_umap"] = (adata.obsm["X_umap"] + offset).astype(np.float32)
    assert len(plots.stream(adata).patches) > 3


def test_uncertain_arrows_are_paler(adata):
    adata.obs[keys.VELOCITY_UNCERTAINTY] = np.where(np.arange(adata.n_obs) < 150, 0.01, 0.5)
    ax = plots.arrows(adata, shade=keys.VELOCITY_UNCERTAINTY)
    arrows = ax.collections[-1]
    ax.figure.canvas.draw()
    lightness = arrows.get_facecolors()[:, 0]
    certain = arrows.get_array() < 0.1
    assert lightness[certain].max() < 0.3 < 0.7 < lightness[~certain].min()


def test_names_on_the_data_do_not_overlap(adata):
    adata.obsm["X_umap"] = adata.obsm["X_umap"] * 0.01 + np.random.default_rng(1).normal(size=(adata.n_obs, 2))
    ax = plots.stream(adata, color="clusters")
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == ["early", "middle", "late"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_odd_names_are_written_as_they_are(adata):
    odd = ["_private", "$x^2$", "$broken"]
    adata.obs["clusters"] = adata.obs["clusters"].cat.rename_categories(odd)
    adata.var_names = [f"$g_{i}$" if i else "<b>$a" for i in range(adata.n_vars)]
    beside = plots.grid(adata, color="clusters", labels="beside")
    assert [text.get_text() for text in beside.get_legend().get_texts()] == odd
    for ax in (
        beside,
        plots.stream(adata, color="clusters"),
        plots.phase_portrait(adata, "<b>$a"),
        plots.gene_ranking(adata),
    ):
        ax.figure.savefig("/dev/null", format="png")


def test_cells_without_a_category_or_a_velocity_are_left_aside(adata):
    adata.obs["clusters"] = adata.obs["clusters"].where(np.arange(adata.n_obs) % 7 > 0)
    adata.obsm["velocity_umap"][::5] = np.nan
    for draw in (plots.stream, plots.grid, plots.arrows):
        draw(adata, color="clusters", shade=keys.VELOCITY_UNCERTAINTY).figure.savefig("/dev/null", format="png")


def test_scanpys_colours_are_kept(adata):
    adata.uns["clusters_colors"] = np.array(["#ff0000", "#00ff00", "#0000ff"])
    ax = plots.stream(adata, color="clusters")
    shown = {tuple(color[:3]) for color in ax.collections[0].get_facecolors()}
    assert shown == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}


def test_the_best_epoch_is_the_highest_held_out_one(adata):
    history = adata.uns[keys.UNS]["elbo_history"]
    epoch, value = best_epoch(history)
    assert value == np.nanmax(history["held_out"])
    marked = [line for line in plots.elbo(history).lines if line.get_marker() == "o"]
    assert [tuple(line.get_xydata()[0]) for line in marked] == [(epoch, value)]


def test_without_held_out_cells_no_epoch_is_marked(adata):
    history = adata.uns[keys.UNS]["elbo_history"] | {"held_out": np.full(60, np.nan)}
    assert best_epoch(history) is None
    assert not [line for line in plots.elbo(history).lines if line.get_marker() == "o"]


def test_the_lognormal_has_the_mean_and_sd_and_its_interval_the_level(rng):
    mu, sigma = lognormal(0.7, 0.2)
    assert np.exp(mu + sigma**2 / 2) == pytest.approx(0.7)
    assert np.sqrt(np.expm1(sigma**2)) * 0.7 == pytest.approx(0.2)
    low, high = interval(0.7, 0.2, 0.9)
    draws = np.exp(rng.normal(mu, sigma, 200_000))
    assert np.mean((draws > low) & (draws < high)) == pytest.approx(0.9, abs=0.004)
    assert np.mean(draws < low) == pytest.approx(0.05, abs=0.003)


def test_rates_are_drawn_at_their_means_within_their_intervals(adata):
    genes = ["Gene0", "Gene4", "Gene7"]
    ax = plots.rates(adata, genes)
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_yticklabels()] == genes
    for name, line, bars in zip(keys.RATES, ax.lines, ax.collections, strict=False):
        means = adata.var.loc[genes, name]
        np.testing.assert_allclose(line.get_xdata(), means)
        low, high = interval(means, adata.var.loc[genes, f"{name}_sd"])
        ends = np.array([path[:, 0] for path in bars.get_segments()])
        np.testing.assert_allclose(ends[:, 0], low)
        np.testing.assert_allclose(ends[:, 1], np.minimum(high, kinetics.T_MAX))


def test_genes_are_ranked_and_unfitted_ones_left_out(adata):
    ranked = plots.best_genes(adata, 100)
    assert len(ranked) == adata.n_vars - 1 and "Gene11" not in ranked
    assert (np.diff(adata.var.loc[ranked, keys.FIT_R2]) <= 0).all()
    ax = plots.gene_ranking(adata, 4)
    assert [label.get_text() for label in ax.get_yticklabels()] == ranked[:4]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), adata.var.loc[ranked[:4], keys.FIT_R2])


WITHOUT = {
    "elbo": ("uns", keys.UNS, plots.elbo),
    "alpha": ("var", keys.FIT_ALPHA, lambda adata: plots.phase_portrait(adata, "Gene0")),
    "sd": ("var", "fit_gamma_sd", lambda adata: plots.rates(adata, ["Gene0"])),
    "offset": ("var", keys.FIT_U0, lambda adata: plots.phase_portrait(adata, "Gene0")),
    "layer": ("layers", "Ms", lambda adata: plots.phase_portrait(adata, "Gene0")),
    "state": ("layers", keys.FIT_STATE, lambda adata: plots.phase_portrait(adata, "Gene0")),
    "time": ("layers", keys.FIT_T, lambda adata: plots.phase_portrait(adata, "Gene0", color="time")),
    "embedding": ("obsm", "X_umap", plots.stream),
    "its velocity": ("obsm", "velocity_umap", plots.grid),
    "latent time": ("obs", keys.LATENT_TIME, plots.latent_time),
    "uncertainty": ("obs", keys.VELOCITY_UNCERTAINTY, plots.uncertainty),
    "shade": ("obs", keys.VELOCITY_UNCERTAINTY, lambda adata: plots.arrows(adata, shade=keys.VELOCITY_UNCERTAINTY)),
    "clusters": ("obs", "clusters", lambda adata: plots.stream(adata, color="clusters")),
    "likelihood": ("var", keys.FIT_R2, plots.gene_ranking),
}


@pytest.mark.parametrize(("where", "name", "draw"), WITHOUT.values(), ids=WITHOUT.keys())
def test_a_missing_key_is_told_with_what_is_there(where, name, draw, adata):
    table = getattr(adata, where)
    del table[name]
    with pytest.raises(InputError, match=rf"Expected '{name}' in adata\.{where}, which holds .+\. \w+") as told:
        draw(adata)
    assert all(str(present) in str(told.value) for present in getattr(adata, where))
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda adata: plots.phase_portrait(adata, "gene4x"), "Expected gene 'gene4x' among the 12 .* Gene0, Gene1"),
        (
            lambda adata: plots.phase_portrait(adata, "Gene11"),
            "positive fitted rates for gene 'Gene11', found fit_alpha nan",
        ),
        (lambda adata: plots.phase_portrait(adata, "Gene0", band=90), "band between 0 and 1, got 90"),
        (lambda adata: plots.stream(adata, labels="legend"), "one of 'on data', 'beside', 'none', got 'legend'"),
        (lambda adata: plots.stream(adata, shade="clusters"), "Expected numbers in adata.obs\\['clusters'\\]"),
        (lambda adata: plots.elbo({"epoch": [1], "train": [2.0]}), "Expected 'held_out' .* which holds epoch, train"),
    ],
)
def test_wrong_arguments_are_told_with_the_right_ones(draw, message, adata):
    with pytest.raises(InputError, match=message):
        draw(adata)
    assert plt.get_fignums() == []
