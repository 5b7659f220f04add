"""The adapters of the plugins for engines in ``examples/``, which no distribution of ours installs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from tokentrim_hooks import Adapter

EXAMPLES = Path(__file__).parents[1] / "examples"


def engine_adapters() -> dict[str, type[Adapter[Any]]]:
    """Their classes by name. They import no engine until a model is patched."""
    found = {}
    for file in sorted(EXAMPLES.glob("**/adapter.py")):
        package = file.parent
        if str(package.parent) not in sys.path:
            sys.path.append(str(package.parent))
        home = importlib.import_module(f"{package.name}.adapter")
        found |= {kind.name: kind for kind in home.tokentrim_adapters()}
    return found
