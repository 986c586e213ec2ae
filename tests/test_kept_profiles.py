"""An autoencoder on disk: loaded to the bit, rebuilt from the names of its parts, and gone on with after Ctrl-C."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from scipy.sparse import csr_matrix
from small import GUIDE, MODEL, differing, small_adata
from small import settings as small_settings
from test_autoencoding import command, simulated

import pyro_velo as pv
from pyro_velo import checkpoint, clustering, stages
from pyro_velo.assignments import ASSIGNMENTS, PerCell
from pyro_velo.cluster_sizes import SIZES, Given, Uniform
from pyro_velo.clustering import TRAINING
from pyro_velo.encoders import Encoder, PerCluster
from pyro_velo.errors import InputError
from pyro_velo.likelihoods import NB, PROFILE_LIKELIHOODS, ZINB, Poisson
from pyro_velo.models.base import Guide, Model
from pyro_velo.parts import from_words, is_known, to_words
from pyro_velo.starts import StartSettings

QUICK = {
    "settings": replace(TRAINING, max_steps=6, evaluate_steps=2),
    "start": StartSettings(vae_steps=6, restarts=2, inits=1),
    "progress": False,
}
SMALL = Encoder((8,), (4,))


class Mine(NB):
    """A likelihood of one's own."""


def models() -> dict[str, tuple[Model, Guide]]:
    """Each model with each kind of part that has parameters or numbers of its own."""
    return {
        "vae": (pv.VAE(ZINB(), 2, (8,), decoded=("gate",)), SMALL),
        "gmvae": (pv.GMVAE(2, Poisson(), Given((0.25, 0.75)), n_latent=2, hidden=(8,), correlated=True), SMALL),
        "enumerated": (pv.GMVAE(2, NB(), n_latent=2, hidden=(8,), enumerated=True), PerCluster((8,), (8,))),
        "cgmdvae": (pv.CGMDVAE(3, NB(), Uniform(), PerCell(0.5), n_latent=2, hidden=(8,), learned_style=True), SMALL),
    }


@pytest.fixture(scope="module")
def adata():
    """Two clusters under two conditions, a third of their labels known."""
    found = simulated(60, conditions=2)
    found.obs["some"] = found.obs["cluster"].where(np.arange(60) % 3 == 0)
    return found


def fitted(adata, name: str, **options) -> pv.ProfileFit:
    """One of the models above, of the counts, conditions and labels."""
    model, guide = models()[name]
    told = {"label_key": None if name == "vae" else "some", "condition_key": "condition"}
    data = pv.profile_data(adata, layer="counts", depth=False, **told)
    return pv.vae(model, guide, adata, data=data, **(QUICK | options))


def one_more(adata):
    """The same with one count more."""
    changed = adata.copy()
    counts = changed.layers["counts"].toarray()
    counts[3, 2] += 1
    changed.layers["counts"] = csr_matrix(counts)
    return changed


def same(one: pv.ProfileFit, other: pv.ProfileFit) -> None:
    """All that fits say of cells is the same to the bit."""
    assert differing(one.fitted.training, other.fitted.training) == []
    assert_array_equal(one.latent(), other.latent())
    assert_array_equal(one.denoised(draws=2), other.denoised(draws=2))
    scores = [fit.evidence(particles=5, draws=2) for fit in (one, other)]
    for name in ("elbo", "iw_bound", "density"):
        assert_array_equal(*(getattr(score, name) for score in scores))
    if one.has_clusters:
        assert_array_equal(one.cluster_probabilities(draws=3), other.cluster_probabilities(draws=3))
    assert str(one.about()) == str(other.about())


# One of the others, which a run that is stopped loads too, is left to the slow ones.
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "gmvae" else ()) for n in models()])
def test_what_is_loaded_is_what_was_saved_to_the_bit(adata, tmp_path: Path, name: str) -> None:
    fit = fitted(adata, name)
    fit.save(tmp_path / "kept")
    loaded = pv.load_vae(tmp_path / "kept", adata)
    same(loaded, fit)
    assert (loaded.model, loaded.guide, loaded.data.layer) == (fit.model, fit.guide, "counts")
    assert_array_equal(*(each.converted("condition", "condition_1", draws=3, mean=True).mean for each in (loaded, fit)))


