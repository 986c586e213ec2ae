"""What the documents say can be run is run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(text: str) -> list[str]:
    """The Python code in a document, block by block."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def test_extending_runs_as_it_is_written() -> None:
    text = (DOCS / "extending.md").read_text()
    found = blocks(text)
    assert len(found) == 5
    # The first sets the scene; each of the others is an extension.
    assert all(len(block.strip().splitlines()) < 30 for block in found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scene: dict = {}
        for block in found:
            exec(compile(block, "docs/extending.md", "exec"), scene)
    assert "velocity" in scene["adata"].layers
    assert scene["fit"].epochs == 4


@pytest.mark.parametrize("name", [path.name for path in sorted(DOCS.glob("*.md"))])
def test_links_lead_somewhere(name: str) -> None:
    text = (DOCS / name).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith(("http:", "https:")):
            assert (DOCS / target).exists(), target


def test_autoencoders_run_as_they_are_written() -> None:
    (block,) = blocks((DOCS / "autoencoders.md").read_text())
    scene: dict = {}
    exec(compile(block, "docs/autoencoders.md", "exec"), scene)
    assert set(scene["adata"].obs["vae_cluster"].cat.categories) == {"0", "1", "2"}
    assert scene["other"].mean.shape == ((scene["adata"].obs["condition"] == "condition_0").sum(), 20)
