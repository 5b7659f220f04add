"""Names of the files of a run's folder. Processes that share one are told apart by a tag: ``.rank1``, ``.pid1234``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

LOG = re.compile(r"chunks((?:\.(?:rank\d+|pid\d+(?:-\d+)?|old-\d+))*)\.jsonl")


def log_of(folder: Path, tag: str = "") -> Path:
    """``chunks.jsonl``, or ``chunks.rank1.jsonl``."""
    return folder / f"chunks{tag}.jsonl"


def settings_of(folder: Path, tag: str = "") -> Path:
    """The settings that a log was made under."""
    return folder / f"settings{tag}.json"


def page_of(folder: Path, tag: str = "") -> Path:
    """The page that is made of a log."""
    return folder / f"report{tag}.html"


def thumbs_of(tag: str = "") -> str:
    """The folder of the pictures that go with a log."""
    return f"thumbs{tag}"


def tag_of(log: Path) -> str:
    """The tag in a log's name; that of any other file is empty."""
    match = LOG.fullmatch(log.name)
    return match[1] if match else ""


def logs_in(folder: Path) -> list[Path]:
    """The logs of a folder, the main one first; those of earlier runs last."""
    found = [path for path in folder.iterdir() if LOG.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=lambda path: (".old-" in path.name, tag_of(path)))


def rank() -> int:
    """This process's rank: torch.distributed's, else that of the environment (``RANK``), else 0."""
    # Imported for nobody: where nothing has imported torch, no process group is initialised.
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_rank())
    given = os.environ.get("RANK", "")
    return int(given) if given.isdecimal() else 0


def tag_of_process(parent: int | None = None, per_rank: bool = True) -> str:
    """What tells this process from others of its run; nothing for rank 0.

    Args:
        parent: the process that the run began in; in any other one, a fork, the tag has the process's number.
        per_rank: whether ranks share the folder.
    """
    number = rank() if per_rank else 0
    fork = f".pid{os.getpid()}" if parent not in (None, os.getpid()) else ""
    return (f".rank{number}" if number else "") + fork
