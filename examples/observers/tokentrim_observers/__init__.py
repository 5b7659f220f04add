"""Observers for tokentrim-hooks, by name: ``tensorboard``, ``wandb``, ``rerun``. None is imported here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokentrim_hooks import Observer, hookimpl

PLACES = {
    "tensorboard": "tokentrim_observers.to_tensorboard:TensorBoard",
    "wandb": "tokentrim_observers.to_wandb:WeightsAndBiases",
    "rerun": "tokentrim_observers.to_rerun:Rerun",
}
"""Where the observers are, as ``module:Class``."""
NEEDS = {
    "tensorboard": {"tensorboard": "tensorboard", "PIL": "pillow"},
    "wandb": {"wandb": "wandb", "PIL": "pillow"},
    "rerun": {"rerun": "rerun-sdk"},
}
"""What each imports, by module, with the name that pip knows."""


@hookimpl
def tokentrim_observers() -> Mapping[str, Callable[[Path | None], Observer]]:
    """One factory per name: it gets the run's folder, or None."""
    return {name: Factory(name, NEEDS[name]) for name in PLACES}


@dataclass(frozen=True)
class Factory:
    """Makes an observer; tokentrim-hooks tells who lacks what it ``needs`` before anything runs."""

    name: str
    needs: Mapping[str, str]

    def __call__(self, folder: Path | None) -> Observer:
        """The observer, which writes below the folder, or where its library usually does."""
        module, _, cls = PLACES[self.name].partition(":")
        made: Observer = getattr(importlib.import_module(module), cls)(folder)
        return made
