"""Compiling is a matter of speed: where it can't be had, or doesn't pay, nothing else changes."""

from __future__ import annotations

import pytest
import torch

from pyro_velo import compiled as module
from pyro_velo.compiled import compiled

CPU = torch.device("cpu")


def double(x):
    return 2 * x


# What torch says of itself when its compiler is loaded is its own affair.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_little_work_is_not_worth_it():
    assert compiled(double, module.WORTH_COMPILING - 1, CPU) is double
    assert compiled(double, module.WORTH_COMPILING, CPU) is not double or not module.shutil.which("g++")


def test_without_a_compiler_the_function_stays(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    assert compiled(double, module.WORTH_COMPILING, CPU) is double


def test_a_failure_is_told_once_and_costs_speed_alone(monkeypatch):
    def broken(_):
        raise RuntimeError("no headers here\nand a long story")

    monkeypatch.setattr(module.shutil, "which", lambda _: "/usr/bin/g++")
    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    function = compiled(double, module.WORTH_COMPILING, CPU)
    with pytest.warns(UserWarning, match=r"torch.compile failed.*no headers here$"):
        assert function(3) == 6
    assert function(4) == 8
