"""A diagnosis, from a fit to its findings, its JSON, its page and the command line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import kneighbors_graph
from small import GUIDE, MODEL, settings, small_adata

import pyro_velo as pv
from pyro_velo import checkpoint
from pyro_velo.api import PARTS_FILE
from pyro_velo.batch import Cells
from pyro_velo.cli import main
from pyro_velo.diagnosing import diagnose_file, diagnosed
from pyro_velo.doctor import balance, collapse, sample
from pyro_velo.doctor import genes as genes_module
from pyro_velo.doctor.draws import chosen_cells
from pyro_velo.doctor.genes import genes
from pyro_velo.errors import InputError
from pyro_velo.fitting import Fit
from pyro_velo.forensics import NonFiniteError
from pyro_velo.plots import bound_by_particles, k_hat_histogram, kl_by_dimension, loss_by_gene
from pyro_velo.train import parameters, split


def fitted(save: Path | None = None, change: Any = None, model: Any = MODEL, **changes: Any) -> Fit:
    adata = small_adata(80, 6)
    data = pv.velocity_data(adata, as_is=True)
    data = change(data) if change else data
    steps = settings(**{"max_epochs": 12, "batch_size": 36, **changes})
    return pv.fit(model, GUIDE, adata, settings=steps, data=data, save=save, progress=False)


@pytest.fixture(scope="module")
def fit() -> Fit:
    return fitted()


@pytest.fixture(scope="module")
def found(fit: Fit) -> pv.Diagnosis:
    return pv.diagnose(fit)


def test_a_fit_that_was_cut_short_is_said_to_be(found: pv.Diagnosis) -> None:
    assert found.codes == ("not-converged",)
    (finding,) = found.findings
    for words in (finding.code, finding.words, finding.remedy, finding.source):
        assert words in str(found)
    assert all(each.follows_from == ("not-converged",) for each in found.consequences)


def test_the_figures_are_those_of_the_parts(fit: Fit, found: pv.Diagnosis) -> None:
    told, parts = found.measured, found.parts
    assert parts is not None and parts.collapse is not None and parts.tightness is not None
    assert told.numbers == 12 and told.genes == 6 and told.dimensions == 2
    assert told.active == (parts.collapse.activity > 0.01).sum()
    assert told.iw_gap == pytest.approx((parts.tightness.bound[-1] - parts.tightness.bound[0]).mean())
    assert told.without_mean == (parts.tightness.k_hat > 1).mean()
    assert told.loss_gene == parts.gene_names[parts.genes.loss_share.argmax()]
    assert parts.genes.loss_share.sum() == pytest.approx(1)
    assert told.prior_distance == max(site.median for site in parts.genes.sites)
    assert parts.history == fit.history


def test_a_diagnosis_changes_nothing_and_is_the_same_again(fit: Fit, found: pv.Diagnosis) -> None:
    with fit.fitted.parameters():
        before = parameters()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    again = pv.diagnose(fit)
    assert torch.equal(state, torch.get_rng_state())
    with fit.fitted.parameters():
        assert all(torch.equal(before[name], value) for name, value in parameters().items())
    assert again.to_json() == found.to_json()


def test_the_json_holds_null_for_what_is_not_known(found: pv.Diagnosis) -> None:
    told = json.loads(found.to_json())
    assert [each["code"] for each in told["findings"]] == list(found.codes)
    for name, value in asdict(found.measured).items():
        unknown = value is None or (isinstance(value, float) and math.isnan(value))
        assert told["measured"][name] == (None if unknown else value)
    assert set(told["findings"][0]) >= {"code", "severity", "figure", "threshold", "source", "words", "remedy"}


def test_the_page_loads_nothing_and_says_everything(found: pv.Diagnosis) -> None:
    page = found.to_html()
    assert 'src="http' not in page and "<script" not in page and page.count('src="data:image/png') == 6
    for words in (
        "not-converged",
        "Training",
        "latent space",
        "importance weights",
        "loss by gene",
        "Rates and priors",
    ):
        assert words.lower() in page.lower()
    healthy = pv.Diagnosis((), (), found.measured, None).to_html()
    assert "No finding" in healthy and "finding error" not in healthy


def test_without_held_out_cells_nothing_is_said_of_the_bound() -> None:
    found = pv.diagnose(fitted(held_out=0.0, max_epochs=2))
    assert found.parts is not None and found.parts.tightness is None and math.isnan(found.measured.iw_gap)
    assert "How tight" not in found.to_html()


def test_flat_priors_are_far_from_nothing() -> None:
    model = pv.VelocityModel(n_latent=2, hidden=(8,), priors=pv.Priors.flat())
    fit = fitted(model=model, max_epochs=1)
    assert [site.name for site in genes(fit.fitted, fit.data.cells).sites] == ["switch_time"]


def test_the_distance_from_a_normal_prior_is_in_its_sds() -> None:
    prior = pv.Priors(gamma=dist.LogNormal(2.0, 0.5))
    fit = fitted(model=pv.VelocityModel(n_latent=2, hidden=(8,), priors=prior), max_epochs=1)
    (site,) = (x for x in genes(fit.fitted, fit.data.cells).sites if x.name == "gamma")
    # After one epoch the guide is where it started: at the start values, with an sd of 0.01.
    start = fit.fitted.program.start.sites()["gamma"].log().numpy()
    distance = (start - 2) / 0.5
    assert_allclose(site.distance, distance, rtol=0.15)
    narrow = 0.01 / 0.5
    assert_allclose(site.kl, (narrow**2 + distance**2 - 1) / 2 - np.log(narrow), rtol=0.3)


# Faults that show at once


def test_a_gene_in_another_unit_is_named() -> None:
    def scaled(data: Any) -> Any:
        molecules = data.cells.molecules.clone()
        molecules[..., 2] *= 1e4
        return replace(data, cells=replace(data.cells, molecules=molecules))

    found = pv.diagnose(fitted(change=scaled))
    assert found.codes == ("dominating-genes",)
    assert found.measured.loss_gene == "gene_2" and found.measured.loss_share > 0.99
    assert found.measured.input_gene == "gene_2" and found.measured.input_share > 0.999


def test_a_fit_that_met_nan_is_told_by_its_error_and_by_what_it_left(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        fitted(save=tmp_path, learning_rate=1e12, max_epochs=4, evaluate_steps=100)
    found = pv.diagnose(caught.value)
    assert found.codes == ("nan",) and found.findings[0].figure == caught.value.step
    assert "no checkpoint was kept" in str(found)
    left = diagnose_file(tmp_path)
    assert left.findings == found.findings
    assert "nan" in left.to_html() and json.loads(left.to_json())["findings"][0]["code"] == "nan"


def test_the_last_good_checkpoint_is_named_and_the_next_one_takes_the_failure_away(tmp_path: Path) -> None:
    fit = fitted(save=tmp_path, max_epochs=2)
    assert checkpoint.failure(tmp_path) is None
    with pytest.raises(NonFiniteError) as caught:
        fitted(learning_rate=1e12, max_epochs=4, evaluate_steps=100)
    checkpoint.note_failure(caught.value, tmp_path)
    kept = checkpoint.failure(tmp_path)
    assert kept is not None and kept["checkpoint_epoch"] == 2 and kept["step"] == caught.value.step
    fit.save(tmp_path)
    assert checkpoint.failure(tmp_path) is None
    (tmp_path / checkpoint.FAILURE).write_text("[]")
    with pytest.raises(InputError, match="Expected what, step, gene and checkpoint_epoch"):
        checkpoint.failure(tmp_path)


# What is kept for it


def noted(fit: Fit, folder: Path) -> pv.Diagnosis:
    """By the folder alone."""
    training, about = checkpoint.load(folder)
    kept = sample.load(folder, about)
    fitted = sample.restored(fit.fitted.program.recipe, GUIDE, training, kept)
    return diagnosed(fitted, kept.cells, kept.gene_names, noise=kept.noise_ratio)


def test_the_cells_that_are_kept_tell_all_that_the_whole_fit_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit, by fewer than half of the cells: of counts in two batches, with a clock that genes share."""
    for module, name, size in ((collapse, "MIXTURE_CELLS", 12), (genes_module, "CELLS", 12), (balance, "CELLS", 10)):
        monkeypatch.setattr(module, name, size)
    adata = small_adata(80, 6)
    for name in ("spliced", "unspliced"):
        adata.layers[name] = np.round(20 * adata.layers[name])
    adata.obs["lab"] = np.where(np.arange(80) % 3 == 0, "a", "b")
    adata.obsp["distances"] = kneighbors_graph(adata.layers["spliced"], 8, mode="distance")
    data = pv.velocity_data(adata, as_is=True, counts=True, batch_key="lab")
    model = pv.VelocityModel(pv.likelihoods.NB(), times=pv.times.Shared(), n_latent=2, hidden=(8,))
    plan = settings(max_epochs=2, batch_size=36)
    fit = pv.fit(model, GUIDE, adata, settings=plan, data=data, save=tmp_path, progress=False)
    told = noted(fit, tmp_path)
    assert told.to_json() == pv.diagnose(fit).to_json()
    _, about = checkpoint.load(tmp_path)
    assert len(sample.load(tmp_path, about).cells.numbers) < 40


