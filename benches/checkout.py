"""Makes a checkout importable that is not installed: ``fastmem`` and, where it lives beside it, ``fastmem.kernels``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if find_spec("fastmem") is None:
    sys.path.insert(0, str(ROOT))

import fastmem  # noqa: E402

if find_spec("fastmem.kernels") is None:
    # an installation maps kernels/ into the package; without one the package looks into the root as well
    fastmem.__path__.append(str(ROOT))
