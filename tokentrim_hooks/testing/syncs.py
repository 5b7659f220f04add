"""Counts the moments at which the host waits for the device, on a CPU too, and says where in the code they are.

On a GPU each of them stalls the queue. On a CPU nothing stalls, so the counter pretends: tensors count as the
device's until something brings them to the host (``.cpu()``, ``.to("cpu")``), and what is computed from host tensors
alone is host work.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

PACKAGE = Path(__file__).resolve().parents[1]
MODELS = (PACKAGE / "reference", PACKAGE / "testing")
"""Folders of the package that are models or tests, not the method."""

LIBRARIES = ("torch", "einops", "wrapt", "functools", "contextlib", "numpy", "traceback")
"""Code that acts for its caller: a synchronisation in there is the caller's."""

READS = frozenset(
    {
        "item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__",
        "__contains__", "__format__", "__repr__", "is_nonzero", "equal", "allclose", "nonzero", "argwhere",
        "masked_select",
    }
)  # fmt: skip
"""Tensor functions whose result the host, or the shape of a result, waits for."""

KERNELS = frozenset(
    {
        "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique", "_unique2",
        "unique_consecutive", "unique_dim", "bincount", "repeat_interleave.Tensor",
    }
)  # fmt: skip
"""ATen operators that wait, wherever they are called from."""


@dataclass(frozen=True)
class Sync:
    """One synchronisation: ``kind`` is the function, ``place`` the line responsible; ``ours`` if it is tokentrim's."""

    kind: str
    place: str
    ours: bool
    stack: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass
class SyncLog:
    """What :func:`count_syncs` saw, in order."""

    events: list[Sync] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.events)

    @property
    def ours(self) -> list[Sync]:
        """Synchronisations caused by tokentrim's own code or an adapter."""
        return [event for event in self.events if event.ours]

    @property
    def theirs(self) -> list[Sync]:
        """Synchronisations of the model and its sampler, also where tokentrim called the model."""
        return [event for event in self.events if not event.ours]

    def __str__(self) -> str:
        places: dict[tuple[bool, str, str], int] = {}
        for event in self.events:
            key = (event.ours, event.kind, event.place)
            places[key] = places.get(key, 0) + 1
        rows = sorted(places.items(), key=lambda row: (not row[0][0], -row[1]))
        whose = {True: "tokentrim", False: "model"}
        lines = [f"  {n:4d} x {kind:20s} {whose[ours]:9s} {place}" for (ours, kind, place), n in rows]
        title = f"{len(self.ours)} synchronisations of tokentrim's, {len(self.theirs)} of the model's:"
        return "\n".join([title, *lines])


@contextmanager
def count_syncs(ours: Sequence[str | Path] = (), emulate: bool = True) -> Iterator[SyncLog]:
    """Log host synchronisations in the block: ``with count_syncs() as log: ...; len(log.ours)``.

    Args:
        ours: further files or folders whose synchronisations count as tokentrim's, for example a new adapter's file.
        emulate: treat CPU tensors as the device's until they are brought to the host; False for a model on a GPU.
    """
    adapters = getattr(sys.modules.get("tokentrim_hooks_adapters"), "__path__", [])
    folders = (PACKAGE, *(Path(p).resolve() for p in (*adapters, *ours)))
    watch = _Watch(SyncLog(), folders, emulate)
    with _Functions(watch), _Kernels(watch):
        yield watch.log