def test_few_cells_are_kept_of_many_and_no_others_can_be_asked_for(rng: np.random.Generator) -> None:
    numbers = sample.looked_at(200_000, 0.1, 3)
    assert len(numbers) <= 820 and (numbers.diff() > 0).all()
    train_index, held_index = split(200_000, 0.1, 3)
    for needed in (train_index[:256], held_index[:50], chosen_cells(200_000, 512, 0)):
        assert torch.isin(needed, numbers).all()
    molecules = torch.from_numpy(rng.random((2, 80, 6)))
    some = sample.SomeCells(Cells(molecules[:, 3:9:2]), torch.tensor([3, 5, 7]), 80)
    batch, whole = (cells.batch(torch.tensor([7, 3])) for cells in (some, Cells(molecules)))
    assert all(torch.equal(getattr(batch, name), getattr(whole, name)) for name in ("molecules", "index"))
    assert len(some) == batch.n_cells == 80
    for other in (4, 79):
        with pytest.raises(InputError, match=f"Expected cells that were kept; number {other} of 80 was not"):
            some.batch(torch.tensor([3, other]))


def test_cells_of_another_fit_or_none_are_refused(tmp_path: Path) -> None:
    fit = fitted(save=tmp_path, max_epochs=1)
    _, about = checkpoint.load(tmp_path)
    path = tmp_path / sample.FILE
    with pytest.raises(InputError, match="got those of another fit"):
        sample.load(tmp_path, about | {"genes": ["a"]})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"can't be read .* Name the AnnData"):
        sample.load(tmp_path, about)
    fit.save(tmp_path)
    assert noted(fit, tmp_path).codes == ("not-converged",)
    # A fit that is killed must not leave an earlier one's cells behind.
    with pytest.raises(NonFiniteError):
        fitted(save=tmp_path, learning_rate=1e12, max_epochs=4, evaluate_steps=100)
    assert not path.exists()
    with pytest.raises(InputError, match="found none: the fit was stopped before its end"):
        sample.load(tmp_path, about)
    # Of a fit whose cells have a q(z) of their own, few cells would not do.
    fit.save(tmp_path)
    fit.refined(steps=1).save(tmp_path)
    assert not path.exists()


