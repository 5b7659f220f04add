"""Which videos a script wrote: found by what has changed below some folders, and kept where no later run meets them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokentrim_hooks.errors import TokenTrimError
from tokentrim_hooks.report.files import made, told

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".gif")
SKIPPED = {"__pycache__", "node_modules", "site-packages", ".git", ".venv"}
"""Folders that no script writes its videos into."""
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Places:
    """Where videos are looked for.

    Attributes:
        roots: folders, looked through to any depth. pattern: instead of them, a pattern of paths (``out/*.mp4``).
        apart: a folder that is left out, for it is ours.
    """

    roots: Sequence[Path]
    pattern: str
    apart: Path

    @classmethod
    def of(cls, arguments: Iterable[str], pattern: str, apart: Path = Path()) -> Places:
        """The current folder, and those that the script's arguments name (``--out x``, ``--out=x/y.mp4``).

        Raises:
            TokenTrimError: ``pattern`` is none.
        """
        try:
            next(_matching(pattern) if pattern else iter(()), None)
        except (ValueError, NotImplementedError, IndexError) as failure:
            words = f"--video {pattern!r} is no pattern of paths: {str(failure) or 'it names no file'}"
            raise TokenTrimError(f"{words}.\nGive the place of the videos, as 'out/*.mp4'.") from failure
        named = [Path(word.rpartition("=")[2]) for word in arguments if not word.startswith("-") or "=" in word]
        folders = [path if path.is_dir() else path.parent for path in named if str(path) and path.parent.is_dir()]
        resolved = dict.fromkeys(path.resolve() for path in (Path(), *folders))
        own = [path for path in resolved if not any(other in path.parents for other in resolved)]
        return cls([path for path in own if path.parent != path], pattern, apart.resolve())

    def stamps(self) -> dict[Path, Stamp]:
        """Every video by its path, with what changes when it is written."""
        return {path: (s.st_mtime_ns, s.st_size, s.st_ino) for path in self._paths() if (s := _stat(path)) is not None}

    def _paths(self) -> Iterator[Path]:
        if self.pattern:
            yield from (path.resolve() for path in _matching(self.pattern) if path.is_file())
            return
        for root in self.roots:
            for folder, names, files in os.walk(root):
                names[:] = [n for n in names if n not in SKIPPED and (Path(folder) / n).resolve() != self.apart]
                yield from (Path(folder) / name for name in files if name.lower().endswith(SUFFIXES))


def _matching(pattern: str) -> Iterator[Path]:
    """Paths of a pattern, from the root on where it begins there."""
    base = Path(pattern).anchor or "."
    return Path(base).glob(pattern[len(base) :] if base != "." else pattern)


def _stat(path: Path) -> os.stat_result | None:
    """None where it has gone away just now."""
    try:
        return path.stat()
    except OSError:
        return None


def written(before: Mapping[Path, Stamp], after: Mapping[Path, Stamp]) -> list[Path]:
    """Videos that are new or were written anew, in the order in which they were finished."""
    return sorted((path for path, stamp in after.items() if before.get(path) != stamp), key=lambda path: after[path])


def kept(paths: Sequence[Path], before: Mapping[Path, Stamp], folder: Path) -> list[Path]:
    """Take videos into ``folder``; returns their places there. One that was there before the run is copied, not moved.

    So each run begins as the one before it did: a script that leaves out what it has made already makes it again.

    Raises:
        ReportError: that cannot be done.
    """
    made(folder)
    places = []
    for number, path in enumerate(paths):
        place = folder / (path.name if not (folder / path.name).exists() else f"{number}-{path.name}")
        with told(f"cannot keep {path}"):
            shutil.copy2(path, place) if path in before else shutil.move(path, place)
        places.append(place)
    return places
