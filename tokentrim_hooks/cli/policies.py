"""``tokentrim policies``: which methods are installed, and what each of them does."""

from __future__ import annotations

import argparse

from tokentrim_hooks.api import policies
from tokentrim_hooks.console import show_table
from tokentrim_hooks.plugins import left_out

HELP = "List the installed policies."


def configure(_parser: argparse.ArgumentParser) -> None:
    """Declare what ``tokentrim policies`` takes: nothing."""


def run(_options: argparse.Namespace) -> int:
    """List installed policies, then plugins that failed to load: a missing policy may be theirs."""
    rows = [[p.name, "name taken" if p.error else ", ".join(p.hooks), p.distribution, p.error or p.summary]
            for p in policies()]  # fmt: skip
    show_table(["policy", "hooks", "from", "what it does, or why not"], rows)
    broken = [[info.name, info.distribution, info.error] for info in left_out() if not info.shadowed]
    if broken:
        show_table(["plugin", "from", "why it failed to load"], broken)
    return 0