# Pictures


def test_what_is_drawn_is_what_was_found(found: pv.Diagnosis) -> None:
    parts = found.parts
    assert parts is not None and parts.collapse is not None and parts.tightness is not None
    ax = kl_by_dimension(parts.collapse.kl, parts.collapse.active, ax=Figure().subplots())
    assert_allclose([bar.get_height() for bar in ax.patches], np.sort(parts.collapse.kl)[::-1])
    ax = bound_by_particles(parts.tightness.particles, parts.tightness.bound, ax=Figure().subplots())
    line = ax.containers[0].lines[0]
    assert_array_equal(line.get_xdata(), parts.tightness.particles)
    assert_allclose(line.get_ydata(), (parts.tightness.bound - parts.tightness.bound[0]).mean(1))
    ax = k_hat_histogram(np.array([-np.inf, 0.2, 0.75, 1.5, 9.0]), ax=Figure().subplots())
    assert sum(bar.get_height() for bar in ax.patches) == 5
    ax = loss_by_gene({"a": 0.6, "b": 0.4}, fair=0.5, ax=Figure().subplots())
    assert [bar.get_width() for bar in ax.patches] == [0.6, 0.4]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b"]


def test_pictures_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="one latent dimension or more"):
        kl_by_dimension([], [])
    with pytest.raises(InputError, match="the bounds of 2 cells or more; got 1"):
        bound_by_particles((1, 5), np.zeros((2, 1)))
    with pytest.raises(InputError, match="k-hat of one cell or more"):
        k_hat_histogram([])
    with pytest.raises(InputError, match="one gene or more"):
        loss_by_gene({}, fair=1.0)


