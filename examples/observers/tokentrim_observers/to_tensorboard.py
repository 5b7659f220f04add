"""TensorBoard: a curve for each figure, the drift mask as a picture, the settings as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from tokentrim_hooks import ChunkRecord
from tokentrim_observers.records import drift_picture, figures, series


class TensorBoard:
    """Writes event files into ``folder/tensorboard``, or where SummaryWriter does by default. The step is the chunk."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else str(folder / "tensorboard")
        self._writer: Any = None

    def on_start(self, settings: dict[str, Any]) -> None:
        """Open the event file."""
        self._writer = SummaryWriter(self._folder)
        self._writer.add_text("settings", "\n".join(f"- {name}: {value}" for name, value in settings.items()))

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Add the chunk's figures and pictures; flushed, so that a crash loses nothing."""
        for record in records:
            for name, value in figures(record).items():
                self._writer.add_scalar(f"{name}/{series(record)}", value, record.chunk)
            picture = drift_picture(record)
            if picture is not None:
                self._writer.add_image(f"drift/{series(record)}", picture, record.chunk, dataformats="HWC")
        self._writer.flush()

    def on_end(self) -> None:
        """Close the event file."""
        self._writer.close()
