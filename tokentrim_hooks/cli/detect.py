"""``tokentrim detect``: what every adapter makes of a model."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from tokentrim_hooks import api
from tokentrim_hooks.console import show_table
from tokentrim_hooks.extras import imported

HELP = "Ask every adapter whether it recognises a model, and why."


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim detect`` takes."""
    parser.add_argument(
        "model", metavar="PACKAGE.MODULE:FACTORY", help="a function or class that makes the model, or the model itself"
    )


def run(options: argparse.Namespace) -> int:
    """Print what every adapter says of a model; status 0 if exactly one recognises it, else 1."""
    found = api.detect(make_model(options.model))
    rows = [[item.adapter, "yes" if item.matches else "no", item.distribution, item.reason] for item in found]
    show_table(["adapter", "recognised", "from", "reason"], rows)
    return 0 if sum(item.matches for item in found) == 1 else 1


def make_model(target: str) -> Any:
    """Import ``package.module:name`` (current folder included) and call it if it is a function or class.

    Raises:
        TokenTrimError: the target is not of that form, or not to be imported.
    """
    found = imported(target)
    return found() if inspect.isroutine(found) or inspect.isclass(found) else found
