"""rerun: one .rrd file with a timeline of chunks: figures, drift masks, a quick look at the latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rerun as rr
from torch import Tensor

from tokentrim_hooks import ChunkRecord
from tokentrim_observers.records import drift_picture, figures, latent_picture, series

NAME = "tokentrim.rrd"


class Rerun:
    """Writes ``folder/tokentrim.rrd``, or ``tokentrim.rrd`` in the current folder. No viewer starts."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path()
        self._recording: Any = None

    def on_start(self, settings: dict[str, Any]) -> None:
        """Open a recording of our own: the script's global one, if it has one, is left alone."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._recording = rr.RecordingStream("tokentrim")
        self._recording.save(self._folder / NAME)
        text = "\n".join(f"{name}: {value}" for name, value in settings.items())
        self._recording.log("settings", rr.TextDocument(text), static=True)

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Log the chunk; flushed, so that a crash loses nothing."""
        for record, sample in zip(records, latents, strict=True):
            self._recording.set_time("chunk", sequence=record.chunk)
            for name, value in figures(record).items():
                self._recording.log(f"{series(record)}/{name}", rr.Scalars(value))
            picture = drift_picture(record)
            if picture is not None:
                self._recording.log(f"{series(record)}/drift", rr.Image(picture))
            self._recording.log(f"{series(record)}/latents", rr.Image(latent_picture(sample)))
        self._recording.flush()

    def on_end(self) -> None:
        """Close the file."""
        self._recording.disconnect()
