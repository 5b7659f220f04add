"""What a result was made with, so that it can be made again: the same dictionary in every log, table and page."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version

import torch


def versions() -> dict[str, str]:
    """Versions of Python, torch, this package, and of libraries for such models, as far as they are in use."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokentrim-hooks": version("tokentrim-hooks"),
        "machine": platform.machine(),
    }
    for name in ("diffusers", "transformers", "fastvideo"):
        if name in sys.modules:
            found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return found
