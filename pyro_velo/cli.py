"""The command line: options in, one call of `pyro_velo.api`, and one line on stderr where the input is at fault.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyro_velo.errors import FitError, InputError
from pyro_velo.options import (
    BASIS,
    COLOR,
    DEMO_FOLDER,
    GRID,
    CompareOptions,
    Counts,
    Device,
    FitOptions,
    LikelihoodName,
    RatesName,
    StatesName,
    TimesName,
    TranscriptionName,
)
from pyro_velo.version import __version__

if TYPE_CHECKING:
    from pyro_velo.fitting import Fit

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Data = Annotated[
    Path, typer.Argument(metavar="IN", exists=True, help="Spliced and unspliced counts: a file or folder.")
]
Result = Annotated[Path, typer.Argument(metavar="OUT.h5ad", exists=True, help="What `pyro-velo fit` wrote.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of every random number.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the way.")]
Basis = Annotated[str, typer.Option(help="The embedding, as in obsm['X_umap'].")]


def version(show: bool) -> None:
    """Print the version and stop, where `--version` asks for it."""
    if show:
        typer.echo(f"pyro-velo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Bayesian RNA velocity: from spliced and unspliced counts to velocities with their uncertainty."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where it goes.")] = DEMO_FOLDER,
) -> None:
    """Simulate, fit and report, to see it work.

    About two minutes on two cores.
    """
    from pyro_velo import api

    say_if_interrupted(api.demo(folder))
    typer.echo(f"Wrote {folder}")


@app.command()
def simulate(
    output: Annotated[Path, typer.Argument(metavar="OUT.h5ad", help="The AnnData to write, the truth in it.")],
    cells: Annotated[int, typer.Option(min=1, help="Number of cells.")],
    genes: Annotated[int, typer.Option(min=1, help="Number of genes.")],
    seed: Seed,
    likelihood: Annotated[Counts, typer.Option(help="Noise: Normal, or counts with library sizes.")] = "normal",
    stationary: Annotated[bool, typer.Option("--stationary", help="No dynamics at all: a null.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Simulate spliced and unspliced RNA from known kinetics."""
    from pyro_velo import api

    api.simulate_file(
        output, cells=cells, genes=genes, seed=seed, likelihood=likelihood, stationary=stationary, overwrite=overwrite
    )
    typer.echo(f"Wrote {output}")


