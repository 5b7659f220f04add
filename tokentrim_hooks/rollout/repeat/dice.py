"""What draws random numbers from a state of its own: Python's, torch's, numpy's (which is not imported)."""

from __future__ import annotations

import random
from typing import Any

import torch


def is_dice(value: Any) -> bool:
    """Whether it draws random numbers, from a state of its own."""
    if isinstance(value, random.Random | torch.Generator):
        return True
    return type(value).__module__.startswith("numpy.random") and type(value).__name__ in ("Generator", "RandomState")


def state_of(dice: Any) -> Any:
    """The state of what draws random numbers."""
    if isinstance(dice, random.Random):
        return dice.getstate()
    if isinstance(dice, torch.Generator):
        return dice.get_state().tolist()
    return dice.get_state() if hasattr(dice, "get_state") else dice.bit_generator.state


def set_state(dice: Any, state: Any) -> None:
    """Make it draw again what it drew from ``state`` on."""
    if isinstance(dice, random.Random):
        dice.setstate(state)
    elif isinstance(dice, torch.Generator):
        dice.set_state(torch.tensor(state, dtype=torch.uint8))
    elif hasattr(dice, "set_state"):
        dice.set_state(state)
    else:
        dice.bit_generator.state = state
