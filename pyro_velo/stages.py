"""A fit that is made of several trainings, kept on disk as it runs, so that it can be gone on with to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyro.infer import ELBO

from pyro_velo import checkpoint
from pyro_velo.batch import Data
from pyro_velo.errors import InputError
from pyro_velo.models.base import Guide, Model
from pyro_velo.train import Fitted, Training, TrainSettings, train

FOLDER = "stages"


@dataclass(frozen=True)
class Stages:
    """Where the trainings of a fit are kept (`write`) and gone on with (`read`); None: not at all.

    Each has a folder of its own below `stages`, a checkpoint in it for every look at the held-out cells. `about` is any
    JSON that two runs must share to be the same.
    """

    write: Path | None = None
    read: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def train(
        self,
        name: str,
        model: Model,
        guide: Guide,
        cells: Data,
        *,
        settings: TrainSettings,
        elbo: ELBO,
        progress: bool | None,
    ) -> Fitted:
        """As `train.train`, going on from where the stage `name` stopped; one that is done is only read.

        Raises `InputError` for a stage of another run: the settings, seed included, and `about` must be the same.
        """

        def looked(state: Training) -> None:
            if self.write is not None:
                checkpoint.save(state, self.write / FOLDER / name, about=dict(self.about))

        return train(
            model,
            guide,
            cells,
            settings=settings,
            elbo=elbo,
            resume=self._resumed(name, settings),
            on_evaluation=looked,
            progress=progress,
        )

    def _resumed(self, name: str, settings: TrainSettings) -> Training | None:
        folder = None if self.read is None else self.read / FOLDER / name
        if folder is None or not (folder / checkpoint.FILE).is_file():
            return None
        training, about = checkpoint.load(folder)
        was, wanted = about | asdict(training.settings), {**self.about, **asdict(settings)}
        for key in wanted:
            if was.get(key) != wanted[key]:
                raise InputError(
                    f"Expected {key} as in the run that {self.read} holds, {_short(was.get(key))}; "
                    f"got {_short(wanted[key])}. Give the same data, parts, settings and seed, or start anew."
                )
        return training

    def clear(self) -> None:
        """Remove the stages that are kept, and nothing else: a fit that is done has no use for them."""
        if self.write is None:
            return
        folder = self.write / FOLDER
        for stage in [path.parent for path in folder.glob(f"*/{checkpoint.FILE}")]:
            for name in (checkpoint.FILE, checkpoint.BESIDE, checkpoint.FAILURE):
                (stage / name).unlink(missing_ok=True)
            _remove_empty(stage)
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def check_stages(folder: str | Path) -> Path:
    """The folder, if a fit can be gone on with from it; raises `InputError` where no stage of one is kept."""
    folder = Path(folder)
    if not any((folder / FOLDER).glob(f"*/{checkpoint.FILE}")):
        done = " It holds a fit that is done: load it." if (folder / checkpoint.FILE).is_file() else ""
        raise InputError(f"Expected the stages of a fit below {folder}, to go on from; found none.{done} Start anew.")
    return folder


def _short(value: Any, length: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."
