"""AnnData to tensors and back: scaling that can be undone, genes that are left out, input that stays as it was."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from small import small_adata, small_fit

from pyro_velo import kinetics
from pyro_velo.data import anndata_keys as keys
from pyro_velo.data import check_output_keys
from pyro_velo.data.bridge import check_same, latent_time, velocity_data, write_posterior
from pyro_velo.errors import InputError
from pyro_velo.posterior import Posterior, summarise

LAYERS_IN_MS = (keys.VELOCITY, keys.VELOCITY_SD, keys.VELOCITY_Q05, keys.VELOCITY_Q95)


def smoothed() -> anndata.AnnData:
    """Six genes, in Ms and Mu of different units and offsets, of which the second and the fifth carry no dynamics."""
    adata = small_adata(n_genes=6)
    adata.layers[keys.MS] = 3 + 50 * adata.layers.pop("spliced")
    adata.layers[keys.MU] = 2 + 7 * adata.layers.pop("unspliced")
    adata.layers[keys.MS][:, 1] = 4.0
    adata.var[keys.VELOCITY_GENES] = [True, True, True, True, False, True]
    return adata


def shown(adata) -> dict[str, np.ndarray]:
    """Everything in an AnnData, by name."""
    found = {f"layers/{name}": np.array(layer) for name, layer in adata.layers.items()}
    found |= {f"obsm/{name}": np.array(value) for name, value in adata.obsm.items()}
    for where in ("obs", "var"):
        found |= {f"{where}/{name}": column.to_numpy() for name, column in getattr(adata, where).items()}
    return found | {"uns": np.array(str(dict(adata.uns)))}


def assert_unchanged(adata, before) -> None:
    after = shown(adata)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert_array_equal(after[name], value, err_msg=name)


def test_scaling_can_be_undone():
    adata = smoothed()
    before = shown(adata)
    data = velocity_data(adata)
    assert data.genes.tolist() == [True, False, True, True, False, True]
    assert data.gene_names == ["gene_0", "gene_2", "gene_3", "gene_5"]
    for layer, x, zero, unit in (
        (keys.MS, data.cells.s, data.scaling.s_zero, data.scaling.s_unit),
        (keys.MU, data.cells.u, data.scaling.u_zero, data.scaling.u_unit),
    ):
        original = adata.layers[layer][:, data.genes]
        assert_allclose(x.numpy() * unit + zero, original, rtol=1e-5)
        assert (x.min(0).values == 0).all()
        assert_allclose(np.percentile(x.numpy(), 99, axis=0), 1, rtol=1e-5)
    assert_allclose(data.cells.ratio, data.scaling.u_unit / data.scaling.s_unit)
    assert data.cells.molecules.dtype == torch.float32
    assert_unchanged(adata, before)


def test_the_units_of_a_layer_do_not_matter():
    adata, other = smoothed(), smoothed()
    other.layers[keys.MS], other.layers[keys.MU] = 8 * other.layers[keys.MS], 8 * other.layers[keys.MU]
    one, two = velocity_data(adata), velocity_data(other)
    assert torch.equal(one.cells.molecules, two.cells.molecules)
    assert torch.equal(one.cells.ratio, two.cells.ratio)
    assert_allclose(two.scaling.s_unit, 8 * one.scaling.s_unit)


FORMS = {
    "dense": np.asarray,
    "float64": lambda x: x.astype(np.float64),
    "fortran": np.asfortranarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "sparse array": sparse.csr_array,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("as_is", [False, True])
def test_every_form_of_a_layer_gives_the_same(form, as_is):
    adata = small_adata()
    if not as_is:
        adata.layers = {keys.MS: adata.layers["spliced"], keys.MU: adata.layers["unspliced"]}
    expected = velocity_data(adata, as_is=as_is).cells.molecules
    for name in list(adata.layers):
        if "true" not in name:
            adata.layers[name] = form(adata.layers[name])
    torch.testing.assert_close(velocity_data(adata, as_is=as_is).cells.molecules, expected)


def test_as_is_takes_the_raw_layers_and_every_gene_that_varies():
    adata = smoothed()
    adata.layers["spliced"], adata.layers["unspliced"] = adata.layers["Ms"] + 1, 9 * adata.layers["Mu"]
    data = velocity_data(adata, as_is=True)
    # Marks of an earlier preparation do not concern the layers as they stand; a gene that is flat in one does not fit.
    assert data.genes.tolist() == [True, False, True, True, True, True]
    assert data.layers == ("spliced", "unspliced")
    assert velocity_data(adata).layers == ("Ms", "Mu")


def test_other_layers_can_be_named():
    adata = smoothed()
    adata.layers["S"], adata.layers["U"] = adata.layers["Ms"] * 2, adata.layers["Mu"]
    for as_is in (False, True):
        data = velocity_data(adata, as_is=as_is, spliced="S", unspliced="U")
        assert data.layers == ("S", "U")
        assert data.scaling.s_zero[0] == 2 * velocity_data(adata).scaling.s_zero[0]


def test_no_ratio_is_too_high_as_it_is():
    """Nuclei, or layers that were normalised apart from each other: the check is one of preparing."""
    adata = small_adata()
    adata.layers["unspliced"] = adata.layers["unspliced"] * 1000
    assert velocity_data(adata, as_is=True).genes.all()


def test_a_view_is_read_and_stays_a_view():
    adata = smoothed()
    view = adata[::2, [0, 2, 3]]
    data = velocity_data(view)
    assert view.is_view and len(data.cells) == 20 and data.gene_names == ["gene_0", "gene_2", "gene_3"]


def without(name):
    def spoil(adata):
        del adata.layers[name]

    return spoil


def value(layer, number):
    def spoil(adata):
        adata.layers[layer][3, 2] = number

    return spoil


def flat(adata):
    adata.layers["Mu"][:] = 1.0


def unmarked(adata):
    adata.var[keys.VELOCITY_GENES] = False


@pytest.mark.parametrize(
    ("spoil", "options", "match"),
    [
        (without("Ms"), {}, r"'Ms' is missing; present: .*'Mu'.*\.pp\.prepare\(adata\) first, or .*as_is=True"),
        (without("Mu"), {}, r"Layer 'Mu' isn't there, expected one of: 'true_u'.*'Ms'"),
        (without("Mu"), {"as_is": True}, r"Layer 'spliced' isn't there"),
        (flat, {"spliced": "nothing"}, "Layer 'nothing' isn't there"),
        (flat, {"unspliced": "Ms"}, "both the layer 'Ms', expected two"),
        (value("Ms", np.nan), {}, r"Layer 'Ms' holds 1 NaN .*first gene: 'gene_2'"),
        (value("Mu", np.inf), {}, r"Layer 'Mu' holds 1 NaN or infinite .*first gene: 'gene_2'"),
        (value("Mu", -1), {}, r"Layer 'Mu' holds 1 negative .*first gene: 'gene_2'"),
        (flat, {}, "None of the 6 genes varies in both layers"),
        (unmarked, {}, "None of the 6 genes"),
    ],
)
def test_bad_layers_are_told_and_stay_as_they_were(spoil, options, match):
    adata = smoothed()
    spoil(adata)
    before = shown(adata)
    with pytest.raises(InputError, match=match):
        velocity_data(adata, **options)
    assert_unchanged(adata, before)


# Back


@pytest.fixture(scope="module")
def data():
    return velocity_data(smoothed())


@pytest.fixture(scope="module")
def posterior(data):
    return summarise(small_fit(data.cells), data.cells, draws=20, progress=False)


@pytest.fixture(scope="module")
def written(data, posterior):
    adata = smoothed()
    write_posterior(adata, data, posterior, about={"version": "1", "seed": 0})
    return adata


def test_every_key_is_written_and_no_other(written):
    before = smoothed()
    assert written.layers.keys() - before.layers.keys() == set(keys.LAYERS_OUT)
    assert set(written.var.columns) - set(before.var.columns) == set(keys.VAR_OUT)
    assert set(written.obs.columns) - set(before.obs.columns) == set(keys.OBS_OUT)
    assert set(written.obsm) == set(keys.OBSM_OUT)
    assert written.uns[keys.UNS] == {"version": "1", "seed": 0, "layers": {"spliced": "Ms", "unspliced": "Mu"}}
    assert_array_equal(written.layers["Ms"], before.layers["Ms"])


def test_genes_that_were_not_fitted_hold_nan(written, data):
    for name in set(keys.LAYERS_OUT) - {keys.FIT_STATE}:
        assert_array_equal(np.isnan(written.layers[name]).all(0), ~data.genes, err_msg=name)
        assert_array_equal(np.isnan(written.layers[name]).any(0), ~data.genes, err_msg=name)
    for name in keys.VAR_OUT:
        assert_array_equal(np.isnan(written.var[name]), ~data.genes, err_msg=name)
    assert_array_equal((written.layers[keys.FIT_STATE] == 255).all(0), ~data.genes)
    assert (written.layers[keys.FIT_STATE][:, data.genes] < 4).all()
    assert_array_equal(written.var[keys.VELOCITY_GENES], data.genes)


def test_results_are_in_the_units_of_the_layers(written, data, posterior):
    unit = data.scaling.s_unit
    for name, field in zip(LAYERS_IN_MS, ("", "_sd", "_q05", "_q95"), strict=True):
        assert_allclose(written.layers[name][:, data.genes], getattr(posterior, f"velocity{field}") * unit, rtol=1e-6)
    var = written.var[data.genes]
    assert_allclose(var.fit_alpha, posterior.rates["alpha"] * unit, rtol=1e-6)
    assert_allclose(var.fit_beta, posterior.rates["beta"], rtol=1e-6)
    assert_allclose(var.fit_gamma_sd, posterior.rates_sd["gamma"], rtol=1e-6)
    assert_allclose(var.fit_t_, posterior.rates["switch_time"], rtol=1e-6)
    assert_allclose(var.fit_std_u, posterior.rates["noise_unspliced"] * data.scaling.u_unit, rtol=1e-6)
    assert_allclose(var.fit_std_s, posterior.rates["noise_spliced"] * unit, rtol=1e-6)
    assert_allclose(var.fit_u0, smoothed().layers["Mu"][:, data.genes].min(0))
    assert_allclose(var.fit_s0, smoothed().layers["Ms"][:, data.genes].min(0))
    assert_allclose(var.fit_likelihood, np.exp(posterior.log_likelihood / 2), rtol=1e-6)


def test_the_expression_obeys_the_rates_in_the_layers_units(data):
    """velocity = beta (fit_u - u0) - gamma (fit_s - s0) and the curve runs through the cells, for one sure draw."""
    n, names = len(data.cells), data.gene_names
    rates = kinetics.Rates(*(torch.full((len(names),), x) for x in (0.6, 0.5, 0.3, 9.0)))
    t = torch.linspace(0.1, 20, n)[:, None].expand(n, len(names))
    u, s = kinetics.trajectory(rates, t)
    v, zero = kinetics.velocity(rates, u, s).numpy(), np.zeros((n, len(names)), np.float32)
    sure = dict(zip(("alpha", "beta", "gamma", "switch_time"), (r.numpy() for r in rates), strict=True))
    posterior = Posterior(
        v, zero, v, v, t.numpy(), zero, u.numpy(), s.numpy(), zero.astype(np.uint8), zero[:4], sure,
        {name: np.zeros_like(value) for name, value in sure.items()}, zero[0], zero[:, :2], zero[:, 0],
    )  # fmt: skip
    adata = smoothed()
    write_posterior(adata, data, posterior, about={})
    var, on = adata.var[data.genes], data.genes
    above_u = adata.layers["fit_u"][:, on] - var.fit_u0.to_numpy()
    above_s = adata.layers["fit_s"][:, on] - var.fit_s0.to_numpy()
    fitted = kinetics.Rates(*(torch.as_tensor(var[name].to_numpy()) for name in keys.RATES))
    curve_u, curve_s = kinetics.trajectory(fitted, t)
    assert_allclose(above_u, curve_u, rtol=1e-4, atol=1e-4)
    assert_allclose(above_s, curve_s, rtol=1e-4, atol=1e-4)
    velocity = var.fit_beta.to_numpy() * above_u - var.fit_gamma.to_numpy() * above_s
    assert_allclose(adata.layers["velocity"][:, on], velocity, rtol=1e-3, atol=1e-3)


def test_a_view_becomes_an_anndata_of_its_own(data, posterior):
    whole = smoothed()
    view = whole[:, :]
    write_posterior(view, data, posterior, about={})
    assert not view.is_view and keys.VELOCITY in view.layers and keys.VELOCITY not in whole.layers


def test_what_cannot_be_written_leaves_the_input_untouched(data, posterior):
    adata = smoothed()
    before = shown(adata)
    broken = {**vars(posterior), "log_likelihood": posterior.log_likelihood[:2]}
    with pytest.raises(ValueError, match="shape"):
        write_posterior(adata, data, Posterior(**broken), about={})
    assert_unchanged(adata, before)


def test_a_fit_that_is_there_is_not_replaced_unasked(written):
    with pytest.raises(InputError, match=r"holds a fit already \(layers\['velocity'\].*pass overwrite"):
        check_output_keys(written)
    check_output_keys(written, overwrite=True)


def test_what_is_written_survives_a_file(written, tmp_path):
    written.write_h5ad(tmp_path / "out.h5ad")
    again = anndata.read_h5ad(tmp_path / "out.h5ad")
    for name in keys.LAYERS_OUT:
        assert_array_equal(again.layers[name], written.layers[name])


def test_only_the_cells_and_genes_that_were_fitted_are_the_same(data):
    adata = smoothed()
    check_same(adata, data)
    with pytest.raises(InputError, match=r"of shape \(40, 6\); got \(40, 5\)"):
        check_same(adata[:, :5], data)
    with pytest.raises(InputError, match=r"Expected the cells .* in their order"):
        check_same(adata[::-1], data)
    with pytest.raises(InputError, match=r"Expected the genes .* in their order"):
        check_same(adata[:, ::-1], data)


def test_latent_time_ranks_cells_and_trusts_genes_that_fit():
    t = np.linspace(0, 20, 50, dtype=np.float32)
    both = np.column_stack([t, t**2])
    sure = np.zeros_like(both)
    assert_allclose(latent_time(both, sure, np.zeros(2)), np.linspace(0, 1, 50), atol=1e-6)
    against = np.column_stack([t, t[::-1]])
    assert_allclose(latent_time(against, sure, np.array([0.0, -100.0])), np.linspace(0, 1, 50), atol=1e-6)
    assert_array_equal(latent_time(np.zeros((1, 2), np.float32), np.zeros((1, 2)), np.zeros(2)), [0.0])
    assert_array_equal(latent_time(np.zeros((1, 2), np.float32), np.ones((1, 2)), np.zeros(2)), [0.0])
    # A gene that does not know when counts for little, and cell by cell.
    unsure = np.column_stack([np.zeros(50), np.full(50, 1e4)])
    assert_allclose(latent_time(against, unsure, np.zeros(2)), np.linspace(0, 1, 50), atol=1e-3)
    lost = np.where(np.arange(50) % 2, t[::-1], t)
    half = np.where(np.arange(50) % 2, 1e4, 0.0)
    found = latent_time(np.column_stack([t, lost]), np.column_stack([0 * half, half]), np.zeros(2))
    assert_allclose(np.argsort(found[::2]), np.arange(25))
    assert np.corrcoef(found, t)[0, 1] > 0.98
