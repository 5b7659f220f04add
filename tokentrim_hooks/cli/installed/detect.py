"""``tokentrim detect``: what every adapter makes of a model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click

from tokentrim_hooks.cli.options import STANDARD_OUTPUT, json_option, ready_file, write_json
from tokentrim_hooks.console import show_table
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.extras import imported, in_short


@click.command()
@click.argument("model", metavar="PACKAGE.MODULE:FACTORY")
@json_option
def detect(model: str, file: Path | None) -> int:
    """Ask every adapter whether it recognises a model, and why.

    FACTORY is a function or class that makes the model, or the model itself; the current folder is looked at, too.
    The status is 0 if exactly one adapter recognises it, else 1.
    """
    from tokentrim_hooks import api

    out = ready_file(file)
    found = sorted(api.detect(make_model(model)), key=lambda item: not item.matches)
    if file is not None:
        keys = ("adapter", "matches", "distribution", "reason")
        write_json(out, [{key: getattr(item, key) for key in keys} for item in found])
    if file != STANDARD_OUTPUT:
        rows = [[item.adapter, "yes" if item.matches else "no", item.distribution, item.reason] for item in found]
        show_table(["adapter", "recognised", "from", "reason"], rows)
    return 0 if sum(item.matches for item in found) == 1 else 1


def make_model(target: str) -> Any:
    """Import ``package.module:name`` (current folder included) and call it if it is a function or class.

    Raises:
        TokenTrimError: the target is not of that form, or not to be imported, or fails when it is called.
    """
    found = imported(target)
    if not (inspect.isroutine(found) or inspect.isclass(found)):
        return found
    try:
        made = found()
    except (Exception, SystemExit) as failure:
        words = f"{target} cannot be called without arguments: {in_short(failure)}"
        raise TokenTrimError(f"{words}.\nName a function that makes the whole model by itself.") from failure
    if made is None:
        raise TokenTrimError(f"{target} returns None, which is no model; return the model from it")
    return made
