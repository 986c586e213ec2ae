"""A run on disk: tensors in one safetensors file, everything else as JSON in its header; never a pickle.

The file is written under a temporary name and renamed, so that what stands there is always one whole checkpoint.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from pyro_velo.errors import InputError
from pyro_velo.forensics import NonFiniteError
from pyro_velo.schedule import Plateau
from pyro_velo.train import History, Training, TrainSettings

FILE = "checkpoint.safetensors"
BESIDE = "checkpoint.json"
FAILURE = "failure.json"
FORMAT = 1


def check_folder(folder: str | Path, *, overwrite: bool) -> Path:
    """The folder, if a fit may be kept there; raises `InputError` for a file and, unless `overwrite`, a fit."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Expected a folder to keep the fit in; got the file {folder}. Name another.")
    if (folder / FILE).exists() and not overwrite:
        raise InputError(f"{folder} holds a fit already; name another folder, or pass overwrite to replace it.")
    return folder


def is_same(folder: Path | None, other: Path | None) -> bool:
    """Whether two paths name one folder: what is kept where it is gone on from replaces no other fit."""
    return folder is not None and other is not None and folder.resolve() == other.resolve()


def save(training: Training, folder: str | Path, *, about: dict[str, Any] | None = None) -> None:
    """Write the state of a run to `folder` (made if missing), whole or not at all; `about` is any JSON to keep with it.

    `checkpoint.json` beside it holds the same words, to read; only the safetensors file is read back.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, optimizer = _flatten(training)
    header = {
        "format": FORMAT,
        "settings": asdict(training.settings),
        "epoch": training.epoch,
        "history": asdict(training.history),
        "plateau": asdict(training.plateau),
        "optimizer": optimizer,
        "about": about or {},
    }
    text = json.dumps(header)
    partial = folder / f".{FILE}.{os.getpid()}.partial"
    try:
        save_file(tensors, partial, metadata={"pyro_velo": text})
        put_in_place(partial, folder / FILE)
        partial.write_text(json.dumps({k: v for k, v in header.items() if k != "optimizer"}, indent=1))
        put_in_place(partial, folder / BESIDE)
        (folder / FAILURE).unlink(missing_ok=True)
    finally:
        partial.unlink(missing_ok=True)


def load(folder: str | Path) -> tuple[Training, dict[str, Any]]:
    """The state of a run, and what was said about it.

    Raises `InputError` where there is no checkpoint, a damaged one, or one of another format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"Expected a checkpoint at {path}; found none. Give the folder it was saved to.")
    try:
        # Read at once: safetensors opens a path twice, between which a run that still saves can put another file there.
        content = path.read_bytes()
        tensors = load_tensors(content)
        # The format: the length of a JSON header in 8 bytes, and that header.
        words = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header = json.loads(words.get("__metadata__", {}).get("pyro_velo", "{}"))
        found = header.get("format")
        training = _training(header, tensors) if found == FORMAT else None
    # A file of another program can hold anything under these names.
    except (SafetensorError, json.JSONDecodeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a checkpoint that can be read ({error}). Start again without it.") from error
    if training is None:
        raise InputError(
            f"Expected a checkpoint of format {FORMAT} at {path}; got {found}. "
            "Use the version of pyro_velo that wrote it, or start again without it."
        )
    return training, header["about"]


def note_failure(error: NonFiniteError, folder: str | Path) -> None:
    """Write beside the last good checkpoint, if there is one, where a run met NaN; the next `save` takes it away."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    epoch = load(folder)[0].epoch if (folder / FILE).is_file() else None
    told = {"what": error.culprit.what, "step": error.step, "gene": error.gene_or_number, "checkpoint_epoch": epoch}
    partial = folder / f".{FAILURE}.{os.getpid()}.partial"
    partial.write_text(json.dumps(told))
    put_in_place(partial, folder / FAILURE)


def failure(folder: str | Path) -> dict[str, Any] | None:
    """What `note_failure` wrote; None where the last run of a folder did not end in NaN.

    Raises `InputError` for a file that holds anything else.
    """
    path = Path(folder) / FAILURE
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}). Remove it.") from error
    if not isinstance(told, dict) or set(told) != {"what", "step", "gene", "checkpoint_epoch"}:
        raise InputError(f"Expected what, step, gene and checkpoint_epoch in {path}; got {told!r}. Remove it.")
    return told


def _training(header: dict[str, Any], tensors: dict[str, Tensor]) -> Training:
    """The state that the words and the tensors of a file stand for."""
    known = {field.name for field in fields(TrainSettings)}
    return Training(
        settings=TrainSettings(**{name: value for name, value in header["settings"].items() if name in known}),
        epoch=header["epoch"],
        # Looks were compared by the ELBO itself before they were by an objective.
        history=History(**{"objective": header["history"]["held_out"], **header["history"]}),
        plateau=Plateau(**header["plateau"]),
        best=_part(tensors, "best"),
        parameters=_part(tensors, "parameters"),
        optimizer=_optimizer(header["optimizer"], tensors),
    )


def _flatten(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by a path, and the optimiser's state with its tensors taken out."""
    tensors = {f"best/{name}": value.contiguous() for name, value in training.best.items()}
    # Where the best parameters are the present ones, as at the start, safetensors wants them twice all the same.
    tensors |= {f"parameters/{name}": value.clone().contiguous() for name, value in training.parameters.items()}
    rest: dict[str, Any] = {}
    for name, state in training.optimizer.items():
        slots = state["state"].get(0, {})
        tensors |= {f"optimizer/{slot}/{name}": v.contiguous() for slot, v in slots.items() if torch.is_tensor(v)}
        rest[name] = {
            "slots": {slot: value for slot, value in slots.items() if not torch.is_tensor(value)},
            "groups": state["param_groups"],
        }
    return tensors, rest


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def _optimizer(rest: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The optimiser's state, its tensors put back."""
    state: dict[str, Any] = {}
    for name, parts in rest.items():
        found = dict(parts["slots"])
        for slot in ("exp_avg", "exp_avg_sq"):
            if f"optimizer/{slot}/{name}" in tensors:
                found[slot] = tensors[f"optimizer/{slot}/{name}"]
        groups = [{**group, "betas": tuple(group["betas"])} for group in parts["groups"]]
        state[name] = {"state": {0: found} if found else {}, "param_groups": groups}
    return state


def put_in_place(partial: Path, path: Path) -> None:
    """Put a finished file in its place: on the disk first, then renamed."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
