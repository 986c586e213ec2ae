"""One matrix as a data set: size factors, what networks see, and that the loop takes it as it takes two molecules."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from pyro_velo.encoders import Encoder
from pyro_velo.forensics import NonFiniteError
from pyro_velo.likelihoods import Normal, Poisson
from pyro_velo.models.vae import VAE
from pyro_velo.profiles import UNKNOWN, Profiles
from pyro_velo.train import TrainSettings, train

COUNTS = torch.tensor([[1.0, 3.0], [2.0, 6.0], [4.0, 12.0], [0.0, 0.0]])


def test_size_factors_take_depth_out_of_what_an_encoder_sees(double: None) -> None:
    cells = Profiles.of_counts(COUNTS)
    assert_close(cells.size_factors.squeeze(1), torch.tensor([0.5, 1.0, 2.0, 0.5]))
    seen = cells.batch(torch.arange(3)).seen
    assert_close(seen, torch.log1p(torch.tensor([[2.0, 6.0]])).expand(3, 2))
    kept = Profiles.of_counts(COUNTS, depth=False)
    assert_close(kept.batch(torch.arange(4)).seen, torch.log1p(COUNTS.double()))


def test_covariates_are_told_to_both_networks_whatever_stands_before_the_cells() -> None:
    told = torch.eye(2)[[0, 1, 1, 0]]
    batch = Profiles.of_counts(COUNTS, covariates=told).batch(torch.tensor([1, 0]))
    z = torch.randn(3, 2, 5)
    assert torch.equal(batch.conditioned(z)[..., 5:], told[[1, 0]].expand(3, 2, 2))
    assert torch.equal(batch.seen[:, 2:], told[[1, 0]])


def test_a_label_leaves_its_cluster_alone_and_no_label_leaves_all() -> None:
    labels = torch.tensor([2, UNKNOWN, 0, UNKNOWN])
    batch = Profiles.of_counts(COUNTS, labels=labels).batch(torch.arange(4))
    assert batch.allowed(3).tolist() == [[False, False, True], [True] * 3, [True, False, False], [True] * 3]


def test_a_part_of_the_cells_is_a_data_set_with_all_that_is_known_of_them() -> None:
    cells = Profiles.of_counts(COUNTS, covariates=torch.arange(4.0)[:, None], labels=torch.arange(4))
    part, index = cells.among(torch.tensor([3, 1])), torch.tensor([3, 1])
    for name in ("x", "size_factors", "covariates", "labels"):
        assert torch.equal(getattr(part, name), getattr(cells, name)[index])


@pytest.mark.parametrize(
    "wrong", [{"x": torch.ones(2, 3, 4)}, {"x": torch.ones(3, 4), "labels": torch.zeros(2).long()}]
)
def test_shapes_that_disagree_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="Expected"):
        Profiles(**wrong)


def test_nan_stops_a_fit_and_is_named() -> None:
    x = torch.rand(30, 4)
    cells = Profiles(x)
    program_cells = Profiles(x.clone())
    model = VAE(Normal(), n_latent=2, hidden=())

    class Late(VAE):
        def build(self, cells):
            return model.build(program_cells)

    x[:, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the data \(site 'x'\), gene number 2"):
        train(Late(), Encoder(()), cells, settings=TrainSettings(max_steps=2), progress=False)


def test_the_same_seed_gives_the_same_fit() -> None:
    cells = Profiles.of_counts(torch.poisson(torch.full((40, 3), 2.0)))
    one, other = (
        train(VAE(Poisson(), 2, (4,)), Encoder((4,)), cells, settings=TrainSettings(max_steps=5), progress=False)
        for _ in range(2)
    )
    assert all(torch.equal(one.training.best[name], other.training.best[name]) for name in one.training.best)
