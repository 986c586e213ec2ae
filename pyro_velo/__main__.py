"""`python -m pyro_velo`, the same as `pyro-velo`."""

from __future__ import annotations

import sys

from pyro_velo.cli import main

sys.exit(main())
