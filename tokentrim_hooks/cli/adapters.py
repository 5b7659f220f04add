"""``tokentrim adapters``: what is installed."""

from __future__ import annotations

import argparse

from tokentrim_hooks.api import adapters
from tokentrim_hooks.console import show_table
from tokentrim_hooks.plugins import installed_observers

HELP = "List the installed adapters and observers."


def configure(_parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim adapters`` takes: nothing."""


def run(_options: argparse.Namespace) -> int:
    """List installed adapters and observers, and plugins that failed to load with the reason."""
    rows = []
    for info in adapters():
        state = (info.error and "failed to load") or ("disabled" if info.disabled else "ready")
        models = ", ".join(info.adapter.models) if info.adapter else info.error
        rows.append([info.name, state, info.distribution, models])
    show_table(["adapter", "state", "from", "models"], rows)
    show_table(["observer", "from"], [[info.name, info.distribution] for info in installed_observers()])
    return 0