class _Watch:
    """What the two modes share: the log, which tensors are on the host, and whether a wait was counted already."""

    def __init__(self, log: SyncLog, ours: Sequence[Path], emulate: bool) -> None:
        self.log, self.folders, self.emulate = log, ours, emulate
        self.quiet = 0
        self._host = WeakTensorKeyDictionary()

    def on_host(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and (not self.emulate or tensor in self._host)

    def to_host(self, result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._host[leaf] = True

    def count(self, kind: str) -> None:
        frame = _responsible(sys._getframe(1))
        stack = tuple(traceback.format_stack(frame, limit=12))
        self.log.events.append(Sync(kind, _place(frame), self.is_ours(frame), stack))

    def is_ours(self, frame: FrameType) -> bool:
        file = _real(frame.f_code.co_filename)
        within = any(file == folder or folder in file.parents for folder in self.folders)
        return within and not any(folder in file.parents for folder in MODELS)


class _Functions(TorchFunctionMode):
    """Sees what Python asks of tensors: ``.item()``, ``bool(t)``, ``.cpu()`` ..."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        watch, name = self.watch, getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        host = bool(tensors) and all(watch.on_host(tensor) for tensor in tensors)
        waits = not host and bool(tensors) and self._waits(name, args, kwargs)
        if waits:
            watch.count(name)
        watch.quiet += waits or host
        try:
            result = func(*args, **kwargs)
            if watch.emulate:
                result = self._place_result(name, result, tensors, host, waits, kwargs)
        finally:
            watch.quiet -= waits or host
        return result

    def _waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in ("copy_", "__setitem__"):
            source = args[-1] if name == "__setitem__" else (args[1] if len(args) > 1 else kwargs.get("src"))
            if not isinstance(source, Tensor) or kwargs.get("non_blocking"):
                return False
            return self.watch.on_host(args[0]) and not self.watch.on_host(source)
        if name == "numpy":  # refuses a tensor that is on the device, unless told to copy it
            return bool(args[1:] or kwargs.get("force"))
        return name in READS or (name == "to" and _asks_for_host(args, kwargs))

    def _place_result(
        self, name: str, result: Any, tensors: list[Tensor], host: bool, waits: bool, kwargs: dict[str, Any]
    ) -> Any:
        """Decide on which side the results are."""
        moved = waits and name in ("cpu", "to")
        if moved and any(result is tensor for tensor in tensors):
            result = result.clone()  # as on a GPU, where the host's copy is another tensor
        made = not tensors and kwargs.get("device") is None and self.watch.is_ours(_responsible(sys._getframe(1)))
        if moved or made or (host and name != "to"):
            self.watch.to_host(result)
        return result


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators themselves, whoever calls them: mask indexing, nonzero, copies to the host."""

    supports_higher_order_operators = True  # flex attention's, which waits for nothing

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.watch.quiet and hasattr(func, "_schema"):
            self._look(func, args)
        result = func(*args, **(kwargs or {}))
        if not self.watch.quiet and _copied_to_host(args, result):
            self.watch.count(str(func))
        return result

    def _look(self, func: Any, args: tuple[Any, ...]) -> None:
        name, overload = func._schema.name.split("::")[-1], func._overloadname
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and (name in KERNELS or f"{name}.{overload}" in KERNELS):
            if not self.watch.on_host(first):
                self.watch.count(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and self._masked(args[1]):
            self.watch.count(f"{name} with a mask")

    def _masked(self, indices: Sequence[Tensor | None]) -> bool:
        masks = (torch.bool, torch.uint8)
        return any(index is not None and index.dtype in masks and not self.watch.on_host(index) for index in indices)


def _asks_for_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``.to(...)`` names the CPU; while pretending only as a string, for ``x.to(y.device)`` moves nothing."""
    target = kwargs.get("device", args[1] if len(args) > 1 else None)
    if isinstance(target, str):
        return target == "cpu"
    return isinstance(target, torch.device) and target.type == "cpu" and bool(args[0].device.type != "cpu")


def _copied_to_host(args: tuple[Any, ...], result: Any) -> bool:
    real = args and isinstance(args[0], Tensor) and args[0].device.type not in ("cpu", "meta")
    return bool(real and isinstance(result, Tensor) and result.device.type == "cpu")


def _responsible(frame: FrameType | None) -> FrameType:
    """Innermost frame that is neither this file's nor a library's."""
    assert frame is not None
    last = frame
    while frame is not None:
        top = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if frame.f_code.co_filename != __file__ and top not in LIBRARIES:
            return frame
        last, frame = frame, frame.f_back
    return last


@lru_cache
def _real(file: str) -> Path:
    """Where a file really is: a package that is reached through a link is the same package."""
    return Path(file).resolve()


def _place(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    return f"{file.parent.name}/{file.name}:{frame.f_lineno} in {frame.f_code.co_name}"
