"""What several subcommands share: kinds of options, what an extra must bring, files of results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokentrim_hooks.extras import require
from tokentrim_hooks.report.record import finite


def positive(text: str) -> int:
    """An option's whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def need(*modules: str, extra: str = "demo") -> None:
    """See that all ``modules`` are there before anything is computed.

    Raises:
        MissingExtraError: one is not, and which extra brings it.
    """
    for module in modules:
        require(module, extra)


def write_json(path: Path, values: Any) -> Path:
    """Write strict JSON, the folder made if absent; what is not finite becomes null. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
