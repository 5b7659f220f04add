"""Files of a run's folder. What lies there already is not trusted: nothing is written through it, or read beyond it.

A link that a user names as the folder is followed; one that lies in the folder is not.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import ReportError


def named(folder: str | Path) -> Path:
    """The folder that a user named.

    Raises:
        ReportError: the name is empty, as an unset variable leaves it; Path would take it for the current folder.
    """
    if folder == "":
        raise ReportError("an empty name is no folder.\nGive one; '.' is the current folder.")
    return Path(folder)


def made(folder: str | Path) -> Path:
    """The folder that a user named, made if absent.

    Raises:
        ReportError: it cannot be made, or its name is empty.
    """
    path = named(folder)
    with told(f"cannot make the folder {path}"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def below(folder: Path, name: str) -> Path:
    """The folder ``name`` in ``folder``, made if absent.

    Raises:
        ReportError: it cannot be made, or is a link, which may lead anywhere.
    """
    path = folder / name
    if path.is_symlink():
        raise ReportError(f"{path} is a link, and what a run writes stays in its folder.\nRemove it, or give another.")
    return made(path)


def write(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all, whenever the process may be killed; a link that lies there is replaced.

    Raises:
        ReportError: it cannot be written.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    with told(f"cannot write {path}"):
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                file.write(data)
            draft.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
    return path


def write_picture(picture: Any, path: Path, kind: str, **options: Any) -> Path:
    """Write a picture of PIL's as :func:`write` does, in the format ``kind``; ``options`` are those of its ``save``.

    Raises:
        ReportError: it cannot be written.
    """
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return write(path, buffer.getvalue())


def append(path: Path, text: str) -> None:
    """Append text to a file of a run, made if absent.

    Raises:
        ReportError: it cannot be written, or is a link, which may lead anywhere.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with told(f"cannot write {path}"), os.fdopen(os.open(path, flags, 0o666), "ab") as file:
        if not is_own(os.fstat(file.fileno())):
            raise OSError("it is no file of this folder alone")
        file.write(text.encode())


def is_own(status: os.stat_result) -> bool:
    """Whether it is a file that has no other place: not a link of either kind, a folder, a pipe."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def read(path: Path, limit: int) -> bytes:
    """The content of a file of a run.

    Raises:
        ReportError: it cannot be read, is larger than ``limit``, or is a link that leaves its folder.
    """
    refuse_links_out(path)
    with told(f"cannot read {path}"), path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ReportError(f"{path} is larger than {limit >> 20} MiB, which no run writes.\nGive the folder of a run.")
    return content


def refuse_links_out(path: Path) -> None:
    """See that a file lies in its folder.

    Raises:
        ReportError: it is a link to a place outside.
    """
    if not is_within(path, path.parent):
        raise ReportError(
            f"{path} is a link to a place outside of its folder.\nPut a copy of the file there if you trust it."
        )


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, ends in ``folder``."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        return False


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """An OSError in words: ``what`` could not be done, and why.

    Raises:
        ReportError: instead of it.
    """
    try:
        yield
    except (OSError, ValueError) as failure:  # a ValueError is a name with a null character
        reason = getattr(failure, "strerror", None) or failure
        raise ReportError(f"{what}: {reason}.\nGive another folder, or see to this one.") from failure
