"""The arguments and options that several commands of the command line have, and what all that fit say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyro_velo.options import LibraryName, LikelihoodName, RatesName, StatesName, TimesName, TranscriptionName

if TYPE_CHECKING:
    from pyro_velo.autoencoding import ProfileFit
    from pyro_velo.fitting import Fit

Data = Annotated[
    Path, typer.Argument(metavar="IN", exists=True, help="Spliced and unspliced counts: a file or folder.")
]
Result = Annotated[Path, typer.Argument(metavar="OUT.h5ad", exists=True, help="What `pyro-velo fit` wrote.")]
Kept = Annotated[Path, typer.Argument(metavar="FOLDER", exists=True, help="What `fit --save` kept.")]
Fitted = Annotated[Path, typer.Argument(metavar="IN", exists=True, help="The AnnData that this fit wrote.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random number.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the way.")]
Draws = Annotated[int, typer.Option(min=2, help="Posterior draws.")]
MaxEpochs = Annotated[int | None, typer.Option(min=1, help="Default: that of TrainSettings.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Cells a step. Default: that of TrainSettings.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: one a core.")]
Save = Annotated[Path | None, typer.Option(metavar="DIR", help="Keep checkpoints and the fit here.")]
Resume = Annotated[Path | None, typer.Option(metavar="DIR", exists=True, help="Go on from a checkpoint.")]
Likelihood = Annotated[LikelihoodName, typer.Option(help="Of scaled layers, or of raw counts.")]
States = Annotated[StatesName, typer.Option(help="The posterior of the four states.")]
Rates = Annotated[RatesName, typer.Option(help="The posterior of a gene's rates.")]
Times = Annotated[TimesName, typer.Option(help="A time per gene, per cell, or between.")]
Transcription = Annotated[TranscriptionName, typer.Option(help="While a gene is on.")]
Library = Annotated[LibraryName, typer.Option(help="Library sizes of counts, as they are said to be or inferred.")]
BatchKey = Annotated[str | None, typer.Option(metavar="KEY", help="obs: experimental batches.")]
Covariates = Annotated[list[str] | None, typer.Option("--covariate", metavar="KEY", help="obs: category or number.")]
PriorTexts = Annotated[
    list[str] | None, typer.Option("--prior", metavar="'alpha=LogNormal(0, 1)'", help="Swap a prior.")
]
OnDisk = Annotated[
    bool | None,
    typer.Option("--on-disk/--in-memory", help="Where cells stay. Default: by the file's size and the memory."),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here too.")]
Clusters = Annotated[str, typer.Option(metavar="KEY", help="The obs column with the clusters.")]
Basis = Annotated[str, typer.Option(help="The embedding, as in obsm['X_umap'].")]


def say_if_interrupted(fitted: Fit | ProfileFit) -> None:
    """One line on stderr where Ctrl-C ended the training: what was written is the best that was found until then."""
    if fitted.interrupted:
        print(f"pyro-velo: interrupted at epoch {fitted.epochs}; kept the best parameters so far", file=sys.stderr)
