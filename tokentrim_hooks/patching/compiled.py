"""Compiled models: our part of a call stays outside of their graphs, and what no graph can hold runs eagerly.

Hooks run inside a compiled call, where ours break the graph: with ``fullgraph=True`` that is an error. So a patched
denoiser is compiled with an :class:`Entry` around it that does their work, and they are silent meanwhile. While
something is dead, attention cannot be in one graph: parts that were compiled so are then called as they are.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokentrim_hooks.errors import TokenTrimWarning
from tokentrim_hooks.patching.hooks import Switch
from tokentrim_hooks.patching.tap_site import as_itself, eagerly
from tokentrim_hooks.pruning.call_scope import BUSY, end_with, executes

COMPILED = "_compiled_call_impl"
"""Where ``module.compile()`` leaves what it made."""


class Spared:
    """A compiled call that is made eagerly once its compiling has failed because something is dead.

    Args:
        compiled, plain: the call, and what it was compiled from.
        tell: says so.
    """

    def __init__(self, compiled: Callable[..., Any], plain: Callable[..., Any], tell: Callable[[], None]) -> None:
        self.compiled = compiled
        self._plain, self._tell = plain, tell
        self._eager, self._gives_up, self._ended = eagerly(self._run), eagerly(self._give_up), eagerly(end_with)
        self._no_graph = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call."""
        if BUSY.maybe and self._no_graph:
            return self._eager(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except Exception as failure:
            # Nothing was computed: with fullgraph=True there is one graph of everything, or none.
            if not self._gives_up(failure):
                raise
        except BaseException as failure:
            self._ended(failure)
            raise
        return self._eager(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        # torch.compile(module, fullgraph=True) fails where nothing in it ran compiled.
        _something_compiled()(torch.empty(0))
        return self._plain(*args, **kwargs)

    def _give_up(self, failure: Exception) -> bool:
        if not BUSY.maybe or not isinstance(failure, _failures_of_tracing()):
            return False
        self._no_graph = True
        self._tell()
        return True


class Entry:
    """A denoiser's call with our part of it around; copies and pickles are the call that it stands for.

    Args:
        call: what is inside. watch: our part. original: what this stands for.
    """

    def __init__(self, call: Spared, watch: Watch, original: Callable[..., Any]) -> None:
        _leave_frames_alone()
        # torch.compile(module) takes the module's __call__, and puts no frame of its own around what has torch's name.
        self.__name__, self.__code__ = original.__name__, original.__code__
        self.call = call
        self._original = original
        self._takes = eagerly(watch.takes)
        self._first, self._last, self._end = eagerly(watch.first), eagerly(watch.last), eagerly(watch.end)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the call. Whoever compiles us compiles what is inside: the compiler leaves this frame alone."""
        if torch.compiler.is_compiling() or not self._takes():
            return self.call(*args, **kwargs)
        output = None
        try:
            args, kwargs = self._first(sys._getframe(), args, kwargs) or (args, kwargs)
            output = self.call(*args, **kwargs)
            output = self._last(args, kwargs, output)
            return output
        finally:
            self._end(args, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        return as_itself(self._original)


class Watch:
    """Our part of a denoiser's calls, for its hooks and for entries around it, one of which does it.

    Args:
        module: the denoiser.
        before, after, leave: see :meth:`Patches.hook`.
        patches: of the model. put: puts a stand-in in the place of an attribute until the patch comes off.

    Attributes:
        taken: whether some call is inside an entry; a plain attribute, which compiled code can guard on.
    """

    def __init__(
        self,
        module: nn.Module,
        before: Callable[..., Any],
        after: Callable[..., Any],
        leave: Callable[..., Any],
        patches: Switch,
        put: Callable[[nn.Module, str, Any], None],
    ) -> None:
        self.taken = False
        self._module, self._patches, self._put = module, patches, put
        self._before, self._after, self._leave = before, after, leave
        self._frames: dict[int, types.FrameType] = {}
        self._has_parts = any(_is_compiled(part) for part in module.modules())
        self._told = False

    @property
    def active(self) -> bool:
        """Whether the hooks have work to do: the patch is on, and no entry is around the call that asks."""
        if not self._patches.active:
            return False
        return not self.taken or not (torch.compiler.is_compiling() or self._encloses())

    def _encloses(self) -> bool:
        """Whether an entry is around this thread's call; not trusted to have been left, for Ctrl-C may come."""
        return executes(self._frames.get(threading.get_ident()))

    # ------------------------------------------------------------------------------------------ a call

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Our part before a call, and what it needs where something is dead; other arguments, or None."""
        changed = self._before(module, args, kwargs)
        if BUSY.maybe:
            self._spare_parts()
        return changed

    def takes(self) -> bool:
        """Whether an entry is to do our part."""
        return self.active

    def first(self, frame: types.FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An entry, whose frame this is, makes a call: our part before it; other arguments, or None."""
        changed = self.before(self._module, args, kwargs)
        self._frames[threading.get_ident()] = frame
        self.taken = True
        return changed

    def last(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Our part after the call; the output that the sampler goes on with."""
        self._left()
        replaced = self._after(self._module, args, kwargs, output) if self._patches.active else None
        return output if replaced is None else replaced

    def end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The entry's call is over, whatever ended it."""
        self._left()
        if self._patches.active:
            self._leave(self._module, args, kwargs, output)

    def _left(self) -> None:
        self._frames.pop(threading.get_ident(), None)
        self.taken = bool(self._frames)

    # ------------------------------------------------------------------------------------------ what was compiled

    def enter_at(self, call: Callable[..., Any], original: Callable[..., Any]) -> Entry:
        """An entry around a call of the denoiser, compiled or not, that stands for ``original``."""
        return Entry(self._spared(call, original, self._module), self, original)

    def compiled(self, wrapped: Callable[..., Any], _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for the denoiser's ``compile``: put an entry around what it makes."""
        wrapped(*args, **kwargs)
        made = vars(self._module).get(COMPILED)
        if made is not None:
            self._put(self._module, COMPILED, self.enter_at(made, self._module._call_impl))

    def _spare_parts(self) -> None:
        """Let parts of the denoiser that were compiled run eagerly where they have to."""
        if not (self._has_parts or _anything_compiled()):
            return  # to look through a model of thirty layers takes longer than all else that we do for a call
        for part in self._module.modules():
            place = "forward" if isinstance(part, torch._dynamo.OptimizedModule) else COMPILED
            made = vars(part).get(place)
            if made is not None and not isinstance(made, (Spared, Entry)):
                plain: Any = part._orig_mod if place == "forward" else part._call_impl
                self._put(part, place, self._spared(made, plain, part))

    def _spared(self, call: Callable[..., Any], plain: Callable[..., Any], part: nn.Module) -> Spared:
        return Spared(call, plain, functools.partial(self._tell, type(getattr(part, "_orig_mod", part)).__name__))

    def _tell(self, name: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"{name} was compiled with fullgraph=True, so it runs eagerly while something is pruned: no graph "
                "holds that.\nTo keep it compiled then, too, compile it without fullgraph=True.",
                TokenTrimWarning,
                stacklevel=2,
            )


def _failures_of_tracing() -> tuple[type[Exception], ...]:
    """What torch raises where fullgraph=True cannot be had; names differ between versions."""
    names = ("Unsupported", "FailOnRecompileLimitHit")
    return tuple(getattr(torch._dynamo.exc, name) for name in names if hasattr(torch._dynamo.exc, name))


def _is_compiled(part: nn.Module) -> bool:
    return isinstance(part, torch._dynamo.OptimizedModule) or vars(part).get(COMPILED) is not None


def _anything_compiled() -> bool:
    """Whether something in this process may have been compiled, or is to be: once so, for good.

    Torch remembers the compilers that it was given, until torch._dynamo.reset(); what was compiled then stays.
    """
    if not _seen:
        backends = getattr(torch._dynamo.eval_frame, "cached_backends", {0: "not known in this version of torch"})
        _seen.update(number for number, backend in list(backends.items()) if backend is not None)
    return bool(_seen)


_seen: set[int] = set()


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x + 0


@functools.cache
def _something_compiled() -> Callable[..., Any]:
    return torch.compile(_as_it_is, backend="eager", fullgraph=True)


@functools.cache
def _leave_frames_alone() -> None:
    """Tell the compiler to leave the frames of our entries alone and to compile what they call."""
    from torch._dynamo.eval_frame import skip_code

    for function in (Entry.__call__, Spared.__call__):
        skip_code(function.__code__)
