"""Checkpoints: whole or not at all, no pickles, and the state to the bit."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import differing, settings, small_fit

from pyro_velo import checkpoint
from pyro_velo.errors import InputError
from pyro_velo.train import History, Training

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def states() -> list[Training]:
    """The states of a run, one a look at the held-out cells."""
    kept: list[Training] = []
    small_fit(on_evaluation=kept.append)
    return kept


def test_what_is_loaded_is_what_was_saved(states, tmp_path):
    checkpoint.save(states[-1], tmp_path / "a" / "b", about={"genes": ["Sox9", "Ins1"]})
    loaded, about = checkpoint.load(tmp_path / "a" / "b")
    assert differing(loaded, states[-1]) == []
    assert about == {"genes": ["Sox9", "Ins1"]}
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["checkpoint.json", "checkpoint.safetensors"]


@pytest.mark.parametrize("stop", [0, 2, 6])
def test_a_run_goes_on_from_a_file_as_if_it_had_not_stopped(states, tmp_path, stop):
    checkpoint.save(states[stop], tmp_path)
    loaded, _ = checkpoint.load(tmp_path)
    assert differing(small_fit(resume=loaded).training, states[-1]) == []


def test_the_start_of_a_run_is_a_state_too(tmp_path):
    # As Ctrl-C leaves it before the first look at the held-out cells: no optimiser has a state yet.
    first = small_fit(settings=settings(max_epochs=1))
    start = Training(first.training.settings, best=first.training.best, parameters=first.training.parameters)
    checkpoint.save(start, tmp_path)
    assert differing(checkpoint.load(tmp_path)[0], start) == []


def test_the_words_beside_it_are_those_within(states, tmp_path):
    checkpoint.save(states[2], tmp_path, about={"model": "M"})
    beside = json.loads((tmp_path / checkpoint.BESIDE).read_text())
    assert beside["epoch"] == 3 and beside["about"] == {"model": "M"}
    assert beside["settings"]["batch_size"] == 13 and len(beside["history"]["train"]) == 3


def test_a_checkpoint_is_no_pickle(states, tmp_path, monkeypatch):
    checkpoint.save(states[0], tmp_path)
    for file in tmp_path.iterdir():
        assert not file.read_bytes().startswith(b"\x80") and b"torch._utils" not in file.read_bytes()
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(file.read_bytes())
    # Nor is one ever opened: with the machinery gone, a checkpoint is read as before.
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    checkpoint.load(tmp_path)


def test_a_pickle_in_its_place_is_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / checkpoint.FILE).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match="not a checkpoint that can be read"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "sprung").exists()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("once upon a time")


def foreign(path: Path) -> None:
    save_file({"weights": torch.zeros(3)}, path)


def broken_words(path: Path) -> None:
    save_file({"weights": torch.zeros(3)}, path, metadata={"pyro_velo": "{"})


def no_object(path: Path) -> None:
    save_file({"weights": torch.zeros(3)}, path, metadata={"pyro_velo": "[1]"})


def another_format(path: Path) -> None:
    save_file({"weights": torch.zeros(3)}, path, metadata={"pyro_velo": '{"format": 99}'})


def words_missing(path: Path) -> None:
    save_file({"weights": torch.zeros(3)}, path, metadata={"pyro_velo": '{"format": 1}'})


@pytest.mark.parametrize(
    "spoil", [truncated, empty, text, foreign, broken_words, no_object, another_format, words_missing, Path.unlink]
)
def test_what_is_no_checkpoint_is_refused(states, tmp_path, spoil):
    checkpoint.save(states[0], tmp_path)
    spoil(tmp_path / checkpoint.FILE)
    with pytest.raises(InputError, match=str(tmp_path)) as told:
        checkpoint.load(tmp_path)
    assert "\n" not in str(told.value)


# kill -9

# What a save does, one call after another.
STEPS = ("save_file", "fsync", "replace", "write_text", "fsync again", "replace again")
DYING = """
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
import torch
import pyro_velo.checkpoint as checkpoint
from pyro_velo.train import Training, TrainSettings

count = deadly = 0

def counted(function):
    def wrapper(*arguments, **options):
        global count
        count += 1
        if count == deadly:
            # Half of what was to be written is there when it dies.
            if function is whole_file:
                Path(arguments[1]).write_bytes(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return wrapper

def state(epoch):
    values = {"w": torch.full((1000,), float(epoch))}
    return Training(TrainSettings(), epoch=epoch, best=values, parameters={"w": values["w"].clone()})

whole_file = checkpoint.save_file
for folder in sys.argv[1:]:
    checkpoint.save(state(1), folder)
    deadly += 1
    child = os.fork()
    if child == 0:
        checkpoint.save_file = counted(whole_file)
        os.fsync, os.replace, Path.write_text = counted(os.fsync), counted(os.replace), counted(Path.write_text)
        checkpoint.save(state(2), folder)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_kill_9_at_any_point_of_a_save_loses_nothing(tmp_path):
    """Dying before the rename leaves the state before, after it the new one; never anything between."""
    folders = [str(tmp_path / step) for step in STEPS]
    done = subprocess.run(
        [sys.executable, "-c", DYING, *folders], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(STEPS), done.stderr
    for number, step in enumerate(STEPS, start=1):
        loaded, _ = checkpoint.load(tmp_path / step)
        assert loaded.epoch == (1 if number <= STEPS.index("replace") + 1 else 2), step
        assert (loaded.parameters["w"] == loaded.epoch).all() and (loaded.best["w"] == loaded.epoch).all()


SAVING = DYING.partition("count = ")[0] + DYING.partition("    return wrapper\n")[2].partition("whole_file")[0]
SAVING += """
epoch = 0
while True:
    epoch += 1
    checkpoint.save(state(epoch), sys.argv[1])
"""


def test_kill_9_at_random_moments_loses_nothing(tmp_path):
    """A process that does nothing but save is read while it writes, and killed; the file is always whole."""
    for wait in (0.0, 0.013):
        process = subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path / "run")], cwd=ROOT)
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "run" / checkpoint.FILE).exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            for _ in range(20):
                loaded, _ = checkpoint.load(tmp_path / "run")
                assert (loaded.parameters["w"] == loaded.epoch).all()
            time.sleep(wait)
        finally:
            process.kill()
            process.wait()
        loaded, _ = checkpoint.load(tmp_path / "run")
        assert (loaded.best["w"] == loaded.epoch).all() and loaded.epoch >= 1
        (tmp_path / "run" / checkpoint.FILE).unlink()


def test_an_error_while_saving_leaves_the_checkpoint_before_and_no_rest(states, tmp_path, monkeypatch):
    checkpoint.save(states[0], tmp_path)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(states[1], tmp_path)
    assert differing(checkpoint.load(tmp_path)[0], states[0]) == []
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", "checkpoint.safetensors"]


def test_floats_are_kept_to_the_bit_nan_and_infinity_among_them(states, tmp_path):
    history = History([1, 2, 3], [float("-inf"), 0.1 + 0.2, 1e-310], [float("nan")] * 3, [1 / 3] * 3)
    state = replace(states[-1], history=history)
    checkpoint.save(state, tmp_path)
    assert differing(checkpoint.load(tmp_path)[0], state) == []
