"""Categories and numbers of cells: how they are read, what is refused, and what the model does with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from small import small_adata

import pyro_velo as pv
from pyro_velo.data.covariates import design
from pyro_velo.errors import InputError

N = 40
MODEL = pv.VelocityModel(n_latent=2, hidden=(8,))
GUIDE = pv.guides.Amortized(hidden=(8,), hidden_states=(8,))


@pytest.fixture
def adata():
    found = small_adata(N)
    found.obs["lab"] = np.array(["b", "a"])[np.arange(N) % 2]
    found.obs["age"] = np.linspace(3.0, 9.0, N)
    found.obs["sex"] = np.array(["f", "m"])[np.arange(N) // 20]
    return found


def fitted(adata, **told):
    data = pv.velocity_data(adata, as_is=True, **told)
    settings = pv.TrainSettings(max_epochs=2, batch_size=20)
    return pv.fit(MODEL, GUIDE, adata, data=data, settings=settings, progress=False)


def test_nothing_asked_for_is_nothing(adata) -> None:
    assert design(adata) is None
    assert pv.velocity_data(adata, as_is=True).cells.covariates is None


def test_categories_are_one_hot_and_numbers_standardised(adata) -> None:
    found = design(adata, "lab", ["age", "sex"])
    assert found.matrix.shape == (N, 5) and found.matrix.dtype == np.float32
    assert found.batches == ("a", "b") and found.levels == {"lab": ("a", "b"), "sex": ("f", "m")}
    assert_array_equal(found.matrix[:, found.columns["lab"]].argmax(1), adata.obs["lab"] == "b")
    assert_array_equal(found.group, adata.obs["lab"] == "b")
    age = found.matrix[:, found.columns["age"]]
    assert_allclose([age.mean(), age.std()], [0, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda obs: obs.drop(columns="lab"), "lab"),
        (lambda obs: obs.assign(lab=None), "missing for 40 cells"),
        (lambda obs: obs.assign(lab="a"), "'a' in every cell"),
        (lambda obs: obs.assign(lab=np.linspace(0, 1, N)), "aren't whole.*as a covariate"),
    ],
)
def test_a_column_that_says_nothing_is_refused(adata, change, says) -> None:
    adata.obs = change(adata.obs)
    with pytest.raises(InputError, match=says):
        design(adata, "lab")


def test_numbers_that_do_not_vary_or_end_are_refused(adata) -> None:
    for value, says in ((np.full(N, 2.0), "2 in every cell"), (np.r_[np.inf, np.ones(N - 1)], "infinite")):
        adata.obs["age"] = value
        with pytest.raises(InputError, match=says):
            design(adata, None, ["age"])


def test_a_column_counts_once(adata) -> None:
    with pytest.raises(InputError, match="twice"):
        design(adata, "lab", ["lab"])


def test_both_networks_are_told_and_each_batch_has_its_scale(adata) -> None:
    fit = fitted(adata, batch_key="lab", covariates=["age"])
    program, guide = fit.fitted.program, fit.fitted.guide
    assert guide.encoder.trunk[0].in_features == 2 * 5 + 3
    assert program.times.decoder.trunk[0].in_features == guide.state_decoder.trunk[0].in_features == 2 + 3
    names = {name for name in fit.fitted.training.best if "batch_effect" in name}
    assert any("unspliced" in name for name in names) and any("_spliced" in name for name in names)


def test_prediction_under_another_batch_moves_the_expression_and_not_the_data(adata) -> None:
    fit = fitted(adata, batch_key="lab")
    before = fit.data.cells.covariates.clone()
    own, other = fit.posterior(draws=5), fit.posterior(draws=5, batch="b")
    assert torch.equal(fit.data.cells.covariates, before)
    was_b = (adata.obs["lab"] == "b").to_numpy()
    assert_array_equal(own.velocity[was_b], other.velocity[was_b])
    assert (own.velocity[~was_b] != other.velocity[~was_b]).any()


def test_an_unknown_batch_lists_the_known(adata) -> None:
    with pytest.raises(InputError, match=r"'c' is unknown.*\(a, b\)"):
        fitted(adata, batch_key="lab").posterior(draws=5, batch="c")
    with pytest.raises(InputError, match="no batch key"):
        fitted(adata).posterior(draws=5, batch="a")


def test_a_checkpoint_wants_the_same_categories(adata, tmp_path) -> None:
    fitted(adata, batch_key="lab").save(tmp_path / "fit")
    adata.obs["lab"] = adata.obs["lab"].replace("b", "c")
    with pytest.raises(InputError, match="levels of the checkpoint"):
        pv.load(tmp_path / "fit", MODEL, GUIDE, adata, as_is=True, batch_key="lab")


def test_effects_are_zero_on_average() -> None:
    from pyro_velo.models.velocity import batch_effect

    effects = torch.randn(5, 3)
    found = batch_effect(effects, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found.sum(0), torch.zeros(5), atol=1e-6, rtol=0)
