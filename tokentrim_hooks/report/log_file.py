"""One process's log in a run's folder: its lines are nobody else's, and it takes nobody's place.

The writer of a log holds a lock on it, where the system has such locks. A log that somebody holds is left alone: the
next process takes a name of its own. A log that nobody holds is an earlier run's, and is set aside.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import textwrap
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokentrim_hooks.errors import ReportError, TokenTrimWarning
from tokentrim_hooks.report import names
from tokentrim_hooks.report.fields import parsed
from tokentrim_hooks.report.files import is_own, read, told, write

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
"""None on Windows, where an open file cannot be set aside, which does as well."""


class LogFile:
    """Lines of one process, appended whole and at once.

    Args:
        folder: where it lies. append: whether an earlier run's log is continued rather than set aside.
        per_rank: whether ranks share the folder.
    """

    def __init__(self, folder: Path, append: bool = False, per_rank: bool = True) -> None:
        self.folder = folder
        self._append, self._per_rank = append, per_rank
        self._process = self._made_in = os.getpid()
        self._settings: Mapping[str, Any] | None = None
        self._tag: str | None = None
        self._file: io.FileIO | None = None
        _all.add(self)

    @property
    def tag(self) -> str:
        """What tells its name from others': of this process until it is opened, then its own."""
        self._leave_to_parent()
        return names.tag_of_process(self._made_in, self._per_rank) if self._tag is None else self._tag

    @property
    def is_open(self) -> bool:
        """Whether this process writes it."""
        self._leave_to_parent()
        return self._file is not None

    def start(self, settings: Mapping[str, Any]) -> None:
        """Open the log and write the settings beside it.

        Raises:
            ReportError: that cannot be done.
        """
        self._settings = dict(settings)
        self._opened()
        write_settings(self.folder, self._settings, self.tag)

    def write(self, lines: str) -> None:
        """Append whole lines.

        Raises:
            ReportError: they cannot be written.
        """
        data = memoryview(lines.encode())
        file = self._opened()
        with told(f"cannot write {names.log_of(self.folder, self.tag)}"):
            while data:
                data = data[file.write(data) or 0 :]

    def close(self) -> None:
        """Close it; what comes after is appended to it."""
        self._leave_to_parent()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> io.FileIO:
        self._leave_to_parent()
        if self._file is None:
            again = self._tag is not None
            wanted = self.tag
            self._tag, self._file = _claimed(self.folder, wanted, self._append or again)
            if self._process != self._made_in and self._settings is not None:
                write_settings(self.folder, self._settings, self._tag)
        return self._file

    def _leave_to_parent(self) -> None:
        """In a fork: the log that was open is the parent's, this process begins one of its own."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        if self._file is not None:
            self._file.close()
        self._file = self._tag = None
        self._append = False


_all: weakref.WeakSet[LogFile] = weakref.WeakSet()


def _after_fork() -> None:
    """A fork holds no lock of its parent's."""
    for log in list(_all):
        log._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def tag_in(folder: Path, parent: int) -> str:
    """The tag of what else this process writes into ``folder``: that of its log there, if it has one.

    Args:
        folder: the run's. parent: the process that the run began in.
    """
    for log in list(_all):
        if log.is_open and log.folder.resolve() == folder.resolve():
            return log.tag
    return names.tag_of_process(parent)


def is_held(log: Path) -> bool:
    """Whether a process is writing that log."""
    try:
        with _existing(log) as file:
            return not _lock(file)
    except OSError:
        return False


@contextlib.contextmanager
def alone(place: Path) -> Iterator[bool]:
    """Hold a file, made if absent and never removed, for the duration; says whether nobody else holds it.

    Where there are no locks (Windows, some network file systems) everybody is alone.

    Raises:
        ReportError: it cannot be made, or is a link, which may lead anywhere.
    """
    with told(f"cannot write {place}"):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        file = _existing(place)
    with file:
        yield _lock(file)


def write_settings(folder: Path, settings: Mapping[str, Any], tag: str = "") -> None:
    """Write the settings beside the log of that tag, whole or not at all.

    Raises:
        ReportError: they cannot be written.
    """
    write(names.settings_of(folder, tag), json.dumps(settings, indent=2, default=str))


def read_settings(path: Path, limit: int, hint: str) -> dict[str, Any]:
    """Settings that lie in a file, of at most ``limit`` bytes; ``hint`` says what to do where they cannot be read.

    Raises:
        ReportError: they cannot be read, or are none.
    """
    content = read(path, limit)
    try:
        settings = parsed(content)
        json.dumps(settings, indent=2)
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (ValueError, RecursionError) as failure:
        raise ReportError(f"{path} cannot be read: {textwrap.shorten(str(failure), 120)}.\n{hint}") from failure
    return settings


def _claimed(folder: Path, wanted: str, append: bool) -> tuple[str, io.FileIO]:
    """A log for this process alone, with its tag: the one wanted, or one with the process's number."""
    own = f"{wanted}.pid{os.getpid()}" if ".pid" not in wanted else wanted
    others = (f"{own}-{number}" for number in itertools.count(2))
    for tag in itertools.chain(dict.fromkeys([wanted, own]), others):
        with told(f"cannot write {names.log_of(folder, tag)}"):
            file = _taken(folder, tag, append)
        if file is not None:
            if tag != wanted:
                _say_so(names.log_of(folder, wanted), names.log_of(folder, tag))
            return tag, file
    raise AssertionError("there is always another number")


def _say_so(held: Path, own: Path) -> None:
    warnings.warn(
        f"{held} is being written already, so this log is {own.name}: give each run a folder of its own",
        TokenTrimWarning,
        stacklevel=6,
    )


def _taken(folder: Path, tag: str, append: bool) -> io.FileIO | None:
    """The log of that tag, locked and at its end; None if it is somebody else's."""
    path = names.log_of(folder, tag)
    while True:
        if not os.path.lexists(path):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        with contextlib.suppress(FileNotFoundError):  # set aside by another process, just now
            if is_own(path.lstat()):
                file = _existing(path)
            else:
                _set_aside(folder, tag)
                continue
            if not _lock(file):
                file.close()
                return None
            if _is_still(path, file):
                if append or not os.fstat(file.fileno()).st_size:
                    _trim(file)
                    return file
                if not _set_aside(folder, tag):
                    file.close()
                    return None
            file.close()


def _existing(path: Path) -> io.FileIO:
    """A log that lies there, no link followed."""
    flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    return io.FileIO(os.open(path, flags), "r+")


def _lock(file: io.FileIO) -> bool:
    """Hold it for as long as it is open; False if somebody else does."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_still(path: Path, file: io.FileIO) -> bool:
    """Whether the path names this file: somebody may have set it aside before it was locked."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _set_aside(folder: Path, tag: str) -> bool:
    """Give an earlier run's log and settings the tag ``.old-1``, or the next free number; False if it is in use."""
    old = next(t for n in itertools.count(1) if not os.path.lexists(names.log_of(folder, t := f"{tag}.old-{n}")))
    try:
        names.log_of(folder, tag).rename(names.log_of(folder, old))
    except PermissionError:
        if fcntl is not None:
            raise
        return False
    with contextlib.suppress(OSError):
        names.settings_of(folder, tag).rename(names.settings_of(folder, old))
    return True


def _trim(file: io.FileIO) -> None:
    """Cut off what a crash left of a last line: what is appended must not be joined to it."""
    end, block = os.fstat(file.fileno()).st_size, 1 << 16
    while end:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    file.truncate(end)
