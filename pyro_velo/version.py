"""The version, once: the build, `pyro-velo --version` and the `uns` of every result read it from here."""

from __future__ import annotations

__version__ = "0.1.0"
