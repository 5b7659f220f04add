"""Observers for tokentrim-hooks, by name: ``tensorboard``, ``wandb``, ``rerun``. None is imported here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tokentrim_hooks import Observer, TokenTrimError, hookimpl

PLACES = {
    "tensorboard": "tokentrim_observers.to_tensorboard:TensorBoard",
    "wandb": "tokentrim_observers.to_wandb:WeightsAndBiases",
    "rerun": "tokentrim_observers.to_rerun:Rerun",
}
"""Where the observers are, as ``module:Class``."""


@hookimpl
def tokentrim_observers() -> Mapping[str, Callable[[Path | None], Observer]]:
    """One factory per name: it gets the run's folder, or None."""
    return {name: partial(_make, name) for name in PLACES}


def _make(name: str, folder: Path | None) -> Observer:
    module, _, cls = PLACES[name].partition(":")
    try:
        home = importlib.import_module(module)
    except ImportError as failure:
        raise TokenTrimError(f"{failure}: pip install 'tokentrim-observers[{name}]'") from failure
    made: Observer = getattr(home, cls)(folder)
    return made