@pytest.mark.parametrize("kind", ["parts", "models"])
def test_every_recipe_is_rebuilt_from_its_words(kind: str) -> None:
    parts = [make() for table in (PROFILE_LIKELIHOODS, ASSIGNMENTS, SIZES) for make in table.values()]
    made = parts if kind == "parts" else [each for pair in models().values() for each in pair]
    for part in made:
        assert from_words(json.loads(json.dumps(to_words(part)))) == part and is_known(part)
    assert not is_known(pv.VAE(Mine()))
    for words in ({"name": "Mine"}, {"name": "VAE", "depth": 3}):
        with pytest.raises(InputError, match="Expected a recipe of this version's"):
            from_words(words)


def test_parts_of_ones_own_are_to_be_passed(adata, tmp_path: Path) -> None:
    model = pv.VAE(Mine(), 2, (8,))
    fit = pv.vae(model, SMALL, adata, **QUICK)
    fit.save(tmp_path)
    with pytest.raises(InputError, match=r"Expected the model of .*; pass model="):
        pv.load_vae(tmp_path, adata)
    same(pv.load_vae(tmp_path, adata, model=model), fit)


def test_what_is_no_such_fit_is_refused(adata, tmp_path: Path) -> None:
    fit = fitted(adata, "gmvae")
    fit.save(tmp_path / "kept")
    with pytest.raises(InputError, match=r"Expected a checkpoint at .*; found none"):
        pv.load_vae(tmp_path, adata)
    other = one_more(adata)
    with pytest.raises(InputError, match="Expected the numbers that were fitted"):
        pv.load_vae(tmp_path / "kept", other)
    with pytest.raises(InputError, match="Expected the cells that were fitted"):
        pv.load_vae(tmp_path / "kept", adata[:50])
    with pytest.raises(InputError, match="Layer 'counts'"):
        pv.load_vae(tmp_path / "kept", small_adata())
    with pytest.raises(InputError, match="Expected the model and guide"):
        pv.load_vae(tmp_path / "kept", adata, model=replace(fit.model, n_latent=3))
    old = {"format": 0, "settings": {}}
    state = checkpoint.load(tmp_path / "kept")[0]
    checkpoint.save_file(state.best, tmp_path / "kept" / checkpoint.FILE, metadata={"pyro_velo": json.dumps(old)})
    with pytest.raises(InputError, match=r"Expected a checkpoint of format 1 .*got 0"):
        pv.load_vae(tmp_path / "kept", adata)


def test_fits_of_velocities_and_of_profiles_are_told_apart(adata, tmp_path: Path) -> None:
    cells = pv.velocity_data(small_adata(), as_is=True)
    velocities = pv.fit(MODEL, GUIDE, small_adata(), data=cells, settings=small_settings(max_epochs=1), progress=False)
    velocities.save(tmp_path / "velocities")
    with pytest.raises(InputError, match=r"Expected an autoencoder in .*Load velocities by pv\.load"):
        pv.load_vae(tmp_path / "velocities", adata)
    fitted(adata, "vae").save(tmp_path / "profiles")
    with pytest.raises(InputError, match="Expected the model of the checkpoint"):
        pv.load(tmp_path / "profiles", MODEL, GUIDE, small_adata(), as_is=True)


def test_a_fit_is_not_replaced_without_leave_and_one_that_fails_to_be_is_there_still(
    adata, tmp_path: Path, monkeypatch
) -> None:
    fit = fitted(adata, "vae")
    fit.save(tmp_path)
    with pytest.raises(InputError, match=r"holds a fit already; .*pass overwrite"):
        fit.save(tmp_path)
    with monkeypatch.context() as patched:

        def full(tensors, path, metadata):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            fitted(adata, "vae", seed=1).save(tmp_path, overwrite=True)
    same(pv.load_vae(tmp_path, adata), fit)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Expected a folder to keep the fit in; got the file"):
        fit.save(tmp_path / "file")


# Ctrl-C


