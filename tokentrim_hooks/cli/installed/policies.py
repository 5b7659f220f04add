"""``tokentrim policies``: which methods are installed, and what each of them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tokentrim_hooks.cli.options import STANDARD_OUTPUT, json_option, ready_file, write_json
from tokentrim_hooks.console import show_table


@click.command()
@json_option
def policies(file: Path | None) -> None:
    """List the installed policies.

    Plugins that failed to load are listed below them: a policy that is missing may be theirs.
    """
    from tokentrim_hooks.api import policies as installed
    from tokentrim_hooks.plugins import left_out

    out = ready_file(file)
    known: list[dict[str, Any]] = [
        {"name": p.name, "hooks": list(p.hooks), "from": p.distribution, "summary": p.summary, "why": p.error}
        for p in installed()
    ]
    broken = [{"name": i.name, "from": i.distribution, "why": i.error} for i in left_out() if not i.shadowed]
    if file is not None:
        write_json(out, {"policies": known, "failed": broken})
    if file != STANDARD_OUTPUT:
        rows = [[p["name"], "name taken" if p["why"] else ", ".join(p["hooks"]), p["from"], p["why"] or p["summary"]]
                for p in known]  # fmt: skip
        show_table(["policy", "hooks", "from", "what it does, or why not"], rows)
        if broken:
            show_table(["plugin", "from", "why it failed to load"], [list(b.values()) for b in broken])
