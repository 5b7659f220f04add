"""Computing without gradients, and writing into tensors of inference mode: the modes are as before, whatever ends it.

``torch.no_grad()`` and ``torch.inference_mode()`` are entered and left by lines of Python. Ctrl-C between two of them
leaves the mode as it is for the rest of the program. Python looks for signals behind a call and not before it, so here
a single call, of C, changes the mode and a single one puts it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def without_gradients(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns, called as under ``torch.no_grad()``."""
    before = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(False)
        return function(*args, **kwargs)
    finally:
        torch._C._set_grad_enabled(before)


def writing(tensor: Tensor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns, which writes into ``tensor``: in inference mode if that was made there, else not."""
    with torch._C._InferenceMode(tensor.is_inference()):
        return without_gradients(function, *args, **kwargs)