class Stop:
    """Ctrl-C after so many looks at the held-out cells, all trainings counted."""

    def __init__(self, after: int) -> None:
        self.left, self.save = after, checkpoint.save

    def __call__(self, *arguments, **options) -> None:
        self.save(*arguments, **options)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def chosen(adata, **options) -> pv.ProfileFit:
    """The number of clusters chosen among two, each from two starts."""
    return pv.vae(pv.GMVAE(1, n_latent=2, hidden=(8,)), SMALL, adata, candidates=(1, 2), **(QUICK | options))


@pytest.mark.parametrize(
    ("name", "looks"), [("vae", (1,)), ("chosen", (5,)), pytest.param("chosen", (2, 9), marks=pytest.mark.slow)]
)
def test_a_run_that_is_stopped_goes_on_to_the_bit(adata, tmp_path: Path, monkeypatch, name: str, looks) -> None:
    make = chosen if name == "chosen" else partial(fitted, name=name)
    whole = make(adata, save=tmp_path / "whole")
    for after in looks:
        folder = tmp_path / str(after)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save", Stop(after))
            stopped = make(adata, save=folder)
        assert stopped.interrupted
        loaded = pv.load_vae(folder, adata)
        assert loaded.interrupted and differing(loaded.fitted.training, stopped.fitted.training) == []
        again = make(adata, save=folder, resume=folder)
        assert differing(again.fitted.training, whole.fitted.training) == [] and not again.interrupted
        assert str(again.about()) == str(whole.about()) and not (folder / stages.FOLDER).exists()
    loaded = pv.load_vae(tmp_path / "whole", adata)
    same(loaded, again)
    if name == "chosen":
        assert loaded.number.table() == whole.number.table() and loaded.number.fitted is loaded.fitted


def test_ctrl_c_before_the_first_look_leaves_a_fit_too(adata, tmp_path: Path, monkeypatch) -> None:
    def stopped(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pyro_velo.train._Loop._epoch", stopped)
        fit = fitted(adata, "vae", save=tmp_path)
    assert fit.interrupted and fit.epochs == 0
    same(pv.load_vae(tmp_path, adata), fit)


def test_only_the_same_run_goes_on(adata, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"Expected the stages of a fit below .*; found none\. Start anew"):
        fitted(adata, "vae", resume=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", Stop(2))
        fitted(adata, "vae", save=tmp_path)
    for options, match in (
        ({"seed": 1}, "Expected seed as in the run that .* 0; got 1"),
        ({"settings": replace(QUICK["settings"], warmup=0.5)}, "Expected warmup"),
        ({"start": StartSettings(vae_steps=9)}, "Expected start"),
    ):
        with pytest.raises(InputError, match=match):
            fitted(adata, "vae", resume=tmp_path, **options)
    with pytest.raises(InputError, match="Expected checksum"):
        fitted(one_more(adata), "vae", resume=tmp_path)
    # Where another run writes, the stages of this one are gone, and what is not ours is not.
    (tmp_path / stages.FOLDER / "notes.txt").touch()
    fitted(adata, "vae", save=tmp_path, seed=1)
    assert [path.name for path in (tmp_path / stages.FOLDER).iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="It holds a fit that is done: load it"):
        fitted(adata, "vae", resume=tmp_path)


def test_the_command_keeps_and_goes_on(adata, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(clustering, "TRAINING", QUICK["settings"])
    source, output, kept = (tmp_path / name for name in ("in.h5ad", "out.h5ad", "kept"))
    adata.write_h5ad(source)
    arguments = ["vae", source, "-o", output, "--model", "vae", "--latent", 2, "--max-epochs", 3, "--save", kept]
    code, _, err = command(*arguments)
    assert code == 0, err
    loaded = pv.load_vae(kept, adata)
    written = pv.read(output)
    assert_array_equal(written.obsm["X_vae"], loaded.latent().astype(np.float32))
    code, out, err = command("vae", source, "-o", tmp_path / "new.h5ad", "--model", "vae", "--save", kept)
    assert (code, out) == (2, "") and "holds a fit already" in err and not (tmp_path / "new.h5ad").exists()
    code, _, err = command(*arguments, "--overwrite", "--resume", kept)
    assert code == 2 and "It holds a fit that is done" in err
    assert torch.equal(torch.tensor(loaded.latent()), torch.tensor(pv.load_vae(kept, adata).latent()))
