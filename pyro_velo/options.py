"""What a run of the command line asks for, and its defaults; light, so that `--help` can read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
"""Where the tensors live; `auto` takes the GPU where there is one."""

Counts = Literal["normal", "poisson", "nb", "zinb"]
"""What the simulator can draw: Normal noise, or counts."""

DEMO_FOLDER = Path("pyro-velo-demo")
BASIS = "umap"
COLOR = "clusters"


@dataclass(frozen=True)
class FitOptions:
    """The options of `pyro-velo fit`; `None` leaves the choice to `TrainSettings`, the file or the machine.

    `as_is` skips the preprocessing; `nuclei` lets unspliced counts exceed spliced ones by any factor; `draws` counts
    posterior draws, two at least; `save` and `resume` are folders of checkpoints; `report` is an HTML file; `overwrite`
    allows output files and keys that exist.
    """

    as_is: bool = False
    spliced_layer: str | None = None
    unspliced_layer: str | None = None
    draws: int = 100
    max_epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    threads: int | None = None
    device: Device = "auto"
    save: Path | None = None
    resume: Path | None = None
    report: Path | None = None
    overwrite: bool = False
    nuclei: bool = False
