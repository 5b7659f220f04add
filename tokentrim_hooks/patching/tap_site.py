"""Where a tap sits: an attention function in a namespace, or the forward of an attention module.

While nothing is dead a tapped function is the original behind one plain test, which compiled code can guard on.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokentrim_hooks.errors import AttachError, UnsupportedContextError
from tokentrim_hooks.patching.tap_names import Given, TapNames, described, label_of, places_of
from tokentrim_hooks.pruning.call_scope import BUSY, current_scope, end_with
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.pruning.tombstones import clear_marks

MISSING = object()


def as_itself(value: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What ``__reduce__`` returns of a stand-in, to be pickled as ``value``: by Python's own names, none of ours."""
    return operator.getitem, ((value,), 0)


OUTSIDE = (
    "tokentrim's part of a denoiser call cannot be in a graph. Compile the denoiser itself, or its blocks, after the "
    "patch: they may have fullgraph=True.\nWhat encloses the denoiser, and single attention functions, compile without"
)
"""Why the compiler found code of ours, which it says where somebody has compiled more than we can stay outside of."""


def _sweep(*_: object) -> None:
    BUSY.sweep()


def _look_before_compiling() -> None:
    """Have torch's compiler drop calls that have ended unseen before it starts.

    Else the next model of the same code, patched or not, would be compiled as if it were pruned: with a graph break,
    which ``fullgraph=True`` refuses.
    """
    from torch._dynamo import callback

    # Asked at every patch: torch._dynamo.reset() forgets it.
    if _sweep not in getattr(callback.callback_handler, "start_callbacks", ()):
        callback.callback_handler.register_start_callback(_sweep)


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``function`` out of compiled graphs: our bookkeeping is not the model's."""
    _look_before_compiling()
    options = {"reason": OUTSIDE} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
    return cast(Callable[..., Any], torch.compiler.disable(function, **options))  # type: ignore[no-untyped-call]


class TappedForward:
    """Stands in for the forward of one attention module; a copied or pickled module gets its own forward back."""

    def __init__(self, original: Callable[..., Any], attend: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._original, self._attend = original, attend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, unless something is dead."""
        return self._attend(args, kwargs) if BUSY.maybe else self._original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        return as_itself(self._original)


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
        self.namespace, self.name, self.given = namespace, name, names
        self.users: list[object] = []
        self.before = _place_of(namespace).get(name, MISSING)
        self.original: Any = namespace.get(name) if isinstance(namespace, dict) else getattr(namespace, name, None)
        if not callable(self.original):
            raise AttachError(f"there is no function {name!r} to tap in {label_of(namespace)}; correct the name")
        signature, self.names = described(self.original, names, f"{label_of(namespace)}.{name}")
        self._places = places_of(signature)
        self.tapped = self._make_tapped()

    @classmethod
    def use(cls, namespace: Any, name: str, names: TapNames, user: object) -> TapSite:
        """Install the tap for ``user``, or share the one that is there."""
        key = (id(namespace), name)
        site = cls._sites.get(key)
        if site is None:
            site = cls._sites[key] = cls(namespace, name, names)
            site.users.append(user)
            _put(namespace, name, site.tapped)
        else:
            site.share(names)
            site.users.append(user)
        return site

    def share(self, names: TapNames) -> None:
        """Serve another tap of the same function: what either refuses is refused.

        Raises:
            AttachError: it names other parameters.
        """
        if dataclasses.replace(names, refuse=self.given.refuse) != self.given:
            raise AttachError(
                f"{label_of(self.namespace)}.{self.name} is tapped already, with other options: {self.given}.\n"
                "One function has one signature: tap it the same way, or take the other patch off first."
            )
        merged = tuple(dict.fromkeys((*self.names.refuse, *names.refuse)))
        self.names = dataclasses.replace(self.names, refuse=merged)

    @classmethod
    def release(cls, namespace: Any, name: str, user: object) -> None:
        """Take a tap out with its last user; nothing where ``user`` is none of its users (any more)."""
        site = cls._sites.get((id(namespace), name))
        if site is None:
            return
        site.users = [other for other in site.users if other is not user]
        if not site.users:
            site._take_out()
            cls._sites.pop((id(namespace), name), None)

    def _take_out(self) -> None:
        """Unless somebody has wrapped it since: then it stays, inert."""
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
            return attend(args, kwargs) if BUSY.maybe else original(*args, **kwargs)

        return tapped

    def _attend(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._attend_in_scope(args, kwargs)
        except BaseException as failure:
            end_with(failure)
            raise

    def _attend_in_scope(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scope = current_scope()
        tap = None if scope is None else scope.tap
        if scope is None or tap is None or tap.off or not self.users or (tap.gated and not scope.depth):
            return self.original(*args, **kwargs)
        try:
            return self._attend_live(tap, args, kwargs)
        except Exception as failure:
            if not tap.steps_aside(failure):
                raise
            return self._attend_unpruned(tap, args, kwargs)

    def _attend_unpruned(self, tap: CallTap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own attention. Marks have left the cache by now, but V may be a copy made before that."""
        if tap.layout is not None:
            return self.original(*args, **kwargs)  # key selection leaves no mark in V
        given = Given(self._places, args, kwargs)
        turn, back = self.names.turns(given)
        values = turn(given[self.names.v]).clone()
        clear_marks([values])
        given[self.names.v] = back(values)
        return self.original(*given.args, **given.kwargs)

    def _attend_live(self, tap: CallTap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, names = Given(self._places, args, kwargs), self.names
        if names.only is not None and not names.only(given[names.v]):
            return self.original(*args, **kwargs)
        for name in names.refuse:
            if given.get(name) is not None and given.get(name) is not False:
                raise UnsupportedContextError(f"cannot prune while {self.name}() is called with {name}; leave it out")

        rest: tuple[Any, ...] = ()

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            nonlocal rest
            given[names.q], given[names.k], given[names.v] = back(q), back(k), back(v)
            if names.mask is not None:
                given[names.mask] = mask
            if names.lengths is not None:
                given[names.lengths] = torch.full_like(given[names.lengths][: q.shape[0]], k.shape[1])
            result = self.original(*given.args, **given.kwargs)
            first, *others = result if isinstance(result, tuple) else (result,)
            rest = tuple(others)
            return cast(Tensor, turn(first) if names.heads_first_out else first)

        turn, back = names.turns(given)
        mask = given.get(names.mask)
        output = tap.attend(attend, turn(given[names.q]), turn(given[names.k]), turn(given[names.v]), mask)
        output = turn(output) if names.heads_first_out else output
        return (output, *rest) if rest else output


def _count_inside(by: int) -> None:
    # Not BUSY: another thread's model may change it between the two hooks.
    scope = current_scope()
    if scope is not None:
        scope.depth += by


@functools.cache
def depth_hooks() -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that count entries into self attention. Made at the first tap: importing torch's compiler takes long."""
    count = eagerly(_count_inside)

    def go_inside(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        if BUSY.maybe:
            count(1)

    def go_outside(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any) -> None:
        if BUSY.maybe:
            count(-1)

    return go_inside, go_outside
