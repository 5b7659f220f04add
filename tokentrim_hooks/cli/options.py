"""What several subcommands share: kinds of options, checks before any work, files of results."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from tokentrim_hooks.extras import require_all
from tokentrim_hooks.report.files import made, told, write

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Named(click.Path):
    """A path. click's own lets an empty one pass, as an unset variable of a shell leaves it: the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if not str(value):
            self.fail("the name is empty; give one", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = Named(path_type=Path)
"""A folder to write into; whether that can be done is seen by :func:`ready_folder`."""
STANDARD_OUTPUT = Path("-")


SEED = click.IntRange(-(2**63), 2**63 - 1)
"""What torch takes as a seed."""


def whole(*names: str, least: int = 1, most: int = 10**6, **more: Any) -> Callable[[Decorated], Decorated]:
    """An option that is a whole number from ``least`` to ``most``, which nobody can wait for."""

    def checked(_context: click.Context, _option: click.Parameter, value: int | None) -> int | None:
        if value is not None and value < least:
            raise click.BadParameter(f"must be at least {least}, got {value}")
        if value is not None and value > most:
            raise click.BadParameter(f"must be at most {most}, got {value}")
        return value

    return click.option(*names, type=int, callback=checked, **{"metavar": "N", **more})


class Share(click.FloatRange):
    """A number between 0 and 1, both excluded. click's own lets NaN pass, which is beyond no limit."""

    def __init__(self) -> None:
        super().__init__(0, 1, min_open=True, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is no number between 0 and 1", param, ctx)
        return number


def threads() -> Callable[[Decorated], Decorated]:
    """``--threads``, of which torch takes no more than a machine may have."""
    return whole("--threads", most=1024, help="CPU threads of torch.")


def device(help: str, **more: Any) -> Callable[[Decorated], Decorated]:
    """``--device``, a device of torch's that this machine has."""
    return click.option("--device", callback=_there, help=help, **more)


def _there(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """See that a tensor can be made on the device, and read."""
    if value in (None, "cpu"):
        return value
    import torch

    try:
        torch.ones(1, device=value).item()  # of a tensor on meta nothing can be read
    except (RuntimeError, AssertionError, NotImplementedError) as failure:
        words = str(failure).partition("\n")[0]
        raise click.BadParameter(f"there is no device {value!r} here ({words}); try cpu") from failure
    return value


def json_option(command: Decorated) -> Decorated:
    """``--json FILE``; the file is checked by :func:`ready_file`."""
    return click.option("--json", "file", type=FOLDER, metavar="FILE", help="Write it as JSON; - is standard output.")(
        command
    )


def ready_folder(folder: Path) -> Path:
    """The folder that a user named, made if absent; something can be written into it.

    Raises:
        ReportError: it cannot be made, or not be written into.
    """
    return ready_file(made(folder) / f".{uuid.uuid4().hex[:12]}.part").parent


def ready_file(path: Path | None) -> Path:
    """The file that a user named, its folder made if absent; it can be written, and what is in it stays for now.

    Raises:
        ReportError: it cannot be written.
    """
    if path is None or path == STANDARD_OUTPUT:
        return STANDARD_OUTPUT
    made(path.parent)
    with told(f"cannot write {path}"):
        absent = not path.exists()
        path.open("ab").close()
        if absent:
            path.resolve().unlink()  # not a link to it
    return path


def need(*modules: str, extra: str = "demo", **others: Sequence[str]) -> None:
    """See that all ``modules``, and those that ``others`` lists by extra, are there before anything is computed.

    Raises:
        MissingExtraError: some are not, and the one command that installs them all.
    """
    require_all({extra: modules, **others})


def write_json(path: Path, values: Any) -> Path:
    """Write strict JSON to the file that a user named, or to standard output if that is ``-``; returns the path.

    The file is whole or not written at all, unless it is a pipe or a device, or lies where no second one can be made.

    Raises:
        ReportError: it cannot be written.
    """
    text = as_json(values)
    if path == STANDARD_OUTPUT:
        click.echo(text, nl=False)
    elif (path.exists() and not path.is_file()) or not os.access(path.parent, os.W_OK):
        with told(f"cannot write {path}"):
            path.write_text(text, encoding="utf-8")
    else:
        write(path.resolve(), text)  # through a link, as the user named it
    return path


def as_json(values: Any) -> str:
    """Strict JSON; what is not finite becomes null."""
    from tokentrim_hooks.report.record import finite

    return json.dumps(finite(values), indent=2, allow_nan=False) + "\n"
