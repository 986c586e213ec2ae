"""Comparing models: the choice and its reason, what a failed fit leaves, and the command from file to file."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from anndata import AnnData
from numpy.testing import assert_allclose
from small import GUIDE, MODEL, settings, small_adata

import pyro_velo as pv
from pyro_velo import comparing, evidence, simulate
from pyro_velo.cli import main
from pyro_velo.comparing import compare, grid_of, unconverged
from pyro_velo.comparison import APART, Comparison, columns
from pyro_velo.data.simulated import to_anndata
from pyro_velo.errors import FitError, InputError
from pyro_velo.evidence import Evidence
from pyro_velo.fitting import fit
from pyro_velo.library import LIBRARIES
from pyro_velo.likelihoods import LIKELIHOODS
from pyro_velo.options import GRID, CompareOptions, FitOptions
from pyro_velo.parsing import parse_grid
from pyro_velo.plots.comparison import comparison as draw
from pyro_velo.rates import RATE_GUIDES
from pyro_velo.states import STATE_FAMILIES
from pyro_velo.times import TIMES
from pyro_velo.train import History, Training, TrainSettings
from pyro_velo.transcription import TRANSCRIPTIONS
from pyro_velo.verdict import Row, judge

CELLS = np.random.default_rng(0).normal(-100, 30, 50)
"""Nats of 50 cells, of which some are much harder than others."""


def row(name: str, gain: float, sites: int = 4) -> Row:
    """A variant whose bound is `gain` above CELLS, and differs from it by 1 nat, so by 0.14 in the mean."""
    noise = np.random.default_rng(sum(map(ord, name))).normal(size=len(CELLS))
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    bound = CELLS + gain + noise
    names = tuple(f"site{i}" for i in range(sites))
    return Row(name, Evidence(bound - 1, bound, bound + 1, 50, names, (), ()), 12.5, 8)


def counts(n_cells: int = 60, n_genes: int = 6, noise: str = "nb") -> AnnData:
    return to_anndata(simulate.simulate(n_cells, n_genes, settings=simulate.Settings(noise=simulate.NOISES[noise]())))


def small(likelihood: str, **parts) -> pv.VelocityModel:
    return pv.VelocityModel(likelihood=LIKELIHOODS[likelihood](), n_latent=2, hidden=(8,), **parts)


# The choice


def test_the_best_is_chosen_where_it_is_clear() -> None:
    group = judge("raw counts", [row("poisson", -9, sites=4), row("nb", 0, sites=6), row("zinb", -3, sites=8)])
    assert group.choice == "nb" and group.criterion == "iw_bound"
    assert group.differences["nb"] == (0, 0)
    assert re.fullmatch(
        r"Choice: nb, whose bound is the best: 3\.00 ± 0\.\d\d nats per cell above the next, that of zinb\.",
        group.reason,
    )


def test_differences_are_paired_by_cell() -> None:
    group = judge("raw counts", [row("a", 0), row("b", -1)])
    mean, error = group.differences["b"]
    a, b = (r.evidence.iw_bound for r in group.rows)
    assert_allclose([mean, error], [(b - a).mean(), (b - a).std(ddof=1) / 50**0.5])
    # The cells themselves spread by 30 nats, their mean by 4.
    assert error < 0.3


def test_a_simpler_one_is_chosen_within_two_standard_errors() -> None:
    rows = [row("zinb", 0, sites=8), row("nb", -0.1, sites=6), row("poisson", -9, sites=4)]
    group = judge("raw counts", rows)
    assert group.choice == "nb"
    assert "0.10 ± 0.2" in group.reason
    assert group.reason.endswith("simpler, with 6 gene-level sites against 8.")
    mean, error = group.differences["nb"]
    assert 0 < -mean < 2 * error


def test_of_equally_simple_ones_the_first_listed_is_chosen() -> None:
    close, best = row("collapsed", -0.1), row("dirichlet", 0)
    assert judge("raw counts", [close, best]).reason.endswith("within 2 standard errors, and listed before it.")
    assert judge("raw counts", [close, best]).choice == "collapsed"
    group = judge("raw counts", [best, close])
    assert group.choice == "dirichlet"
    assert group.reason.endswith("that of collapsed, which is within 2 standard errors but not simpler.")


def test_without_a_bound_the_density_decides() -> None:
    # The bound of the point is the best, but it is none.
    point = Row("point", Evidence(CELLS + 9, CELLS + 9, CELLS, 50, ("alpha",), ("alpha",), ()))
    group = judge("scaled layers", [point, row("mean-field", 2)])
    assert group.criterion == "density" and group.choice == "mean-field"
    assert "whose predictive density is the best" in group.reason
    assert "density to the best" in columns(group)


def test_one_that_failed_is_not_chosen() -> None:
    failed = Row("nb", warnings=("failed: NaN",))
    assert judge("raw counts", [failed, row("poisson", 0)]).reason == "Choice: poisson, the only one that was fitted."
    group = judge("raw counts", [failed])
    assert group.choice is None and group.differences == {} and group.reason == "No choice: every fit failed."


# What it looks like


@pytest.fixture
def found() -> Comparison:
    """Two groups, one with a failed fit, and a name that no markup may trust."""
    raw = [row("poisson", -9), row("<b>nb|$x$", 0), Row("zinb", warnings=("failed: NaN in gene Sox9",))]
    groups = (judge("scaled layers", [row("normal", 0)]), judge("raw counts", raw))
    return Comparison(groups, TrainSettings(seed=3), 450, 50)


def test_the_table_has_a_line_a_variant_and_says_what_is_not_compared(found: Comparison) -> None:
    text = str(found)
    assert text == found.table() and text.endswith(APART)
    for name, reason in found.reason.items():
        assert f"{name.capitalize()}, 50 held-out cells" in text and reason in text
    head, *lines = [line for line in text.splitlines() if re.match(r"variant|poisson|<b>|zinb", line)][1:]
    assert head.split("  ")[0] == "variant" and len(lines) == 3
    assert [line.split()[0] for line in lines] == ["poisson", "<b>nb|$x$", "zinb"]
    assert lines[0].index("±") == lines[1].index("±")
    assert lines[2].split() == ["zinb", *"------", "failed:", "NaN", "in", "gene", "Sox9"]


def test_markdown_keeps_its_columns(found: Comparison) -> None:
    lines = [line for line in found.table(markdown=True).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {9}
    assert r"<b>nb\|$x$" in lines[-2]


def test_json_holds_every_figure(found: Comparison) -> None:
    told = json.loads(found.to_json())
    assert told["cells"] == {"train": 450, "held_out": 50} and told["settings"]["seed"] == 3
    scaled, raw = told["groups"]
    assert (scaled["scored"], raw["scored"]) == ("scaled layers", "raw counts")
    assert raw["choice"] == found.choice["raw counts"] and raw["reason"] == found.reason["raw counts"]
    poisson, best, failed = raw["variants"]
    bound = found.groups[1].rows[0].evidence.iw_bound
    assert poisson["iw_bound"] == {"mean": bound.mean(), "se": bound.std(ddof=1) / 50**0.5}
    assert poisson["to_the_best"] == dict(zip(("mean", "se"), found.groups[1].differences["poisson"], strict=True))
    assert best["to_the_best"] == {"mean": 0, "se": 0} and best["gene_sites"] == [f"site{i}" for i in range(4)]
    empty = ("elbo", "iw_bound", "density", "to_the_best", "ms_per_step", "gene_sites")
    assert all(failed[name] is None for name in empty) and failed["warnings"] == ["failed: NaN in gene Sox9"]


def test_the_page_stands_alone_and_shows_hostile_names(found: Comparison) -> None:
    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags, self.words = [], ""

        def handle_starttag(self, tag, attrs) -> None:
            self.tags.append((tag, dict(attrs)))

        def handle_data(self, data) -> None:
            self.words += data

    page, html = Page(), found.to_html()
    page.feed(html)
    tags = {tag for tag, _ in page.tags}
    assert "default-src 'none'" in html and not tags & {"script", "link", "iframe", "b", "a"}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    # A single variant has no picture.
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    words = " ".join(page.words.split())
    for text in ("<b>nb|$x$", APART, *found.reason.values(), "failed: NaN in gene Sox9", "450 cells", "seed 3"):
        assert text in words


def test_the_picture_has_bars_of_two_standard_errors(found: Comparison) -> None:
    ax = found.plot("raw counts")
    mean, error = found.groups[1].differences["poisson"]
    (segment,) = ax.collections[0].get_segments()
    assert_allclose(segment[:, 0], [mean - 2 * error, mean + 2 * error])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["poisson", "<b>nb|$x$", "zinb"]
    notes = [text.get_text() for text in ax.texts]
    assert notes[1:] == ["best", "no fit"] and notes[0].startswith("-9.0")
    _, other = plt.subplots()
    assert found.plot("scaled layers", ax=other) is other


def test_what_can_not_be_drawn_is_refused(found: Comparison) -> None:
    with pytest.raises(InputError, match="one of scaled layers, raw counts; got None"):
        found.plot()
    with pytest.raises(InputError, match="one difference or more"):
        draw({"a": None})


# Fitting


def test_every_variant_is_scored_on_the_same_cells_as_a_fit_of_its_own() -> None:
    adata = counts()
    variants = {"normal": small("normal"), "nb": (small("nb"), GUIDE), "poisson": small("poisson")}
    options = settings(held_out=0.2)
    found = compare(variants, adata, as_is=True, settings=options, seed=2, progress=False)
    assert [row.name for row in found.rows] == ["normal", "nb", "poisson"]
    assert list(found.choice) == ["scaled layers", "raw counts"]
    assert (found.n_train, found.n_held_out) == (48, 12) and found.settings.seed == 2
    own = fit(*variants["nb"], adata, seed=2, settings=options, progress=False, data=_data(adata))
    scores = evidence.evidence(own.fitted, own.data.cells, seed=2)
    assert_allclose(found.rows[1].evidence.iw_bound, scores.iw_bound)
    assert all(row.epochs == 8 and row.ms_per_step > 0 for row in found.rows)


def _data(adata: AnnData):
    return pv.velocity_data(adata, as_is=True, counts=True)


def test_a_failed_fit_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model, *others, **options):
        if model is not MODEL:
            raise FitError("NaN at step 3,\ngene Sox9.")
        return fit(model, *others, **options)

    monkeypatch.setattr(comparing, "fit", failing)
    found = compare({"bad": small("tobit"), "good": (MODEL, GUIDE)}, small_adata(), as_is=True, settings=settings())
    bad, good = found.rows
    assert bad.evidence is None and bad.warnings == ("failed: NaN at step 3, gene Sox9.",) and good.evidence is not None
    assert found.choice == {"scaled layers, zeros censored": "good"}
    assert json.loads(found.to_json())["groups"][0]["variants"][0]["elbo"] is None


def test_ctrl_c_ends_the_fit_and_leaves_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments, **options):
        made = fit(*arguments, **options)
        return replace(made, fitted=replace(made.fitted, interrupted=True))

    monkeypatch.setattr(comparing, "fit", interrupted)
    found = compare({"one": (MODEL, GUIDE), "two": MODEL}, small_adata(), as_is=True, settings=settings())
    one, two = found.rows
    assert "interrupted at epoch 8" in one.warnings and one.evidence is not None
    assert two.warnings == ("not fitted: one was interrupted",) and two.evidence is None


def test_what_is_no_bound_is_said() -> None:
    variants = {
        "point": (small("normal"), pv.guides.Amortized(RATE_GUIDES["point"](), (8,), (8,))),
        "hierarchical": (small("normal", times=TIMES["hierarchical"]()), GUIDE),
    }
    found = compare(variants, small_adata(), as_is=True, settings=settings(max_epochs=2), progress=False)
    point, hierarchical = (" ".join(row.warnings) for row in found.rows)
    assert "no bound, because alpha, beta, gamma and 3 more are held at a point" in point
    assert "no bound" not in hierarchical and "not scored" not in hierarchical
    assert found.groups[0].criterion == "density"


def looks(*held_out: float, finished: bool = False) -> Training:
    training = Training(TrainSettings())
    epochs = list(range(1, len(held_out) + 1))
    training.history = History(epochs, list(held_out), list(held_out), [1.0] * len(epochs), objective=list(held_out))
    training.plateau.finished = finished
    return training


def test_a_fit_that_still_climbs_is_said_to() -> None:
    nan = float("nan")
    assert unconverged(looks(1, 3, 2.5, 2.75, nan, 2.5)) == ""
    told = "not converged: best at epoch 6 of 6, 0.5 nats gained in the last tenth"
    assert unconverged(looks(1, 3, 2, 3.25, nan, 3.75)) == told
    assert unconverged(looks(1, 3, 2, 3.25, nan, 3.75, finished=True)) == ""
    assert unconverged(looks(1)) == "not converged: best at epoch 1 of 1"
    assert unconverged(looks()) == ""


@pytest.mark.parametrize(
    ("variants", "options", "match"),
    [
        ({}, {}, "one variant or more to compare; got none"),
        ({"nb": "nb"}, {}, "Expected variant 'nb' to be a model, or .model, guide.; got 'nb'"),
        ({"a": MODEL}, {"settings": settings(held_out=0.01)}, "Expected 2 held-out cells or more to score; got 0"),
        ({"a": MODEL, "nb": small("nb")}, {}, "whole"),
        ({"a": MODEL}, {"batch_key": "day"}, "day"),
    ],
)
def test_bad_input_is_refused_before_anything_is_fitted(monkeypatch, variants, options, match) -> None:
    monkeypatch.setattr(comparing, "fit", None)
    with pytest.raises(InputError, match=match):
        compare(variants, small_adata(), as_is=True, **options)


# The grid


def test_the_grid_is_what_the_parts_are_called() -> None:
    tables = (LIKELIHOODS, STATE_FAMILIES, RATE_GUIDES, TIMES, TRANSCRIPTIONS, LIBRARIES)
    assert {name: set(values) for name, values in GRID.items()} == dict(zip(GRID, map(set, tables), strict=True))


def test_the_grid_is_the_product() -> None:
    grid = parse_grid(["likelihood=poisson, nb", "states=collapsed,hard"])
    named = grid_of(grid)
    assert list(named) == [
        "likelihood=poisson, states=collapsed",
        "likelihood=poisson, states=hard",
        "likelihood=nb, states=collapsed",
        "likelihood=nb, states=hard",
    ]
    assert named["likelihood=nb, states=hard"] == FitOptions(likelihood="nb", states="hard")


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["noise=nb"], "Expected a grid of likelihood, states, rates, times, transcription, library; got 'noise=nb'"),
        (["nb"], "got 'nb'"),
        (
            ["likelihood=nb,gauss"],
            "tobit, studentt, poisson, nb, zip, zinb; got 'gauss' in 'likelihood=nb,gauss'",
        ),
        (["likelihood="], "got ''"),
        (["times=shared", "times=per-gene"], "Expected times once"),
        (["times=shared,shared"], "with each value once"),
    ],
)
def test_a_bad_grid_is_refused(texts: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        parse_grid(texts)


# The command


def run(*arguments: str | Path) -> tuple[int, str, str]:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["compare", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "counts.h5ad"
    adata = counts(80, 20)
    adata.obs["day"] = ["one", "two"] * 40
    adata.write_h5ad(path)
    return path


def test_the_command_from_file_to_table(source: Path, tmp_path: Path) -> None:
    told, page = tmp_path / "told.json", tmp_path / "page.html"
    options = "--max-epochs 2 --batch-size 64 --seed 1 --threads 1 --batch-key day".split()
    grid = ("--grid", "likelihood=normal,poisson", "--grid", "transcription=constant")
    code, out, err = run(source, *grid, "--json", told, "--html", page, *options)
    assert code == 0, err
    assert APART in out and "likelihood=poisson, transcription=constant" in out
    written = json.loads(told.read_text())
    assert [group["scored"] for group in written["groups"]] == ["scaled layers", "raw counts"]
    chosen = {"max_epochs": 2, "batch_size": 64, "seed": 1}
    assert {name: written["settings"][name] for name in chosen} == chosen
    assert "batch_effect_spliced" in written["groups"][1]["variants"][0]["gene_sites"]
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "told.json"]
    code, _, err = run(source, "--grid", "likelihood=normal", "--as-is", "--json", told)
    assert code == 2 and "told.json exists already" in err


def test_every_option_is_passed_on(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    found = Comparison((judge("raw counts", [row("a", 0)]),), TrainSettings(), 450, 50)
    monkeypatch.setattr(comparing, "compare_file", lambda *arguments: calls.append(arguments) or found)
    assert run(source, "--grid", "times=shared") == (0, found.table() + "\n", "")
    options = (
        "--json j --html h.html --as-is --max-epochs 3 --batch-size 4 --seed 5 --threads 6 --batch-key k --overwrite"
    )
    assert run(source, "--grid", "times=shared", *options.split())[0] == 0
    files = Path("j"), Path("h.html")
    assert calls == [
        (source, CompareOptions({"times": ("shared",)})),
        (source, CompareOptions({"times": ("shared",)}, *files, True, 3, 4, 5, 6, "k", True)),
    ]


def test_where_every_fit_fails_the_table_is_shown_and_the_code_is_1(source, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Comparison((judge("raw counts", [Row("nb", warnings=("failed: NaN",))]),), TrainSettings(), 450, 50)
    monkeypatch.setattr(comparing, "compare_file", lambda *arguments: failed)
    code, out, err = run(source, "--grid", "likelihood=nb")
    assert code == 1 and "failed: NaN" in out and err.count("\n") == 1 and "every one failed" in err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("", "--grid"),
        ("--grid noise=nb", "likelihood, states, rates"),
        ("--grid likelihood=gauss", "'gauss'"),
        ("--grid times=shared --html page.txt", ".html"),
        ("--grid times=shared --json x.html --html x.html", "two files"),
        ("--grid times=shared --json nowhere/x.json", "nowhere"),
        ("--grid times=shared --batch-key week", "week"),
    ],
)
def test_bad_usage_is_one_line_and_writes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(source, *options.split())
    assert (code, out) == (2, "") and err.count("\n") == 1 and word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "choice"), [("nb", "nb"), ("zinb", "zinb")])
def test_zero_inflation_is_found_where_it_was_planted(noise: str, choice: str) -> None:
    adata = counts(400, 40, noise)
    variants = {name: pv.VelocityModel(likelihood=LIKELIHOODS[name]()) for name in ("poisson", "nb", "zinb")}
    found = compare(variants, adata, as_is=True, settings=TrainSettings(held_out=0.2, max_epochs=300), progress=False)
    assert found.choice == {"raw counts": choice}
    mean, error = found.groups[0].differences["poisson"]
    assert mean < -3 * error


def test_a_lump_at_zero_is_not_ranked_against_densities() -> None:
    variants = {"normal": small("normal"), "tobit": small("tobit"), "studentt": small("studentt")}
    found = compare(variants, small_adata(), as_is=True, settings=settings(max_epochs=2), progress=False)
    assert [group.scored for group in found.groups] == ["scaled layers", "scaled layers, zeros censored"]
    assert [[row.name for row in group.rows] for group in found.groups] == [["normal", "studentt"], ["tobit"]]
