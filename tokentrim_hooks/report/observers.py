"""Watching a rollout while it goes on: every finished chunk goes to observers, which may log, draw or print it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO, runtime_checkable

from torch import Tensor

from tokentrim_hooks.errors import TokenTrimWarning, of_a_signal
from tokentrim_hooks.report.files import made
from tokentrim_hooks.report.log_file import LogFile
from tokentrim_hooks.report.names import log_of
from tokentrim_hooks.report.record import ChunkRecord
from tokentrim_hooks.report.warm_up import WarmUp, is_above


@runtime_checkable
class Observer(Protocol):
    """Anything with ``on_chunk``. Optional: ``on_start(settings)`` when patched, ``on_end()`` when unpatched."""

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """A chunk was accepted: its records, one per sample, and its latents ``[B, F, C, H, W]`` on the device."""
        ...


ObserverFactory = Callable[[Path | None], Observer]
"""Makes an observer that may write below the folder given, or where its library usually writes if that is None."""


class JsonLines:
    """Writes every record to ``folder/chunks.jsonl`` as it comes, line by line, so that a crash loses nothing.

    ``folder/settings.json`` holds the settings. No record is lost to another process: a log of an earlier run is set
    aside as ``chunks.old-1.jsonl``, or continued with ``append``; a rank other than 0 writes ``chunks.rank1.jsonl``; a
    fork ``chunks.pid1234.jsonl``, and so does, with a warning, who finds the log being written by another.

    Args:
        folder: made if absent. append: continue the log that is there already.
        per_rank: False where every rank has a folder of its own.

    Raises:
        ReportError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, append: bool = False, per_rank: bool = True) -> None:
        self.folder = made(folder).absolute()  # wherever the process goes
        self._log = LogFile(self.folder, append, per_rank)

    @property
    def path(self) -> Path:
        """The log of this process."""
        return log_of(self.folder, self._log.tag)

    def on_start(self, settings: dict[str, Any]) -> None:
        """Write the settings and open the log."""
        self._log.start(settings)

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Append one line per sample."""
        self._log.write("".join(record.as_json() + "\n" for record in records))

    def on_end(self) -> None:
        """Close the log."""
        self._log.close()


class ProgressLine:
    """One line per chunk: severity against threshold, and what was pruned. For long runs in a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._warm_up = WarmUp({})

    def on_start(self, settings: dict[str, Any]) -> None:
        """See how long the policy's warm-up is."""
        self._warm_up = WarmUp(settings)

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Print the line of the chunk's most severe sample; a bar of tqdm's is drawn again below it."""
        line = progress_line(records, warming=any([self._warm_up.holds(record) for record in records]))
        stream, tqdm = self._stream or sys.stderr, sys.modules.get("tqdm")
        if tqdm is None:
            print(line, file=stream, flush=True)
        else:
            tqdm.tqdm.write(line, file=stream)


def progress_line(records: Sequence[ChunkRecord], warming: bool = False) -> str:
    """``chunk 17  D=4.21  threshold=3.90  pruned 156/1560 tokens``; the sample shown is the most severe one.

    Args:
        records: of one chunk, one per sample. warming: whether it was judged in the warm-up.
    """
    record = max(records, key=lambda r: -1.0 if r.severity is None else r.severity)
    head = f"chunk {record.chunk:>3}"
    if record.severity is None:
        return f"{head}  {'given' if record.given else 'not judged'}"
    threshold = "no threshold" if record.threshold is None else f"threshold={record.threshold:.3g}"
    pruned = [r for r in records if r.pruned]
    tail = "accepted, warming up" if warming or record.threshold is None else _accepted(record)
    if pruned:
        tail = f"pruned {len(pruned[0].tokens)}/{record.grid[0] * record.grid[1]} tokens"
    many = f" in {len(pruned)} of {len(records)} samples" if pruned and len(records) > 1 else ""
    return f"{head}  D={record.severity:.3g}  {threshold}  {tail}{many}"


def _accepted(record: ChunkRecord) -> str:
    """Above its threshold a chunk is left as it is where the policy only observes, or has no regeneration left."""
    return "accepted, though above it" if is_above(record) else "accepted"


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
            if (signalled := of_a_signal(failure)) is not None:
                raise signalled from signalled.__cause__
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
