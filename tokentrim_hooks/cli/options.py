"""What several subcommands share: kinds of options, what an extra must bring, files of results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokentrim_hooks.extras import require
from tokentrim_hooks.report.files import made, told
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
    """Write strict JSON to the file that a user named, its folder made if absent; returns the path.

    Raises:
        ReportError: it cannot be written.
    """
    made(path.parent)
    with told(f"cannot write {path}"):
        path.write_text(as_json(values), encoding="utf-8")
    return path


def as_json(values: Any) -> str:
    """Strict JSON; what is not finite becomes null."""
    return json.dumps(finite(values), indent=2, allow_nan=False) + "\n"
