"""What the README promises: its Python runs, its commands exist, and its table names the keys that are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from sklearn.neighbors import kneighbors_graph
from small import GUIDE, MODEL, settings, small_adata

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.cli import app
from pyro_velo.data import anndata_keys as keys

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
EXTENSIONS = re.findall(r"```python\n(.*?)```", README.partition("## Make it yours")[2], re.DOTALL)
TRUST = re.findall(r"```python\n(.*?)```", README.partition("## How far")[2].partition("\n## ")[0], re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_the_swaps_train() -> None:
    (code,) = EXTENSIONS
    names: dict[str, Any] = {}
    exec(code, names)
    noisy = simulate.Settings(noise=simulate.NegativeBinomial(), kinetics=simulate.LogNormalRates(drop=0))
    adata = pv.to_anndata(simulate.simulate(30, 4, settings=noisy, seed=0))
    data = pv.velocity_data(adata, as_is=True, counts=True)
    one = pv.TrainSettings(max_epochs=1)
    fit = pv.fit(names["model"], names["guide"], adata, data=data, settings=one, progress=False)
    assert "NB()" in fit.recipe and "Shared(" in fit.recipe and "PerGene(" in fit.recipe


@pytest.mark.slow
def test_the_questions_are_answered() -> None:
    (code,) = TRUST
    adata = small_adata(90, 6)
    names = np.array(["Pre-endocrine", "Alpha", "Beta"])
    adata.obs["clusters"] = names[(3 * adata.obs[keys.TRUE_TIME].rank(pct=True)).astype(int).clip(0, 2)]
    adata.obsp["distances"] = kneighbors_graph(adata.layers[keys.SPLICED], 30, mode="distance")
    data, short = pv.velocity_data(adata, as_is=True), settings(max_epochs=1)
    fit = pv.fit(MODEL, GUIDE, adata, data=data, settings=short, progress=False)
    told: dict[str, Any] = {"pv": pv, "fit": fit, "adata": adata, "simulated_fit": fit, "simulated": adata}
    exec(code, told)
    assert told["fates"].states == ("Alpha", "Beta") and keys.FATE_PROBABILITIES in adata.obsm
    assert len(told["sure"].extrinsic.mean) == 90 and told["check"].observed.shape[1] == 6


def test_the_commands_exist() -> None:
    commands = typer.main.get_command(app).commands
    used = [line.split() for block in SHELL for line in block.splitlines() if line.startswith("pyro-velo")]
    assert used
    for _, command, *rest in used:
        options = {flag for parameter in commands[command].params for flag in parameter.opts}
        assert {word for word in rest if re.match(r"--?[a-z]", word)} <= options


def test_the_table_names_what_is_written() -> None:
    table = set(re.findall(r"`(\w+)`", README.partition("## What comes out")[2].partition("\n## ")[0]))
    rates_sd = {name.removesuffix("_sd") for name in keys.RATES_SD}
    written = {*keys.LAYERS_OUT, *keys.VAR_OUT, *keys.OBS_OUT, *keys.OBSM_OUT, keys.UNS} - set(keys.RATES_SD)
    assert written | rates_sd <= table
