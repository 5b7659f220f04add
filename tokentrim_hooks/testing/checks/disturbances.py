"""What the kit does to a model in the middle of a run: NaN in dead rows, an exception, another forward."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tokentrim_hooks.adapter import Adapter
from tokentrim_hooks.inspection import bind
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.testing.attention import Denoiser, changed_calls
from tokentrim_hooks.testing.checks.basics import Injected


class Tripwire(TorchFunctionMode):
    """Counts linear layers (every model has them) as they run; raises Injected in the ``at``-th."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "linear":
            self.count += 1
            if self.count == self.at:
                raise Injected
        return func(*args, **(kwargs or {}))


@dataclass
class PoisonLog:
    """How many dead rows were overwritten with NaN, all layers and calls together."""

    rows: int = 0


@contextmanager
def poisoned(denoisers: Sequence[Denoiser], adapter: Adapter[Any]) -> Iterator[PoisonLog]:
    """Before every call, fill the marked rows of V (known by a first element that is not finite) with NaN."""
    log = PoisonLog()

    def fill(called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = adapter.parse(bind(called, args, kwargs))
        context = adapter.context(call) if call is not None else None
        for values in context.values if isinstance(context, CacheRows) else ():
            marks = values[..., 0, 0].clone()
            dead = ~torch.isfinite(marks.float())
            log.rows += int(dead.sum())
            values[dead] = float("nan")
            values[..., 0, 0] = marks

    with ExitStack() as undo:
        for denoiser in denoisers:
            undo.enter_context(changed_calls(denoiser, fill))
        yield log


@contextmanager
def replaced_forward(module: nn.Module) -> Iterator[None]:
    """Put a wrapper in the place of ``forward`` on the instance, as accelerate's ``add_hook_to_module`` does."""
    original = module.forward

    def new_forward(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), original)
    try:
        yield
    finally:
        vars(module).pop("forward", None)
