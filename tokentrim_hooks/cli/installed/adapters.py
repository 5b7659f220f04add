"""``tokentrim adapters``: what is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokentrim_hooks.cli.options import STANDARD_OUTPUT, json_option, ready_file, write_json
from tokentrim_hooks.console import show_table

if TYPE_CHECKING:
    from tokentrim_hooks.loading import AdapterInfo, ObserverInfo


@click.command()
@json_option
def adapters(file: Path | None) -> None:
    """List the installed adapters and observers.

    Those that cannot be used are listed with the reason.
    """
    from tokentrim_hooks.api import adapters as installed
    from tokentrim_hooks.plugins import installed_observers

    out = ready_file(file)
    models: list[dict[str, Any]] = [
        {"name": i.name, "state": _state(i), "from": i.distribution, "models": _models(i), "why": i.error}
        for i in installed()
    ]
    watchers = [
        {"name": w.name, "state": state, "from": w.distribution, "why": why}
        for w in installed_observers()
        for state, why in (_state_of_observer(w),)
    ]
    if file is not None:
        write_json(out, {"adapters": models, "observers": watchers})
    if file != STANDARD_OUTPUT:
        rows = [[m["name"], m["state"], m["from"], ", ".join(m["models"]) or m["why"]] for m in models]
        show_table(["adapter", "state", "from", "models, or why not"], rows)
        show_table(["observer", "state", "from", "why not"], [list(w.values()) for w in watchers])


def _state(info: AdapterInfo) -> str:
    """One or two words: whether it takes part in detection."""
    if info.disabled:
        return "disabled"
    if info.shadowed:
        return "name taken"
    return "failed to load" if info.error else "ready"


def _state_of_observer(info: ObserverInfo) -> tuple[str, str]:
    """One or two words, and what can be done where it cannot be asked for."""
    if info.error:
        return "name taken", info.error
    if info.missing:
        return "not installed", f"needs {' and '.join(info.missing)}: pip install {' '.join(info.missing)}"
    return "ready", ""


def _models(info: AdapterInfo) -> list[str]:
    return list(info.adapter.models) if info.adapter else []
