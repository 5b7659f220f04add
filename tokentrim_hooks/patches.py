"""All that hangs on one model, and how it comes off: an undo stack and a dead-man's switch.

Modules get forward hooks (they survive offloading and keep signatures); methods and module-level functions get wrapt
wrappers. Everything is inert as soon as ``active`` is False, also a copy that somebody else kept. A copied or pickled
model carries inert remains only.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import wrapt
from torch import Tensor, nn

from tokentrim_hooks.adapter import Method
from tokentrim_hooks.errors import AttachError, UnsupportedContextError
from tokentrim_hooks.pruning import BUSY, current_tap

MISSING = object()
_inside: ContextVar[int] = ContextVar("tokentrim_inside_self_attention", default=0)


def _inert(*_args: Any, **_kwargs: Any) -> None:
    """What remains of a hook in a copied or unpickled model: nothing."""


def _make_inert() -> Callable[..., None]:
    return _inert


def _same(value: Any) -> Any:
    return value


def _swap_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``function`` out of compiled graphs: our bookkeeping is not the model's."""
    return cast(Callable[..., Any], torch.compiler.disable(function))  # type: ignore[no-untyped-call]


class Hook:
    """A forward hook bound to one module; copies and pickles of it do nothing."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], patches: Patches) -> None:
        self._module = module
        self._function = function
        self._patches = patches

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run, but only for the module that was hooked (a shallow copy shares its hooks) and while the patch is on."""
        if not self._patches.active or module is not self._module:
            return None
        return self._function(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _make_inert, ()


class Wrapper(wrapt.FunctionWrapper[Any, Any]):
    """A wrapt wrapper whose copies and pickles are the original."""

    def __copy__(self) -> Any:
        return self.__wrapped__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        return _same, (self.__wrapped__,)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()


@dataclass(frozen=True)
class TapNames:
    """Names under which an attention function takes query, key, value and mask; it refuses what ``refuse`` names."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    mask: str | None = None
    refuse: tuple[str, ...] = ()
    heads_first: bool = False
    lengths: str | None = None


class TappedForward:
    """Stands in for the forward of one attention module; a copied or pickled module gets its own forward back."""

    def __init__(self, original: Callable[..., Any], attend: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._original, self._attend = original, attend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, unless something is dead."""
        return self._attend(args, kwargs) if BUSY.now else self._original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        return _same, (self._original,)


def _place_of(namespace: Any) -> Mapping[str, Any]:
    """Where a namespace keeps its names: a dict is its own place."""
    return namespace if isinstance(namespace, dict) else vars(namespace)


def _put(namespace: Any, name: str, value: Any) -> None:
    if isinstance(namespace, dict):
        namespace[name] = value
    else:
        setattr(namespace, name, value)


class TapSite:
    """One tapped function in a namespace, shared by all patched models whose code lives there."""

    _sites: dict[tuple[int, str], TapSite] = {}  # noqa: RUF012 - a registry of the process

    def __init__(self, namespace: Any, name: str, names: TapNames) -> None:
        self.namespace, self.name, self.names = namespace, name, names
        self.users = 0
        self.before = _place_of(namespace).get(name, MISSING)
        self.original = namespace[name] if isinstance(namespace, dict) else getattr(namespace, name)
        self.signature = inspect.signature(self.original)
        self.tapped = self._make_tapped()

    @classmethod
    def use(cls, namespace: Any, name: str, names: TapNames) -> TapSite:
        """Install the tap, or share the one that is there."""
        key = (id(namespace), name)
        site = cls._sites.get(key)
        if site is None:
            site = cls._sites[key] = cls(namespace, name, names)
            _put(namespace, name, site.tapped)
        site.users += 1
        return site

    def release(self) -> None:
        """Take the tap out with its last user, unless somebody has wrapped it since (then it stays, inert)."""
        self.users -= 1
        if self.users == 0:
            del self._sites[(id(self.namespace), self.name)]
            if _place_of(self.namespace).get(self.name) is not self.tapped:
                return
            if self.before is MISSING:
                delattr(self.namespace, self.name)
            else:
                _put(self.namespace, self.name, self.before)

    def _make_tapped(self) -> Callable[..., Any]:
        """A plain function, no wrapt proxy, and no context variable while nothing is dead: neither can be compiled."""
        original, attend = self.original, eagerly(self._attend)
        if isinstance(self.namespace, nn.Module):
            return TappedForward(original, attend)

        @functools.wraps(original)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            return attend(args, kwargs) if BUSY.now else original(*args, **kwargs)

        return tapped

    def _attend(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tap = current_tap()
        if tap is None or (tap.gated and not _inside.get()):
            return self.original(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        given, names = bound.arguments, self.names
        for name in names.refuse:
            if given.get(name) is not None:
                raise UnsupportedContextError(f"cannot prune while {self.name}() is called with {name}")

        rest: tuple[Any, ...] = ()

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            nonlocal rest
            given.update({names.q: turn(q), names.k: turn(k), names.v: turn(v)})
            if names.mask is not None:
                given[names.mask] = mask
            if names.lengths is not None:
                given[names.lengths] = torch.full_like(given[names.lengths][: q.shape[0]], k.shape[1])
            result = self.original(*bound.args, **bound.kwargs)
            first, *others = result if isinstance(result, tuple) else (result,)
            rest = tuple(others)
            return cast(Tensor, first)

        turn = _swap_heads if names.heads_first else _same
        mask = given.get(names.mask) if names.mask else None
        output = tap.attend(attend, turn(given[names.q]), turn(given[names.k]), turn(given[names.v]), mask)
        return (output, *rest) if rest else output


class Patches:
    """Undo stack of one patched model. Adapters call :meth:`tap` and :meth:`wrap`; undoing is the core's business."""

    def __init__(self) -> None:
        self.active = True
        self.taps = 0
        self.layers = 0
        self._undo: list[Callable[[], None]] = []

    def hook(
        self,
        module: nn.Module,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        leave: Callable[..., Any] | None = None,
    ) -> None:
        """Watch the calls of a module: ``before(module, args, kwargs)``, ``after(module, args, kwargs, output)``.

        ``leave`` has ``after``'s signature and runs also when the call raises.
        """
        handles = []
        if before is not None:
            handles.append(
                module.register_forward_pre_hook(Hook(module, before, self), prepend=True, with_kwargs=True)
            )
        if after is not None:
            handles.append(module.register_forward_hook(Hook(module, after, self), with_kwargs=True))
        if leave is not None:
            handles.append(
                module.register_forward_hook(Hook(module, leave, self), with_kwargs=True, always_call=True)
            )
        for handle in handles:
            self._undo.append(handle.remove)

    def tap(
        self,
        namespace: Any,
        name: str,
        *,
        q: str = "q",
        k: str = "k",
        v: str = "v",
        mask: str | None = None,
        refuse: tuple[str, ...] = (),
        heads_first: bool = False,
        lengths: str | None = None,
        within: Iterable[nn.Module] = (),
    ) -> None:
        """Let only live keys reach the attention function ``namespace.name``.

        ``namespace`` is a module of Python, a dict, or an attention module of the model (``name`` is ``"forward"``). The
        names say which parameters hold q, k, v: ``[B, length, heads, head_dim]``, or ``[B, heads, length, head_dim]``
        with ``heads_first``. The result is ``[B, length, ...]``, or a tuple that begins with it. Where the same
        function also serves cross attention, ``within`` lists the self-attention modules in whose calls it counts.
        A call that sets a parameter named in ``refuse`` raises instead of going wrong. ``lengths`` names the
        parameter with the number of keys of each sample, where all given keys are valid.
        """
        site = TapSite.use(namespace, name, TapNames(q, k, v, mask, refuse, heads_first, lengths))
        self._undo.append(site.release)
        self.taps += 1
        for module in within:
            self.layers += 1
            self.hook(module, before=_depth_hooks()[0], leave=_depth_hooks()[1])

    def tap_packed(self, owner: Any, name: str, attend: Callable[..., Any]) -> None:
        """Tap an attention method that packs queries of several chunks, each with a range of keys of its own.

        While something is dead ``attend(tap, attention, *args, **kwargs)`` stands in for the calls of
        ``owner.name``: it asks ``tap.live_range(...)`` for each range and calls ``attention``, the original, on what
        is left. Calls in which it asks nothing count as no attention over the context.
        """

        def through(attention: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tap = current_tap()
            if tap is None:
                return attention(*args, **kwargs)
            before = tap.asked
            output = attend(tap, attention, *args, **kwargs)
            tap.calls += tap.asked > before
            return output

        through = eagerly(through)

        def tapped(attention: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return through(attention, args, kwargs) if BUSY.now else attention(*args, **kwargs)

        self.wrap(owner, name, tapped)
        self.taps += 1

    def wrap(
        self, owner: Any, name: str, wrapper: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        """Wrap a method or function, wrapt style: ``wrapper(wrapped, instance, args, kwargs)``."""
        before = vars(owner).get(name, MISSING)
        wrapped = Wrapper(getattr(owner, name), wrapper, enabled=lambda: self.active)
        setattr(owner, name, wrapped)

        def undo() -> None:
            if vars(owner).get(name) is not wrapped:
                return
            if before is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def watch(
        self,
        method: Method,
        before: Callable[..., Any],
        after: Callable[..., Any],
        leave: Callable[..., Any],
    ) -> None:
        """Watch the calls of a method as :meth:`hook` watches a module's; the wrapped method stands for the module."""

        def watched(wrapped: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = None
            try:
                before(wrapped, args, kwargs)
                output = wrapped(*args, **kwargs)
                replaced = after(wrapped, args, kwargs, output)
                return output if replaced is None else replaced
            finally:
                leave(wrapped, args, kwargs, output)

        self.wrap(method.owner, method.name, watched)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Run ``action`` when the patch comes off."""
        self._undo.append(action)

    def require_tap(self, adapter: str) -> None:
        """Raise AttachError if the adapter attached nothing that could prune."""
        if not self.taps:
            raise AttachError(f"adapter {adapter!r} found no attention function to tap; nothing was patched")

    def undo(self) -> None:
        """Take everything off, last first; runs to the end even if a step fails, then raises the first failure."""
        self.active = False
        failures: list[Exception] = []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]


def _count_inside(by: int) -> None:
    _inside.set(_inside.get() + by)


@functools.cache
def _depth_hooks() -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that count entries into self attention; made at the first tap, for torch's compiler is slow to import."""
    count = eagerly(_count_inside)

    def go_inside(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        if BUSY.now:
            count(1)

    def go_outside(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> None:
        if BUSY.now:
            count(-1)

    return go_inside, go_outside
