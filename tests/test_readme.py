"""What the README promises: its Python runs, its commands exist, and its table names the keys that are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

import pyro_velo as pv
from pyro_velo import simulate
from pyro_velo.cli import app
from pyro_velo.data import anndata_keys as keys

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
EXTENSIONS = re.findall(r"```python\n(.*?)```", README.partition("## Make it yours")[2], re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


def test_the_swaps_train() -> None:
    (code,) = EXTENSIONS
    names: dict[str, Any] = {}
    exec(code, names)
    settings = simulate.Settings(noise=simulate.NegativeBinomial(), kinetics=simulate.LogNormalRates(drop=0))
    adata = pv.to_anndata(simulate.simulate(30, 4, settings=settings, seed=0))
    data = pv.velocity_data(adata, as_is=True, counts=True)
    one = pv.TrainSettings(max_epochs=1)
    fit = pv.fit(names["model"], names["guide"], adata, data=data, settings=one, progress=False)
    assert "NB()" in fit.recipe and "Shared(" in fit.recipe and "PerGene(" in fit.recipe


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