# The command line


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a fit with the command line's parts, and the AnnData that it wrote."""
    place = tmp_path_factory.mktemp("kept")
    adata = small_adata()
    data = pv.velocity_data(adata, as_is=True)
    fit = pv.fit(None, None, adata, settings=settings(max_epochs=2), data=data, save=place / "fit", progress=False)
    fit.write(adata, draws=2)
    adata.write_h5ad(place / "out.h5ad")
    return place / "fit", place / "out.h5ad"


def test_diagnose_prints_and_writes_the_same(
    kept: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, page = tmp_path / "told.json", tmp_path / "page.html"
    arguments = ["diagnose", *map(str, kept), "--json", str(told), "--html", str(page)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    findings = json.loads(told.read_text())["findings"]
    assert [each["code"] for each in findings] == ["not-converged"] and findings[0]["words"] in printed
    assert "not-converged" in page.read_text()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "told.json" in line
    # The folder alone says the same.
    again = tmp_path / "again.json"
    assert main(["diagnose", str(kept[0]), "--json", str(again)]) == 0
    assert capsys.readouterr().out == printed and again.read_text() == told.read_text()


def test_what_a_fit_is_made_of_need_not_be_named_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = tmp_path / "in.h5ad", tmp_path / "kept"
    small_adata().write_h5ad(source)
    fit = ["fit", str(source), "-o", str(tmp_path / "out.h5ad"), "--as-is", "--max-epochs", "4", "--draws", "2"]
    parts = ["--states", "hard", "--prior", "gamma=LogNormal(0, 2)", "--save", str(folder)]
    assert main([*fit, *parts, "--beta", "4", "--kl-cycles", "2", "--free-bits", "0.1"]) == 0
    plan = checkpoint.load(folder)[0].settings
    assert (plan.beta, plan.cycles, plan.free_bits) == (4.0, 2, 0.1)
    capsys.readouterr()
    assert main(["diagnose", str(folder)]) == 0
    assert "not-converged" in capsys.readouterr().out
    (folder / PARTS_FILE).write_text('{"likelihood": "no"}')
    assert main(["diagnose", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Expected likelihood, states" in line and PARTS_FILE in line


def test_bad_input_gets_one_line_and_code_2(
    kept: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = map(str, kept)
    for arguments, complaint in (
        ([str(tmp_path)], f"Expected a checkpoint at {tmp_path / checkpoint.FILE}; found none"),
        ([folder, "--times", "shared"], "Expected the model of the checkpoint"),
        ([str(tmp_path), data], f"Expected a checkpoint at {tmp_path / checkpoint.FILE}; found none"),
        (["nowhere", data], "'nowhere' does not exist"),
        ([folder, "missing.h5ad"], "'missing.h5ad' does not exist"),
        ([folder, data, "--times", "shared"], "Expected the model of the checkpoint"),
        ([folder, data, "--html", "page.txt"], "page.txt"),
        ([folder, data, "--json", str(tmp_path / "a"), "--html", str(tmp_path / "a")], "Expected two files"),
    ):
        assert main(["diagnose", *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert complaint in line
    assert list(tmp_path.iterdir()) == []