@app.command()
def fit(
    data: Data,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.h5ad", help="The AnnData to write.")],
    as_is: Annotated[bool, typer.Option("--as-is", help="Fit the two layers as they stand: no preprocessing.")] = False,
    spliced_layer: Annotated[str | None, typer.Option(metavar="L", help="Default: spliced, or mature.")] = None,
    unspliced_layer: Annotated[str | None, typer.Option(metavar="L", help="Default: unspliced, or nascent.")] = None,
    draws: Annotated[int, typer.Option(min=2, help="Posterior draws.")] = FitOptions.draws,
    max_epochs: Annotated[int | None, typer.Option(min=1, help="Default: that of TrainSettings.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Cells a step. Default: that of TrainSettings.")] = None,
    seed: Seed = FitOptions.seed,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = FitOptions.device,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep checkpoints and the fit here.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", exists=True, help="Go on from a checkpoint.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a report as well.")] = None,
    nuclei: Annotated[
        bool, typer.Option("--nuclei", help="Single nuclei: more unspliced than spliced is fine.")
    ] = False,
    likelihood: Annotated[LikelihoodName, typer.Option(help="Of scaled layers, or of raw counts.")] = "normal",
    states: Annotated[StatesName, typer.Option(help="The posterior of the four states.")] = FitOptions.states,
    rates: Annotated[RatesName, typer.Option(help="The posterior of a gene's rates.")] = FitOptions.rates,
    times: Annotated[TimesName, typer.Option(help="A time per gene, per cell, or between.")] = FitOptions.times,
    transcription: Annotated[TranscriptionName, typer.Option(help="While a gene is on.")] = FitOptions.transcription,
    batch_key: Annotated[str | None, typer.Option(metavar="KEY", help="obs: experimental batches.")] = None,
    covariate: Annotated[list[str] | None, typer.Option(metavar="KEY", help="obs: category or number.")] = None,
    prior: Annotated[list[str] | None, typer.Option(metavar="'alpha=LogNormal(0, 1)'", help="Swap a prior.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit velocities, times and rates with their uncertainty."""
    from pyro_velo import api

    options = FitOptions(
        as_is=as_is,
        spliced_layer=spliced_layer,
        unspliced_layer=unspliced_layer,
        draws=draws,
        max_epochs=max_epochs,
        batch_size=batch_size,
        seed=seed,
        threads=threads,
        device=device,
        save=save,
        resume=resume,
        report=report,
        overwrite=overwrite,
        nuclei=nuclei,
        likelihood=likelihood,
        states=states,
        rates=rates,
        times=times,
        transcription=transcription,
        batch_key=batch_key,
        covariates=tuple(covariate or ()),
        priors=tuple(prior or ()),
    )
    say_if_interrupted(api.fit_file(data, output, options))
    typer.echo(f"Wrote {output}" if report is None else f"Wrote {output} and {report}")


@app.command()
def report(
    result: Result,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The HTML file to write.")],
    basis: Basis = BASIS,
    color: Annotated[str, typer.Option(help="The obs column that colours the cells.")] = COLOR,
    overwrite: Overwrite = False,
) -> None:
    """Write one self-contained HTML file about a fit."""
    from pyro_velo import api

    api.report_file(result, output, basis=basis, color=color, overwrite=overwrite)
    typer.echo(f"Wrote {output}")


@app.command()
def score(
    result: Result,
    clusters: Annotated[str, typer.Option(metavar="KEY", help="The obs column with the clusters.")],
    edges: Annotated[str, typer.Option(metavar='"A>B,C>D"', help="What becomes what; A>B,>C is A>B,A>C.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores here too.")] = None,
    basis: Basis = BASIS,
) -> None:
    """Score a fit against known transitions.

    CBDir in the embedding and in Ms space, ICCoh, and confidence.
    """
    pairs = parse_edges(edges)
    from pyro_velo import api

    scores = api.score_file(result, clusters, pairs, basis=basis, json=json_file)
    typer.echo(json.dumps(scores, indent=2))


@app.command()
def compare(
    data: Data,
    grid: Annotated[
        list[str], typer.Option(metavar="NAME=A,B", help=f"What to vary: {', '.join(GRID)}. Repeat it for all pairs.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores here too.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with pictures as well.")] = None,
    as_is: Annotated[bool, typer.Option("--as-is", help="Fit the two layers as they stand: no preprocessing.")] = False,
    max_epochs: Annotated[int | None, typer.Option(min=1, help="Default: that of TrainSettings.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Cells a step. Default: that of TrainSettings.")] = None,
    seed: Seed = CompareOptions.seed,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
    batch_key: Annotated[str | None, typer.Option(metavar="KEY", help="obs: experimental batches.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Say which model explains held-out cells best.

    Every combination is fitted and scored on the same cells. Likelihoods of scaled layers and of raw counts are
    judged apart.
    """
    options = CompareOptions(
        grid=parse_grid(grid),
        json=json_file,
        html=html,
        as_is=as_is,
        max_epochs=max_epochs,
        batch_size=batch_size,
        seed=seed,
        threads=threads,
        batch_key=batch_key,
        overwrite=overwrite,
    )
    from pyro_velo import comparing

    found = comparing.compare_file(data, options)
    typer.echo(found.table())
    if not any(found.choice.values()):
        raise FitError("Expected one fit or more that succeeds; every one failed, see the table.")


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values to try for each name, from texts such as "likelihood=nb,zinb".

    Raises `InputError` for an unknown name or value, listing the known ones, and for one given twice.

    >>> parse_grid(["likelihood=nb, zinb", "states=collapsed"])
    {'likelihood': ('nb', 'zinb'), 'states': ('collapsed',)}
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, rest = (part.strip() for part in text.partition("="))
        if name not in GRID:
            raise InputError(f"Expected a grid of {', '.join(GRID)}; got {text!r}. Write it as likelihood=nb,zinb.")
        values = tuple(value.strip() for value in rest.split(","))
        for value in values:
            if value not in GRID[name]:
                raise InputError(f"Expected {name} of {', '.join(GRID[name])}; got {value!r} in {text!r}. Name these.")
        if name in grid or len(set(values)) < len(values):
            raise InputError(f"Expected {name} once, with each value once; got {text!r}. Write it as {name}=a,b.")
        grid[name] = values
    return grid


def parse_edges(text: str) -> list[tuple[str, str]]:
    """The (source, target) pairs in "A>B,C>D"; a target alone goes on from the source before it.

    Names may hold spaces, but neither `>` nor `,`. Raises `InputError` where an edge can't be read.

    >>> parse_edges("Pre-endocrine>Alpha, >Beta, Ngn3 high EP>Pre-endocrine")
    [('Pre-endocrine', 'Alpha'), ('Pre-endocrine', 'Beta'), ('Ngn3 high EP', 'Pre-endocrine')]
    """
    pairs: list[tuple[str, str]] = []
    for edge in text.split(","):
        names = [name.strip() for name in edge.split(">")]
        if len(names) != 2 or not names[1]:
            raise InputError(f'Expected edges like "A>B,C>D"; got {edge.strip()!r} in {text!r}. Write one > an edge.')
        source, target = names[0] or (pairs[-1][0] if pairs else ""), names[1]
        if not source:
            raise InputError(f'Expected a source before the first > in {text!r}. Write it out, as in "A>B,>C".')
        if source == target or (source, target) in pairs:
            raise InputError(f"Expected each edge once, between two clusters; got {source}>{target}. Leave it out.")
        pairs.append((source, target))
    return pairs


def say_if_interrupted(fitted: Fit) -> None:
    """One line on stderr where Ctrl-C ended the training: what was written is the best that was found until then."""
    if fitted.interrupted:
        print(f"pyro-velo: interrupted at epoch {fitted.epochs}; kept the best parameters so far", file=sys.stderr)


def complain(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    print("pyro-velo: error:", " ".join(message.split()), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 1 for a fit that failed, 2 for bad input, 130 for Ctrl-C.

    Ctrl-C during the training is none of these: it ends the training, and the result is written.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="pyro-velo", standalone_mode=False)
    except typer.TyperException as error:
        complain(f"{error.format_message()} (see pyro-velo --help)")
        return BAD_INPUT
    except (InputError, OSError, MemoryError) as error:
        complain(str(error))
        return BAD_INPUT
    except FitError as error:
        complain(str(error))
        return FAILED
    # typer turns Ctrl-C into this code, without a word.
    if code == INTERRUPTED:
        print("pyro-velo: interrupted", file=sys.stderr)
    return code or 0
