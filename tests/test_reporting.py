"""The report: one file that is whole, safe, and says what it cannot show."""

from __future__ import annotations

import base64
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from fitted import fitted_adata

from pyro_velo import plots
from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import InputError
from pyro_velo.reporting import plus_minus, render, report

SECTIONS = ["method", "training", "stream", "time", "uncertainty", "portraits", "rates", "ranking", "table", "settings"]
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join("".join(self.text).split())


@pytest.fixture
def adata():
    return fitted_adata(n_cells=60, n_genes=4)


@pytest.fixture(scope="module")
def page():
    return Page(render(fitted_adata(n_cells=120), title="Arc of cells"))


def test_every_section_is_there_and_linked(page):
    assert [attributes["id"] for attributes in page.all("section")] == SECTIONS
    assert [attributes["href"] for attributes in page.all("a")] == [f"#{name}" for name in SECTIONS]


def test_nothing_is_loaded_from_elsewhere(page):
    assert {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    for tag, attributes in page.elements:
        for name in ("src", "href", "data", "srcset", "action"):
            if name in attributes:
                assert attributes[name].startswith("#" if tag == "a" else "data:image/png;base64,")
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy


def test_pictures_are_pngs_with_their_size_and_words(page):
    images = page.all("img")
    assert len(images) == 1 + 4 + 9 + 2
    for image in images:
        png = base64.b64decode(image["src"].partition(",")[2], validate=True)
        assert png.startswith(b"\x89PNG") and png.endswith(b"IEND\xaeB`\x82")
        assert len(image["alt"]) > 20
        assert 200 < int(image["width"]) < 1000 and 150 < int(image["height"]) < 1000


def test_it_names_what_was_fitted(page):
    adata = fitted_adata(n_cells=120)
    assert "Arc of cells" in page.words
    assert all(gene in page.words for gene in plots.best_genes(adata, 20))
    best = plots.best_genes(adata, 1)[0]
    row = adata.var.loc[best]
    assert all(plus_minus((row[name], row[f"{name}_sd"])) in page.words for name in keys.RATES)
    history = adata.uns[keys.UNS]["elbo_history"]
    best_epoch = history["epoch"][np.nanargmax(history["held_out"])]
    assert f"the best epoch was {best_epoch:g} of 60" in page.words
    assert "For 11 genes" in page.words and "1 other gene was left out" in page.words
    assert all(
        name in page.words for name in ("learning_rate", "pyro_velo", "torch", "pyro", "anndata", "python", "platform")
    )
    assert all(cluster in page.words for cluster in ("early", "middle", "late"))


def test_hostile_names_are_shown_and_not_run(adata):
    hostile = "<script>alert('$x')</script>"
    adata.var_names = [hostile, *adata.var_names[1:]]
    adata.var.loc[hostile, keys.FIT_R2] = 0.99
    adata.obs["clusters"] = adata.obs["clusters"].cat.rename_categories({"late": '"><img src=x onerror=alert(1)>'})
    adata.uns[keys.UNS]["settings"]["note"] = "</td><script>1</script>"
    page = Page(render(adata, title="<b onclick='x'>"))
    assert page.all("script") == [] and page.all("b") == []
    assert all(attributes["src"].startswith("data:") for attributes in page.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert hostile in page.words


def test_without_an_embedding_it_says_why(adata):
    del adata.obsm["X_umap"]
    page = Page(render(adata))
    assert [attributes["id"] for attributes in page.all("section")] == SECTIONS
    assert page.words.count("No picture. Expected 'X_umap' in adata.obsm") == 3
    assert len(page.all("img")) == 1 + 3 + 2


def test_without_a_projected_velocity_only_its_pictures_are_absent(adata):
    del adata.obsm["velocity_umap"]
    page = Page(render(adata))
    assert page.words.count("No picture. Expected 'velocity_umap'") == 1
    assert len(page.all("img")) == 1 + 2 + 3 + 2


def test_without_clusters_or_held_out_cells(adata):
    del adata.obs["clusters"]
    adata.uns[keys.UNS]["elbo_history"]["held_out"][:] = np.nan
    page = Page(render(adata))
    assert "coloured by" not in page.words.replace("cells coloured by state", "")
    assert "No cells were held out" in page.words


def test_a_file_replaces_the_one_before_it_and_pyplot_stays_untouched(adata, tmp_path):
    settings = dict(mpl.rcParams)
    target = tmp_path / "report.html"
    target.write_text("old")
    assert report(adata, target) == target
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["report.html"]
    assert dict(mpl.rcParams) == settings and plt.get_fignums() == []


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("uns", keys.UNS),
        ("var", keys.FIT_ALPHA),
        ("var", keys.FIT_R2),
        ("var", "fit_beta_sd"),
        ("layers", keys.FIT_STATE),
        ("layers", "Mu"),
        ("obs", keys.LATENT_TIME),
        ("obs", keys.VELOCITY_UNCERTAINTY),
    ],
)
def test_a_missing_key_is_told_and_nothing_written(where, name, adata, tmp_path):
    del getattr(adata, where)[name]
    with pytest.raises(InputError, match=rf"Expected '{name}' in adata\.{where}, which holds .+\. (Fit|Prepare)"):
        report(adata, tmp_path / "report.html")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "tsne"}, "Expected 'X_tsne' in adata.obsm, which holds X_umap"),
        ({"color": "celltype"}, "Expected 'celltype' in adata.obs, which holds clusters"),
    ],
)
def test_a_key_asked_for_by_name_must_be_there(options, message, adata, tmp_path):
    with pytest.raises(InputError, match=message):
        report(adata, tmp_path / "report.html", **options)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(adata, tmp_path):
    with pytest.raises(InputError, match=r"Expected a folder at .*nowhere.* Make it"):
        report(adata, tmp_path / "nowhere" / "report.html")


def test_a_crash_while_writing_leaves_the_old_file(adata, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")
    # The package's attribute `report` is the function, not the module.
    monkeypatch.setattr(sys.modules["pyro_velo.reporting"], "render", lambda *_, **__: "new")

    def full(self: Path, text: str, **_: str) -> None:
        with open(self, "w") as file:
            file.write(text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        report(adata, target)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [
        (0.53217, 0.0412, "0.532 ± 0.041"),
        (123.4, 25.0, "123 ± 25"),
        (1.5, np.nan, "1.5"),
        (2e-5, 1e-6, "0.000020 ± 0.000001"),
    ],
)
def test_means_are_rounded_to_what_their_sd_allows(mean, sd, text):
    assert plus_minus((mean, sd)) == text


def test_the_text_has_no_template_left_in_it(page):
    assert not re.search(r"{{|{%|Undefined|\bnan\b|None\b", page.words)
