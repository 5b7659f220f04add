"""``tokentrim adapters``: what is installed."""

from __future__ import annotations

import argparse

from tokentrim_hooks.api import adapters
from tokentrim_hooks.console import show_table
from tokentrim_hooks.plugins import AdapterInfo, installed_observers

HELP = "List the installed adapters and observers."


def configure(_parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim adapters`` takes: nothing."""


def run(_options: argparse.Namespace) -> int:
    """List installed adapters and observers, and those that cannot be used with the reason."""
    rows = [[info.name, _state(info), info.distribution, _models(info)] for info in adapters()]
    show_table(["adapter", "state", "from", "models, or why not"], rows)
    watchers = installed_observers()
    lines = [[w.name, "name taken" if w.error else "ready", w.distribution, w.error] for w in watchers]
    show_table(["observer", "state", "from", "why not"], lines)
    return 0


def _state(info: AdapterInfo) -> str:
    """One or two words: whether it takes part in detection."""
    if info.disabled:
        return "disabled"
    if info.shadowed:
        return "name taken"
    return "failed to load" if info.error else "ready"


def _models(info: AdapterInfo) -> str:
    return ", ".join(info.adapter.models) if info.adapter else info.error
