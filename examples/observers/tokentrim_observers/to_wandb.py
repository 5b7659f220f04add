"""Weights & Biases: figures and drift masks chunk by chunk, and a table of all chunks at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when W&B first reports on itself, which it does in offline mode too (0.31 calls its server in wandb.init).
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb
from torch import Tensor

from tokentrim_hooks import ChunkRecord
from tokentrim_observers.records import drift_picture, figures, series

COLUMNS = ("video", "sample", "chunk", "severity", "threshold", "pruned", "dead", "extra_calls")
"""Fields of a record that make the table."""


class WeightsAndBiases:
    """A run of its own, beside one that the script may have; below ``folder``, or in the current folder.

    Offline unless WANDB_MODE says otherwise: upload with ``wandb sync``. No console output, source, paths, git state,
    packages or hardware are collected; W&B itself adds the host's name, the platform and versions.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._run: Any = None
        self._rows: list[list[Any]] = []

    def on_start(self, settings: dict[str, Any]) -> None:
        """Start the run, with the settings as its configuration."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project="tokentrim", dir=self._folder, mode=mode, config=settings, settings=_settings())
        self._run.define_metric("*", step_metric="chunk")

    def on_chunk(self, records: Sequence[ChunkRecord], latents: Tensor) -> None:
        """Log the chunk: one row of figures, all samples in it."""
        row: dict[str, Any] = {"chunk": records[0].chunk}
        for record in records:
            row |= {f"{series(record)}/{name}": value for name, value in figures(record).items()}
            picture = drift_picture(record)
            if picture is not None:
                row[f"{series(record)}/drift"] = wandb.Image(picture)
            values = json.loads(record.as_json())  # strict: the infinite threshold of a warm-up is None
            self._rows.append([values[name] for name in COLUMNS])
        self._run.log(row)

    def on_end(self) -> None:
        """Log the table and finish the run."""
        self._run.log({"chunks": wandb.Table(columns=list(COLUMNS), data=self._rows)})
        self._run.finish()


def _settings() -> wandb.Settings:
    return wandb.Settings(
        reinit="create_new",  # the default would return, and on_end then finish, a run of the script's own
        console="off",
        silent=True,
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
