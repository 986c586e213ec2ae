"""The notebooks run from a clean state, and stand in the repository as a run from top to bottom has left them."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SLOW = {"conditional_clusters.ipynb", "posterior_collapse.ipynb", "uncertainty.ipynb", "vae_on_counts.ipynb"}
"""Those whose run takes more than 40 s on a quiet core."""
TIMEOUT = 240
"""Seconds, for a notebook as a whole."""


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code(notebook) for output in cell.outputs]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def errors(notebook: Any) -> list[str]:
    return [f"{each.ename}: {each.evalue}" for each in outputs(notebook) if each.output_type == "error"]


def parametrised(run: bool) -> list[Any]:
    """A notebook each; those whose run takes long are slow where it is `run`."""
    marks = {path: [pytest.mark.slow] if run and path.name in SLOW else [] for path in NOTEBOOKS}
    return [pytest.param(path, marks=marks[path], id=path.stem) for path in NOTEBOOKS]


def test_there_are_notebooks() -> None:
    assert {path.name for path in NOTEBOOKS} >= SLOW and NOTEBOOKS


@pytest.mark.parametrize("path", parametrised(run=False))
def test_a_notebook_is_kept_as_one_run_has_left_it(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert errors(notebook) == [] and pictures(notebook) > 0
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))


@pytest.mark.parametrize("path", parametrised(run=False))
def test_the_code_of_a_notebook_is_plain_python(path: Path) -> None:
    for number, cell in enumerate(code(read(path))):
        # Jupyter lets a cell wait; nothing else may be other than Python.
        compile(cell.source, f"{path.name}, code cell {number + 1}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("path", parametrised(run=True))
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, in an empty folder, on this package; it draws as many pictures as are kept."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = read(path)
    kept = pictures(notebook)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where)
    asyncio.run(asyncio.wait_for(client.async_execute(), TIMEOUT))
    assert errors(notebook) == [] and pictures(notebook) == kept
