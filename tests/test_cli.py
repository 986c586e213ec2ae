"""The command line: what it says, with which code it exits, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
from sklearn.neighbors import kneighbors_graph

import pyro_velo
from pyro_velo import auditing, calibrating
from pyro_velo.cli import main
from pyro_velo.data import anndata_keys as keys
from pyro_velo.errors import FitError, InputError
from pyro_velo.options import BASIS, CALIBRATION_DRAWS, COLOR, DEMO_FOLDER, FitOptions
from pyro_velo.parsing import parse_edges
from pyro_velo.version import __version__

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "pyro_velo"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SECONDS = 300


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """pyro-velo in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS)


def here(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has torch and the rest imported already."""
    out, err = StringIO(), StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        code = main([*map(str, arguments)])
    return subprocess.CompletedProcess([*map(str, arguments)], code, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, with what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line on stderr with these words, exit code 2."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("pyro-velo: error: ")
    for word in words:
        assert word in line


# Edges


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("A>B", [("A", "B")]),
        ("A>B,C>D", [("A", "B"), ("C", "D")]),
        ("A>B,>C", [("A", "B"), ("A", "C")]),
        (" Ngn3 low EP > Ngn3 high EP , > Beta", [("Ngn3 low EP", "Ngn3 high EP"), ("Ngn3 low EP", "Beta")]),
        ("A>B,>C,D>B,>A", [("A", "B"), ("A", "C"), ("D", "B"), ("D", "A")]),
    ],
)
def test_edges_are_read(text: str, pairs: list[tuple[str, str]]) -> None:
    assert parse_edges(text) == pairs


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "got ''"),
        ("A", "got 'A'"),
        ("A>", "got 'A>'"),
        ("A>B,", "got ''"),
        ("A>B>C", "Write one > an edge"),
        (">B", "Write it out"),
        ("A>A", "got A>A"),
        ("A>B,>B", "got A>B"),
    ],
)
def test_bad_edges_are_refused(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        parse_edges(text)


# What is passed on, and how an exception ends; the api is a stand-in


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of `pyro_velo.api`: notes how it is called; its functions end with `raises`, or return `returns`."""
    stand_in = SimpleNamespace(
        calls=[], raises=None, returns=SimpleNamespace(interrupted=False, epochs=3, data=SimpleNamespace(source=None))
    )

    def noting(name: str) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            stand_in.calls.append((name, arguments, options))
            if stand_in.raises is not None:
                raise stand_in.raises
            return stand_in.returns

        return function

    module = ModuleType("pyro_velo.api")
    for name in ("demo", "simulate_file", "fit_file", "report_file", "score_file"):
        setattr(module, name, noting(name))
    monkeypatch.setitem(sys.modules, "pyro_velo.api", module)
    monkeypatch.setattr(pyro_velo, "api", module, raising=False)
    return stand_in


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that is there."""
    path = tmp_path / "in.h5ad"
    path.touch()
    return path


def test_demo_is_passed_on(api: SimpleNamespace) -> None:
    assert main(["demo"]) == 0
    assert main(["demo", "-o", "there"]) == 0
    assert api.calls == [("demo", (DEMO_FOLDER,), {}), ("demo", (Path("there"),), {})]


def test_simulate_is_passed_on(api: SimpleNamespace) -> None:
    assert main("simulate out.h5ad --cells 7 --genes 5 --seed 3 --likelihood nb --stationary".split()) == 0
    options = {"cells": 7, "genes": 5, "seed": 3, "likelihood": "nb", "stationary": True, "overwrite": False}
    assert api.calls == [("simulate_file", (Path("out.h5ad"),), options)]


def test_fit_passes_its_defaults_on(api: SimpleNamespace, file: Path) -> None:
    assert main(["fit", str(file), "-o", "out.h5ad"]) == 0
    assert api.calls == [("fit_file", (file, Path("out.h5ad"), FitOptions()), {})]


def test_fit_passes_every_option_on(api: SimpleNamespace, file: Path) -> None:
    options = (
        "--as-is --spliced-layer S --unspliced-layer U --draws 7 --max-epochs 5 --batch-size 64 --seed 3 --threads 2 "
        f"--device cpu --save here --resume {file.parent} --report r.html --overwrite --nuclei "
        "--beta 4 --kl-cycles 3 --free-bits 0.1"
    )
    assert main(["fit", str(file), "-o", "out.h5ad", *options.split()]) == 0
    there, report = file.parent, Path("r.html")
    expected = FitOptions(True, "S", "U", 7, 5, 64, 3, 2, "cpu", Path("here"), there, report, True, True)
    expected = replace(expected, beta=4.0, kl_cycles=3, free_bits=0.1)
    assert api.calls == [("fit_file", (file, Path("out.h5ad"), expected), {})]


def test_fit_passes_every_part_on(api: SimpleNamespace, file: Path) -> None:
    options = (
        "--likelihood nb --states dirichlet --rates low-rank --times shared --transcription time-dependent "
        "--library inferred --batch-key lab --covariate age --covariate sex --prior alpha=LogNormal(0,1)"
    )
    assert main(["fit", str(file), "-o", "out.h5ad", *options.split()]) == 0
    expected = FitOptions(
        likelihood="nb",
        states="dirichlet",
        rates="low-rank",
        times="shared",
        transcription="time-dependent",
        library="inferred",
        batch_key="lab",
        covariates=("age", "sex"),
        priors=("alpha=LogNormal(0,1)",),
    )
    assert api.calls == [("fit_file", (file, Path("out.h5ad"), expected), {})]


def test_report_is_passed_on(api: SimpleNamespace, file: Path) -> None:
    assert main(["report", str(file), "-o", "r.html"]) == 0
    assert main(["report", str(file), "-o", "r.html", "--basis", "pca", "--color", "day", "--overwrite"]) == 0
    assert [options for _, _, options in api.calls] == [
        {"basis": BASIS, "color": COLOR, "overwrite": False},
        {"basis": "pca", "color": "day", "overwrite": True},
    ]


def test_score_is_passed_on_and_printed(api: SimpleNamespace, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api.returns = {"CBDir": 0.5}
    assert main(["score", str(file), "--clusters", "kind", "--edges", "A>B,>C", "--json", "s.json"]) == 0
    ((name, arguments, options),) = api.calls
    assert (name, arguments) == ("score_file", (file, "kind", [("A", "B"), ("A", "C")]))
    assert options == {"basis": BASIS, "json": Path("s.json"), "overwrite": False}
    assert json.loads(capsys.readouterr().out) == {"CBDir": 0.5}


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Notes how calibrations and audits are called, which return a table."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def noting(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return SimpleNamespace(table=lambda: "a table")

    monkeypatch.setattr(calibrating, "calibrate_file", noting)
    monkeypatch.setattr(auditing, "audit_file", noting)
    return calls


def test_calibrate_is_passed_on_and_printed(tables: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("calibrate --cells 30 --genes 4".split()) == 0
    options = (
        "--fits 2 --seed 3 --likelihood nb --states hard --rates per-gene --times shared --draws 9 --max-epochs 5 "
        "--threads 1 --save kept --json told.json --picture told.png --overwrite"
    )
    assert main(f"calibrate --cells 30 --genes 4 {options}".split()) == 0
    size = {"cells": 30, "genes": 4}
    expected = FitOptions(
        draws=9, max_epochs=5, seed=3, threads=1, save=Path("kept"), overwrite=True,
        likelihood="nb", states="hard", rates="per-gene", times="shared",
    )  # fmt: skip
    assert tables == [
        ((FitOptions(draws=CALIBRATION_DRAWS),), size | {"fits": 20, "json": None, "picture": None}),
        ((expected,), size | {"fits": 2, "json": Path("told.json"), "picture": Path("told.png")}),
    ]
    assert capsys.readouterr().out == "a table\na table\n"


def test_audit_is_passed_on_and_printed(tables: list[Any], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = file.parent
    assert main(["audit", str(folder), str(file), "--clusters", "kind"]) == 0
    parts = "--draws 7 --likelihood nb --batch-key lab --covariate age --prior alpha=LogNormal(0,1)".split()
    assert main(["audit", str(folder), str(file), "--clusters", "kind", "--edges", "A>B,>C", *parts]) == 0
    given = FitOptions(draws=7, likelihood="nb", batch_key="lab", covariates=("age",), priors=("alpha=LogNormal(0,1)",))
    assert tables == [
        ((folder, file, "kind", None, FitOptions()), {}),
        ((folder, file, "kind", [("A", "B"), ("A", "C")], given), {}),
    ]
    assert capsys.readouterr().out == "a table\na table\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("Layer 'x' is\nnot there."), 2, "pyro-velo: error: Layer 'x' is not there."),
        (PermissionError(13, "Permission denied", "out"), 2, "pyro-velo: error: [Errno 13] Permission denied: 'out'"),
        (MemoryError("2 PiB"), 2, "pyro-velo: error: 2 PiB"),
        (FitError("NaN at step 3,\ngene Sox9."), 1, "pyro-velo: error: NaN at step 3, gene Sox9."),
        (KeyboardInterrupt(), 130, "pyro-velo: interrupted"),
    ],
)
def test_what_is_not_a_bug_ends_in_one_line(
    api: SimpleNamespace, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    api.raises = error
    assert main(["demo"]) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_ctrl_c_during_the_training_is_said_and_no_failure(
    api: SimpleNamespace, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vars(api.returns).update(interrupted=True, epochs=12)
    for arguments in (["fit", str(file), "-o", "out.h5ad"], ["demo"]):
        assert main(arguments) == 0
        told = "pyro-velo: interrupted at epoch 12; kept the best parameters so far\n"
        assert capsys.readouterr().err == told


def test_a_bug_keeps_its_traceback(api: SimpleNamespace) -> None:
    api.raises = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        main(["demo"])


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyro-velo {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("", "Missing command"),
        ("fot", "'fot'"),
        ("demo --colour", "--colour"),
        ("fit", "'IN'"),
        ("fit missing.h5ad -o out.h5ad", "'missing.h5ad' does not exist"),
        ("fit in.h5ad", "'-o'"),
        ("fit in.h5ad -o out.h5ad --draws many", "--draws"),
        ("fit in.h5ad -o out.h5ad --draws 1", "--draws"),
        ("fit in.h5ad -o out.h5ad --seed -1", "--seed"),
        ("fit in.h5ad -o out.h5ad --seed 4294967296", "--seed"),
        ("fit in.h5ad -o out.h5ad --device tpu", "'auto', 'cpu', 'cuda'"),
        ("fit in.h5ad -o out.h5ad --resume nowhere", "'nowhere' does not exist"),
        ("simulate out.h5ad --cells 0 --genes 5 --seed 0", "--cells"),
        ("simulate out.h5ad --cells 5 --genes 5 --seed 0 --likelihood gauss", "'normal', 'poisson', 'nb', 'zinb'"),
        ("report missing.h5ad -o r.html", "'missing.h5ad' does not exist"),
        ("score missing.h5ad --clusters c --edges A>B", "'missing.h5ad' does not exist"),
        ("score in.h5ad --clusters c --edges A", "got 'A'"),
        ("calibrate --genes 5", "'--cells'"),
        ("calibrate --cells 3 --genes 5", "--cells"),
        ("calibrate --cells 30 --genes 5 --draws 1", "--draws"),
        ("calibrate --cells 30 --genes 5 --picture told.txt", ".txt"),
        ("audit nowhere in.h5ad --clusters c", "'nowhere' does not exist"),
        ("audit . missing.h5ad --clusters c", "'missing.h5ad' does not exist"),
        ("audit . in.h5ad --clusters c --edges A", "got 'A'"),
    ],
)
def test_bad_usage_is_refused(
    api: SimpleNamespace,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    word: str,
) -> None:
    monkeypatch.chdir(file.parent)
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pyro-velo: error: ") and err.count("\n") == 1 and word in err
    assert api.calls == []


# As processes, for real


def test_a_usage_error_is_one_line_in_a_process_too(tmp_path: Path) -> None:
    assert_refused(run("fit", "missing.h5ad", "-o", "out.h5ad", cwd=tmp_path), "missing.h5ad")
    assert contents(tmp_path) == {}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small simulation, made by the command."""
    folder = tmp_path_factory.mktemp("simulated")
    done = run("simulate", "sim.h5ad", "--cells", "120", "--genes", "20", "--seed", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Wrote sim.h5ad\n"
    return folder / "sim.h5ad"


@pytest.fixture(scope="module")
def fitted(simulated: Path) -> Path:
    """The simulation, fitted for a few epochs, with a report and a checkpoint beside it."""
    options = "--as-is --max-epochs 5 --draws 5 --seed 0 --threads 1 --device cpu --save checkpoint --report fit.html"
    done = here("fit", simulated.name, "-o", "out.h5ad", *options.split(), cwd=simulated.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Wrote out.h5ad and fit.html\n"
    return simulated.parent / "out.h5ad"


def shapes(path: Path, group: str) -> dict[str, tuple[int, ...]]:
    """The arrays of one group of an AnnData on disk."""
    with h5py.File(path) as file:
        return {name: item.shape for name, item in file[group].items() if isinstance(item, h5py.Dataset)}


def test_simulate_keeps_the_truth(simulated: Path) -> None:
    assert {keys.TRUE_ALPHA, keys.TRUE_BETA, keys.TRUE_GAMMA, keys.TRUE_SWITCH} <= shapes(simulated, "var").keys()
    assert {keys.TRUE_VELOCITY, keys.TRUE_U, keys.TRUE_S} <= shapes(simulated, "layers").keys()
    assert shapes(simulated, "layers")[keys.SPLICED] == (120, 20)


def test_fit_writes_every_key(fitted: Path) -> None:
    assert dict.fromkeys(keys.LAYERS_OUT, (120, 20)).items() <= shapes(fitted, "layers").items()
    assert dict.fromkeys(keys.VAR_OUT, (20,)).items() <= shapes(fitted, "var").items()
    assert dict.fromkeys(keys.OBS_OUT, (120,)).items() <= shapes(fitted, "obs").items()
    assert set(keys.OBSM_OUT) <= shapes(fitted, "obsm").keys()
    assert (fitted.parent / "fit.html").read_text().lstrip().lower().startswith("<!doctype html>")


def stopped(*arguments: str | Path, cwd: Path, by: signal.Signals) -> tuple[int, str]:
    """Exit code and stderr of a fit that is sent a signal once its first checkpoint, in `cwd / "saved"`, is there."""
    command = [*COMMAND, "fit", *map(str, arguments), "--save", "saved"]
    log = cwd.parent / f"{cwd.name}.log"
    with log.open("w") as stderr:
        # A shell that runs the tests in the background has Ctrl-C ignored, and children inherit that.
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=ENVIRONMENT,
            stderr=stderr,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + SECONDS
            while process.poll() is None and not (cwd / "saved" / "checkpoint.safetensors").exists():
                assert time.monotonic() < deadline, f"No checkpoint in time: {log.read_text()}"
                time.sleep(0.05)
            process.send_signal(by)
            return process.wait(SECONDS), log.read_text()
        finally:
            process.kill()


def test_a_killed_fit_goes_on_bit_by_bit(simulated: Path, tmp_path: Path) -> None:
    options = "-o out.h5ad --as-is --max-epochs 16 --batch-size 20 --draws 5 --threads 1 --device cpu".split()
    (whole := tmp_path / "whole").mkdir()
    (killed := tmp_path / "killed").mkdir()
    done = here("fit", simulated, *options, cwd=whole)
    assert done.returncode == 0, done.stderr
    code, _ = stopped(simulated, *options, cwd=killed, by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = run("fit", simulated, *options, "--resume", "saved", "--overwrite", cwd=killed)
    assert done.returncode == 0, done.stderr
    with h5py.File(whole / "out.h5ad") as one, h5py.File(killed / "out.h5ad") as other:
        for name in ("layers/velocity", "layers/velocity_sd", "var/fit_alpha", "obs/latent_time"):
            np.testing.assert_array_equal(one[name][()], other[name][()])


def test_ctrl_c_keeps_the_best_so_far(simulated: Path, tmp_path: Path) -> None:
    options = "-o out.h5ad --as-is --max-epochs 20000 --draws 5 --threads 1 --device cpu".split()
    (folder := tmp_path / "fit").mkdir()
    code, stderr = stopped(simulated, *options, cwd=folder, by=signal.SIGINT)
    assert code == 0, stderr
    assert re.fullmatch(r"pyro-velo: interrupted at epoch \d+; kept the best parameters so far\n", stderr)
    assert shapes(folder / "out.h5ad", "layers")[keys.VELOCITY] == (120, 20)


@pytest.fixture(scope="module")
def labelled(fitted: Path) -> Path:
    """The fit, with early and late cells as clusters, and its first two genes as an embedding."""
    adata = anndata.read_h5ad(fitted)
    adata.obs["clusters"] = np.where(adata.obs[keys.TRUE_TIME] < 10, "early cells", "late cells")
    adata.obsm["X_umap"] = np.asarray(adata.layers[keys.SPLICED][:, :2], dtype=np.float32)
    adata.obsp["distances"] = kneighbors_graph(adata.obsm["X_umap"], 10, mode="distance")
    adata.write_h5ad(path := fitted.parent / "labelled.h5ad")
    return path


def test_report_writes_one_page(labelled: Path) -> None:
    page = labelled.parent / "later.html"
    done = here("report", labelled.name, "-o", page.name, cwd=labelled.parent)
    assert done.returncode == 0, done.stderr
    assert 'src="http' not in page.read_text()


def test_score_prints_and_writes_the_same(labelled: Path) -> None:
    arguments = ["--clusters", "clusters", "--edges", "early cells>late cells", "--json", "scores.json"]
    done = here("score", labelled.name, *arguments, cwd=labelled.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((labelled.parent / "scores.json").read_text())
    assert_refused(here("score", labelled.name, *arguments, cwd=labelled.parent), "scores.json", "exists already")
    assert here("score", labelled.name, *arguments, "--overwrite", cwd=labelled.parent).returncode == 0


def test_a_kept_fit_is_replaced_if_asked_to_and_gone_on_with_by_the_same_model(
    fitted: Path, simulated: Path, tmp_path: Path
) -> None:
    shutil.copytree(fitted.parent / "checkpoint", kept := tmp_path / "kept")
    shutil.copy(simulated, tmp_path / "counts.h5ad")
    before = contents(tmp_path)

    def fit(*options: str) -> subprocess.CompletedProcess[str]:
        fixed = "-o out.h5ad --draws 5 --seed 0 --threads 1 --device cpu --save kept".split()
        return here("fit", "counts.h5ad", *fixed, *options, cwd=tmp_path)

    assert_refused(fit("--as-is", "--max-epochs", "5"), "holds a fit already", "another folder")
    for folder in ("kept", str(kept)):
        assert_refused(fit("--as-is", "--likelihood", "normal", "--resume", folder), "model of the checkpoint")
    assert contents(tmp_path) == before
    assert fit("--as-is", "--max-epochs", "6", "--resume", "kept").returncode == 0
    assert contents(kept)["parts.json"] == before["kept/parts.json"]
    (tmp_path / "file").touch()
    assert_refused(fit("--as-is", "--overwrite", "--save", "file"), "a folder to keep the fit in", "Name another")


def test_score_refuses_a_cluster_that_is_not_there(labelled: Path) -> None:
    before = contents(labelled.parent)
    arguments = ["--clusters", "clusters", "--edges", "early cells>latecells"]
    assert_refused(here("score", labelled.name, *arguments, cwd=labelled.parent), "latecells", "late cells")
    assert contents(labelled.parent) == before


def test_audit_prints_the_edges_of_a_fit_that_was_kept(labelled: Path) -> None:
    before = contents(labelled.parent)
    arguments = ["checkpoint", labelled.name, "--clusters", "clusters"]
    done = here("audit", *arguments, "--edges", "early cells>late cells", "--draws", "5", cwd=labelled.parent)
    assert done.returncode == 0, done.stderr
    assert "| early cells>late cells |" in done.stdout
    assert_refused(here("audit", *arguments, "--edges", "early cells>latecells", cwd=labelled.parent), "latecells")
    assert_refused(here("audit", *arguments, "--times", "shared", cwd=labelled.parent), "PerGene", "Shared")
    assert contents(labelled.parent) == before


def test_audit_refuses_a_folder_without_a_fit(labelled: Path, tmp_path: Path) -> None:
    assert_refused(here("audit", tmp_path, labelled, "--clusters", "clusters", cwd=tmp_path), str(tmp_path))
    assert contents(tmp_path) == {}


def test_calibrate_prints_and_writes_the_same(tmp_path: Path) -> None:
    options = "--cells 20 --genes 3 --fits 1 --draws 5 --max-epochs 1 --threads 1 --json told.json".split()
    done = here("calibrate", *options, "--save", "fits", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    share = json.loads((tmp_path / "told.json").read_text())["quantities"]["velocity"]["90%"]
    (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("velocity"))
    assert done.stdout.startswith("Coverage of central intervals, 1 fit with 5 draws:") and row[3] == f"{share:.3f}"
    before = contents(tmp_path)
    assert_refused(here("calibrate", *options, "--save", "fits", cwd=tmp_path), "told.json", "exists already")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["simulate", "fit", "report"])
def test_an_output_that_exists_is_refused(simulated: Path, fitted: Path, tmp_path: Path, command: str) -> None:
    name = "out.html" if command == "report" else "out.h5ad"
    (tmp_path / name).write_text("mine")
    arguments: dict[str, list[str | Path]] = {
        "simulate": [name, "--cells", "9", "--genes", "3", "--seed", "0"],
        "fit": [simulated, "-o", name, "--as-is", "--max-epochs", "1"],
        "report": [fitted, "-o", name],
    }
    assert_refused(here(command, *arguments[command], cwd=tmp_path), name, "overwrite")
    assert contents(tmp_path) == {name: b"mine"}


def truncated(source: Path, path: Path) -> None:
    """The first half of a file."""
    path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])


def text(source: Path, path: Path) -> None:
    """Not HDF5 at all."""
    path.write_text("cell,gene\n")


def empty(source: Path, path: Path) -> None:
    """No bytes."""
    path.touch()


@pytest.mark.parametrize("spoil", [truncated, text, empty])
@pytest.mark.parametrize("command", ["fit", "report", "score"])
def test_a_broken_file_is_refused(
    simulated: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], command: str
) -> None:
    spoil(simulated, tmp_path / "broken.h5ad")
    before = contents(tmp_path)
    rest = {"fit": ["-o", "out.h5ad"], "report": ["-o", "out.html"], "score": ["--clusters", "c", "--edges", "A>B"]}
    assert_refused(here(command, "broken.h5ad", *rest[command], cwd=tmp_path), "broken.h5ad")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--spliced-layer", "nothing"], ["nothing", "spliced", "unspliced"]),
        (["-o", "no/such/folder/out.h5ad"], ["no/such/folder"]),
        (["--batch-key", "lab"], ["lab"]),
        (["--prior", "alpha=open(1)"], ["alpha", "open"]),
        (["--likelihood", "nb"], ["whole", "spliced"]),
        (["--beta", "0"], ["Expected beta above 0 and finite; got 0.0"]),
        (["--kl-cycles", "0"], ["Expected cycles of 1 or more; got 0"]),
        (["--free-bits", "-1"], ["Expected free_bits of 0 or more and finite; got -1.0"]),
    ],
)
def test_fit_refuses_what_is_not_there(simulated: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    assert_refused(here("fit", simulated, "-o", "out.h5ad", "--as-is", *options, cwd=tmp_path), *words)
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_demo_fits_and_reports(tmp_path: Path) -> None:
    done = here("demo", "-o", "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in (tmp_path / "there").iterdir()} >= {".h5ad", ".html"}
