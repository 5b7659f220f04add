"""``tokentrim run``: what it takes, what it prints."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tokentrim_hooks.cli.options import FOLDER, SEED, need
from tokentrim_hooks.cli.page import PAGE, page_of
from tokentrim_hooks.cli.script.folders import claimed, ended
from tokentrim_hooks.cli.script.options import SCRIPT, patching, script
from tokentrim_hooks.cli.status import INTERRUPTED
from tokentrim_hooks.console import say
from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.extras import is_installed

if TYPE_CHECKING:
    from tokentrim_hooks.cli.script.runner import Run
    from tokentrim_hooks.cli.script.target import Target


@click.command(context_settings=SCRIPT)
@click.option("--out", type=FOLDER, default="runs/tokentrim", show_default=True,
              help="Folder of the log and the report; numbered where an earlier run has it.")  # fmt: skip
@patching
@click.option("--observe", is_flag=True, help="Measure only; output stays bit-identical.")
@click.option("--observer", multiple=True, metavar="NAME", help="An installed observer, by name; repeatable.")
@click.option("--seed", type=SEED, metavar="N", help="Seed Python, NumPy and torch before the script begins.")
@click.option("--unpatched", is_flag=True, help="Patch nothing: the same run, for comparison.")
@click.option("--quiet", is_flag=True, help="No progress line per chunk.")
@click.option("--no-thumbnails", is_flag=True, help="No pictures of latents.")
@script
def run(out: Path, script: str, is_module: bool, arguments: tuple[str, ...], **flags: Any) -> int:
    """Run an unmodified inference script, patched.

    Every known model is patched as it is constructed. What stands behind SCRIPT belongs to the script. The report is
    written also when the script crashes or is stopped. The status is the script's, or 1 if no model was patched.
    """
    from tokentrim_hooks.cli.script.choices import Choices
    from tokentrim_hooks.cli.script.runner import Run
    from tokentrim_hooks.cli.script.target import Target, seed_all

    choices, target = Choices.of(flags), Target.of(script, arguments, is_module)
    if flags["seed"] is not None:
        seed_all(flags["seed"])
    if flags["unpatched"]:
        return target.run()
    thumbnails = not flags["no_thumbnails"] and is_installed("PIL") and is_installed("numpy")
    folder = claimed(out, shlex.join(["tokentrim", *sys.argv[1:]]))
    # A script may change the folder that it works in: the log stays where it was asked for.
    this = Run(folder.absolute(), choices.policies, choices.probe, flags["quiet"], choices.observers, thumbnails)
    return _watched(target, this)


def _watched(target: Target, this: Run) -> int:
    """Run it, then say what became of it, whatever ended it."""
    status, begun_in = 0, Path.cwd()
    try:
        status = this.over(target)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):  # what Python prints at its end, but above what we say of it
            say(str(end.code))
        raise SystemExit(_over_all(this, status)) from end
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    finally:
        _say_what_happened(this, status, begun_in)
        _note_the_end(this)
    return _over_all(this, status)


def _over_all(this: Run, status: int) -> int:
    """The script's own status; 1 where that is 0 and no model was patched, which a fork leaves to its parent."""
    return status or int(not this.handles and os.getpid() == this.process)


def _note_the_end(this: Run) -> None:
    """Where that cannot be written, on a full disk, the script's own status and output are not touched by it."""
    if os.getpid() == this.process:
        try:
            ended(this.folder)
        except TokenTrimError as failure:
            say(f"tokentrim run: {failure}")


def _say_what_happened(this: Run, status: int, begun_in: Path) -> None:
    """Summaries and report pages of all models that were patched, or why none was; a fork leaves that to its parent."""
    if os.getpid() != this.process:
        return
    for handle in this.handles:
        say(handle.report.summary())
    if not this.handles:
        say(f"tokentrim run: no model was patched: {this.why_none(status)}")
    for log in this.logs:
        try:
            need(*PAGE, extra="report")  # here, for a run takes none of it
            page = page_of(log.path)
            say(f"report: {page.relative_to(begun_in) if page.is_relative_to(begun_in) else page}")
        except TokenTrimError as failure:
            say(f"no report page: {failure}")
