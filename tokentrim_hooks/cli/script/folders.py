"""A run's folder: numbered where an earlier run has the one asked for; one folder for all ranks of a launch."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import ReportError
from tokentrim_hooks.report import names
from tokentrim_hooks.report.fields import parsed
from tokentrim_hooks.report.files import made, read, told, write

CARD = "run.json"
"""Says whose folder it is: of which launch, by which command."""


def claimed(wanted: Path, command: str, environment: Mapping[str, str] = os.environ) -> Path:
    """``wanted``, or ``wanted-2`` and so on where another run has been there; under ``torchrun`` a folder in it.

    Raises:
        ReportError: none can be made.
    """
    launch, rank = launch_of(environment), rank_of(environment)
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        mine = folder / rank
        if _is_free(folder, mine) and _take(made(folder), launch, command):
            if number > 1:
                print(f"tokentrim: {wanted} holds an earlier run, so this one goes to {folder}", file=sys.stderr)
            return made(mine)
    raise AssertionError("there is always another number")


def launch_of(environment: Mapping[str, str]) -> str:
    """What the processes of one launch have in common and nobody else has; alone, a process is a launch."""
    rank = rank_of(environment)
    if not rank:
        return uuid.uuid4().hex
    parts = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT"]
    one_node = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]
    return " ".join([*(environment.get(name, "-") for name in parts), str(os.getppid()) if one_node else ""])


def rank_of(environment: Mapping[str, str]) -> str:
    """The name of a rank's folder; empty where there is one process."""
    rank, size = environment.get("RANK"), environment.get("WORLD_SIZE", "1")
    return "" if rank is None or size == "1" else f"rank-{rank}"


def _is_free(folder: Path, mine: Path) -> bool:
    """Whether no log lies there that this process would touch."""
    with told(f"cannot read {folder}"):
        return not any(place.is_dir() and names.logs_in(place) for place in {folder, mine})


def _take(folder: Path, launch: str, command: str) -> bool:
    """Whether the folder is this launch's: nobody's until now, or taken by another rank of it."""
    card = folder / CARD
    with told(f"cannot write {card}"):
        try:
            file = os.fdopen(os.open(card, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8")
        except FileExistsError:
            return _launch_on(card) == launch
        with file:
            json.dump({"launch": launch, "command": command, "began": time.time()}, file)
    return True


def _launch_on(card: Path) -> str:
    """The launch that a card names; it may be being written just now."""
    for _ in range(20):
        launch = _content(card).get("launch")
        if launch:
            return str(launch)
        time.sleep(0.05)
    return ""


def ended(folder: Path) -> None:
    """Note that the script has ended; a folder into which nothing was written goes away.

    Raises:
        ReportError: that cannot be written.
    """
    card = _card_of(folder)
    if card is None or (folder.parent == card.parent and folder.name != "rank-0"):
        return
    if not names.logs_in(folder):
        _drop(folder, card)
        return
    write(card, json.dumps({**_content(card), "ended": time.time()}))


def discard(folder: Path) -> None:
    """Take a folder away into which nothing was written but its card."""
    if {path.name for path in folder.iterdir() if not path.is_dir() or any(path.iterdir())} <= {CARD}:
        for path in folder.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def times_of(folder: Path) -> tuple[float | None, float | None]:
    """When the run of a folder began and ended, in seconds since 1970; None where nobody has noted it."""
    card = _card_of(folder)
    content = {} if card is None else _content(card)
    began, ended = (content.get(name) for name in ("began", "ended"))
    return (began if isinstance(began, float) else None), (ended if isinstance(ended, float) else None)


def _card_of(folder: Path) -> Path | None:
    """The card of a run's folder, or of the one around it, where each rank has its own."""
    around = [folder.parent] if folder.name.startswith("rank-") else []
    return next((place / CARD for place in (folder, *around) if (place / CARD).is_file()), None)


def _content(card: Path) -> dict[str, Any]:
    try:
        content = parsed(read(card, 1 << 20))
    except (ReportError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _drop(folder: Path, card: Path) -> None:
    """Take away what :func:`claimed` made, as far as nothing else lies there."""
    if folder == card.parent:
        card.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
