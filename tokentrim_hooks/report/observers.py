"""Watching a rollout while it goes on: every finished chunk goes to observers, which may log, draw or print it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, runtime_checkable

from torch import Tensor

from tokentrim_hooks.errors import TokenTrimWarning
from tokentrim_hooks.report.record import ChunkRecord, write_settings


@runtime_checkable
class Observer(Protocol):
    """Anything with ``on_chunk``. Optional: ``on_start(settings)`` when patched, ``on_end()`` when unpatched."""

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """A chunk was accepted: its records, one per sample, and its latents ``[B, F, C, H, W]`` on the device."""
        ...


ObserverFactory = Callable[[Path | None], Observer]
"""Makes an observer that may write below the folder given, or where its library usually writes if that is None."""


class JsonLines:
    """Writes every record to ``folder/chunks.jsonl`` as it comes, flushed line by line, so that a crash loses nothing.

    ``folder/settings.json`` holds the settings. A log that is there already is replaced; with ``append`` it is
    continued, in the same file.
    """

    def __init__(self, folder: str | Path, append: bool = False) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._append = append
        self._file: TextIO | None = None

    def on_start(self, settings: dict[str, Any]) -> None:
        """Write the settings and open the log."""
        write_settings(self.folder, settings)
        self._open()

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Append one line per sample."""
        file = self._file or self._open()
        file.writelines(record.as_json() + "\n" for record in records)
        file.flush()

    def on_end(self) -> None:
        """Close the log."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        path = self.folder / "chunks.jsonl"
        mode: Literal["a", "w"] = "a" if self._append else "w"
        if self._append and path.is_file():
            # A crash may have cut the last line off: what is appended must not be joined to it.
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._append = True
        file: TextIO = path.open(mode, encoding="utf-8")
        self._file = file
        return file


class ProgressLine:
    """One line per chunk: severity against threshold, and what was pruned. For long runs in a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Print the line of the chunk's most severe sample."""
        print(progress_line(records), file=self._stream or sys.stderr, flush=True)


def progress_line(records: Sequence[ChunkRecord]) -> str:
    """``chunk 17  D=4.21  threshold=3.90  pruned 156/1560 tokens``; the sample shown is the most severe one."""
    record = max(records, key=lambda r: -1.0 if r.severity is None else r.severity)
    head = f"chunk {record.chunk:>3}"
    if record.severity is None:
        return f"{head}  {'given' if record.given else 'not judged'}"
    threshold = "no threshold" if record.threshold is None else f"threshold={record.threshold:.3g}"
    pruned = [r for r in records if r.pruned]
    tail = f"pruned {len(pruned[0].tokens)}/{record.grid[0] * record.grid[1]} tokens" if pruned else "accepted"
    many = f" in {len(pruned)} of {len(records)} samples" if pruned and len(records) > 1 else ""
    return f"{head}  D={record.severity:.3g}  {threshold}  {tail}{many}"


class Guarded:
    """An observer whose failure is warned about once and then left out: watching never costs a generation."""

    def __init__(self, observer: Any) -> None:
        self._observer = observer
        self._failed = False

    def on_start(self, settings: dict[str, Any]) -> None:
        """Hand it the settings."""
        self._pass_on("on_start", settings)

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Show it an accepted chunk."""
        self._pass_on("on_chunk", records, latents)

    def on_end(self) -> None:
        """Tell it that the patch comes off."""
        self._pass_on("on_end")

    def _pass_on(self, event: str, *arguments: Any) -> None:
        if self._failed:
            return
        try:
            tell([self._observer], event, *arguments)
        except Exception as failure:
            self._failed = True
            name = type(self._observer).__name__
            warnings.warn(
                f"observer {name} failed in {event} and is left out from now on: {type(failure).__name__}: {failure}",
                TokenTrimWarning,
                stacklevel=2,
            )


def tell(observers: Iterable[Any], event: str, *arguments: Any) -> None:
    """Call ``event`` on every observer that has it."""
    for observer in observers:
        method = getattr(observer, event, None)
        if method is not None:
            method(*arguments)
