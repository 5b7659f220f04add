"""Watches and edits the attention kernel itself, underneath model, adapter and core.

Everything here sees ``scaled_dot_product_attention`` at the moment at which it runs, under whatever name the model
imported it, and knows nothing of caches, layouts or marks. Keys are recognised by the values in their V row, which no
rotary embedding changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokentrim_hooks.patching.patches import Method

Denoiser = nn.Module | Method
"""What an adapter's match may call a denoiser."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Attention:
    """One kernel call: the ``layer``-th within the ``call``-th denoiser call, counted from 0.

    ``rows`` are signatures of sample 0's V rows in order; ``finite`` whether all of V is; ``samples`` its batch size,
    in which layers that attend per site have their sites.
    """

    call: int
    layer: int
    queries: int
    rows: tuple[int, ...]
    finite: bool
    samples: int = 1

    @property
    def keys(self) -> int:
        """Number of keys."""
        return len(self.rows)


Edit = Callable[[Attention], "Mapping[int, float]"]
"""Names key positions of a kernel call and what they weigh there: 0 for those that it may not see."""


@contextmanager
def watch_attention(denoisers: Sequence[Denoiser], edit: Edit | None = None) -> Iterator[list[Attention]]:
    """Record every kernel call inside the denoisers; with ``edit``, add log w to the scores of the keys it names."""
    watch = _Watch(edit)
    with around_calls(denoisers, watch.enter, watch.leave), watch:
        yield watch.seen


@contextmanager
def around_calls(
    denoisers: Sequence[Denoiser], enter: Callable[[], None], leave: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Run ``enter`` before and ``leave`` after every call of the denoisers, for the duration of a block."""
    with ExitStack() as undo:
        for denoiser in denoisers:
            if isinstance(denoiser, Method):
                _around_method(denoiser, enter, leave, undo)
            else:
                undo.callback(denoiser.register_forward_pre_hook(lambda *_: enter()).remove)
                undo.callback(denoiser.register_forward_hook(lambda *_: leave(), always_call=True).remove)
        yield


Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], "tuple[tuple[Any, ...], dict[str, Any]] | None"]
After = Callable[[Any, tuple[Any, ...], Any], Any]


@contextmanager
def changed_calls(denoiser: Denoiser, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Give a denoiser's calls other arguments, or another answer, as hooks of a module do, also of a method.

    Args:
        denoiser: the module, or the method.
        before: ``before(called, args, kwargs)``, after other hooks of that kind; None changes nothing.
        after: ``after(called, args, output)``; None changes nothing.
    """
    with ExitStack() as undo:
        if isinstance(denoiser, Method):
            _put(denoiser, _changed(getattr(denoiser.owner, denoiser.name), before, after), undo)
        else:
            if before is not None:
                undo.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
            if after is not None:
                undo.callback(denoiser.register_forward_hook(after).remove)
        yield


def _changed(called: Callable[..., Any], before: Before | None, after: After | None) -> Callable[..., Any]:
    @functools.wraps(called)
    def changed(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            args, kwargs = before(called, args, kwargs) or (args, kwargs)
        output = called(*args, **kwargs)
        other = None if after is None else after(called, args, output)
        return output if other is None else other

    return changed


def _put(method: Method, function: Callable[..., Any], undo: ExitStack) -> None:
    """Put a function in the place of a method, which comes back."""
    owner, name = method.owner, method.name
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, function)


def _around_method(method: Method, enter: Callable[[], None], leave: Callable[[], None], undo: ExitStack) -> None:
    owner, name = method.owner, method.name
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    original = getattr(owner, name)
    bound = type(original) is MethodType  # a wrapper in its place says that it were one
    function: Callable[..., Any] = original.__func__ if bound else original

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        enter()
        try:
            return function(*args, **kwargs)
        finally:
            leave()

    setattr(owner, name, MethodType(watched, original.__self__) if bound else watched)


class _Watch(TorchFunctionMode):
    def __init__(self, edit: Edit | None) -> None:
        super().__init__()
        self.edit = edit
        self.seen: list[Attention] = []
        self.calls = 0
        self.layer = 0
        self.depth = 0

    def enter(self) -> None:
        self.depth += 1
        self.layer = 0

    def leave(self) -> None:
        self.depth -= 1
        self.calls += 1

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.depth == 0 or getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        seen = self._record(given["query"], given["value"])
        weights = self.edit(seen) if self.edit is not None else {}
        if weights:
            given["attn_mask"] = _weighed(given, weights)
            given["is_causal"] = False
        return func(**given)

    def _record(self, query: Tensor, value: Tensor) -> Attention:
        finite = bool(torch.isfinite(value).all())
        seen = Attention(self.calls, self.layer, query.shape[-2], signatures(value), finite, len(value))
        self.seen.append(seen)
        self.layer += 1
        return seen


def signatures(value: Tensor) -> tuple[int, ...]:
    """A number for every V row of sample 0 (``[B, heads, keys, head_dim]``): equal for bit-equal rows.

    The very first element is left out, for there a mark may have been written since.
    """
    return tuple(_numbers(value[0].transpose(0, 1).flatten(1)[:, 1:].contiguous()))


def fingerprints_of(value: Tensor) -> list[int]:
    """The same for the rows of all samples, one sample behind the other, their first element included."""
    return _numbers(value.transpose(1, 2).flatten(2).flatten(0, 1).contiguous())


def _numbers(rows: Tensor) -> list[int]:
    bits = rows.view(BITS[rows.element_size()]).to(torch.int64)
    factors = torch.arange(1, bits.shape[1] + 1, device=bits.device, dtype=torch.int64) * 6364136223846793005 + 1
    numbers: list[int] = (bits * factors).sum(dim=1).tolist()
    return numbers


def _weighed(given: dict[str, Any], weights: Mapping[int, float]) -> Tensor:
    """The call's attention mask as a float mask, plus log w at the keys named: -inf where the weight is 0."""
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    bias = torch.zeros(query.shape[-2], key.shape[-2], dtype=query.dtype, device=query.device)
    if given.get("is_causal"):
        bias.masked_fill_(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))
    if mask is not None:
        zeros = torch.zeros_like(mask, dtype=query.dtype)
        bias = bias + (zeros.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask)
    else:
        bias = bias.clone()
    bias[..., list(weights)] += torch.tensor(list(weights.values())).log().to(bias)
    return bias


@dataclass
class KeyTracker:
    """Follows the keys of one layer through the calls by value, and finds out which chunk and token wrote each.

    Keys never seen before are the current chunk's. When all of them are still there beside yet newer ones, a new chunk
    has begun: the former are then finished, in the order in which they stood.
    """

    chunks: list[list[int]] = field(default_factory=list)
    """Signatures of the keys of each finished chunk, frame-major then row-major."""
    _seen: set[int] = field(default_factory=set)
    _fresh: list[int] = field(default_factory=list)

    def see(self, rows: Collection[int]) -> None:
        """Take in the keys of one kernel call."""
        fresh = [row for row in rows if row not in self._seen]
        if not fresh:
            return
        if self._fresh and set(self._fresh) <= set(rows):
            self.chunks.append(self._fresh)
        self._fresh = fresh
        self._seen.update(fresh)

    def written_by(self, chunks: int, tokens: Collection[int], per_frame: int, spare_frames: int = 0) -> set[int]:
        """Signatures of the keys of ``tokens`` in the first ``chunks`` chunks, behind the first ``spare_frames``."""
        rows = [row for chunk in self.chunks[:chunks] for row in chunk]
        spared = spare_frames * per_frame
        return {row for place, row in enumerate(rows) if place >= spared and place % per_frame in set(tokens)}
