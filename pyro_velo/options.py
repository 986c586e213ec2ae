"""What a run of the command line asks for, and its defaults; light, so that `--help` can read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Device = Literal["auto", "cpu", "cuda"]
"""Where the tensors live; `auto` takes the GPU where there is one."""

Counts = Literal["normal", "poisson", "nb", "zinb"]
"""What the simulator can draw: Normal noise, or counts."""

DEMO_FOLDER = Path("pyro-velo-demo")
CALIBRATION_FITS, CALIBRATION_DRAWS = 20, 99
"""Fits of a calibration, and draws of each: 100 ranks."""
BASIS = "umap"
COLOR = "clusters"


LikelihoodName = Literal["normal", "tobit", "studentt", "poisson", "nb", "zip", "zinb"]
StatesName = Literal["dirichlet", "logistic-normal", "collapsed", "hard"]
RatesName = Literal["point", "mean-field", "per-gene", "low-rank"]
TimesName = Literal["per-gene", "shared", "hierarchical"]
TranscriptionName = Literal["constant", "time-dependent"]
LibraryName = Literal["known", "inferred"]
Depth = Literal["total", "neighbours"]
"""What a cell's counts are scaled to: the median total of all cells, or that of the cells around it."""


@dataclass(frozen=True)
class FitOptions:
    """The options of `pyro-velo fit`; `None` leaves the choice to `TrainSettings`, the file or the machine.

    `as_is` skips the preprocessing; `nuclei` lets unspliced counts exceed spliced ones by any factor; `draws` counts
    posterior draws, two at least; `depth` is by default "neighbours" for counts and else "total"; `priors` are written
    as `alpha=LogNormal(0, 1)`; `save` and `resume` are folders of checkpoints; `report` is an HTML file; `overwrite`
    allows output files and keys that exist. `on_disk` leaves cells in their file; by default those of a file that would
    take more than half of the free memory. `beta`, `kl_cycles` and `free_bits` are `TrainSettings`' own (`cycles`).
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
    likelihood: LikelihoodName = "tobit"
    states: StatesName = "collapsed"
    rates: RatesName = "mean-field"
    times: TimesName = "per-gene"
    transcription: TranscriptionName = "constant"
    library: LibraryName = "known"
    depth: Depth | None = None
    batch_key: str | None = None
    covariates: tuple[str, ...] = ()
    priors: tuple[str, ...] = ()
    beta: float | None = None
    kl_cycles: int | None = None
    free_bits: float | None = None
    on_disk: bool | None = None


VAEModelName = Literal["vae", "gmvae", "cgmdvae"]
ProfileLikelihoodName = Literal["poisson", "nb", "zip", "zinb", "normal", "bernoulli"]
SizesName = Literal["uniform", "learned", "dirichlet"]
CovarianceName = Literal["diagonal", "full"]
"""What clusters have in the latent space: a variance in each dimension, or a covariance."""


@dataclass(frozen=True)
class VAEOptions:
    """The options of `pyro-velo vae`; `None` leaves the choice to `clustering.TRAINING`, the file or the machine.

    `layer` is by default `X`; `depth` counts the cells' library sizes as known; `clusters` is how many, by default
    chosen among `candidates`; `prune` merges those of them that are too many; `covariance` is what each of them has;
    `neighbours` of each cell make the graph whose communities they start from (0: a Gaussian mixture);
    `condition_key`, `covariates` and `label_key` are columns of obs; `denoised` writes a layer; `save` and `resume` are
    folders of checkpoints; `report` is an HTML file; `on_disk` as in `FitOptions`.
    """

    model: VAEModelName = "gmvae"
    likelihood: ProfileLikelihoodName = "nb"
    layer: str | None = None
    depth: bool = True
    clusters: int | None = None
    candidates: tuple[int, ...] = tuple(range(1, 11))
    prune: bool = False
    sizes: SizesName = "learned"
    covariance: CovarianceName = "full"
    neighbours: int = 0
    latent: int = 10
    condition_key: str | None = None
    covariates: tuple[str, ...] = ()
    label_key: str | None = None
    denoised: bool = False
    max_epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    threads: int | None = None
    save: Path | None = None
    resume: Path | None = None
    report: Path | None = None
    overwrite: bool = False
    on_disk: bool | None = None


DataSetName = Literal["mouse-brain-20k", "mouse-brain"]
"""What can be downloaded: `data.downloads.DATA_SETS`."""
SamplerName = Literal["grid", "tpe"]


@dataclass(frozen=True)
class SweepOptions:
    """The options of `pyro-velo sweep`; `None` leaves the choice to `clustering.TRAINING`, the file or the machine.

    `hidden` are the decoder's layers from the latent space outwards, for each choice; `trials` is by default the whole
    grid; `prune` gives trials up early; `study` is a sqlite file in which trials are kept; `picture` is a file.
    """

    likelihoods: tuple[str, ...] = ("poisson", "nb", "zip", "zinb")
    hidden: tuple[tuple[int, ...], ...] = ((100,), (100, 250), (100, 250, 500), (100, 250, 500, 1000))
    latents: tuple[int, ...] = (10, 25, 50, 100)
    layer: str | None = None
    depth: bool = True
    condition_key: str | None = None
    covariates: tuple[str, ...] = ()
    sampler: SamplerName = "grid"
    trials: int | None = None
    prune: bool = True
    study: Path | None = None
    picture: Path | None = None
    max_epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    threads: int | None = None
    overwrite: bool = False


GRID: dict[str, tuple[str, ...]] = {
    "likelihood": get_args(LikelihoodName),
    "states": get_args(StatesName),
    "rates": get_args(RatesName),
    "times": get_args(TimesName),
    "transcription": get_args(TranscriptionName),
    "library": get_args(LibraryName),
}
"""What `pyro-velo compare` can vary, and the values that each takes."""

PARTS = (*GRID, "batch_key", "covariates", "priors")
"""The options that say what a fit is made of; `fit --save` keeps them."""


@dataclass(frozen=True)
class CompareOptions:
    """The options of `pyro-velo compare`: `grid` has the values to try for names of `GRID`; the others as in `fit`.

    `json` and `html` are files to write.
    """

    grid: dict[str, tuple[str, ...]]
    json: Path | None = None
    html: Path | None = None
    as_is: bool = False
    max_epochs: int | None = None
    batch_size: int | None = None
    seed: int = 0
    threads: int | None = None
    batch_key: str | None = None
    overwrite: bool = False
