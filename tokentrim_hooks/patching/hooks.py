"""Forward hooks on a module: inert in copies, and outermost where a call may be replayed."""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.patching.tap_site import as_itself, eagerly


class Switch(Protocol):
    """What says whether a patch is on."""

    @property
    def active(self) -> bool:
        """Whether hooks have work to do."""


INERT = contextlib.nullcontext().__exit__
"""What remains of a hook in a copied or pickled model. It takes anything, does nothing, and a pickle that names it
loads where this package is not installed."""


class Hook:
    """A forward hook bound to one module; copies and pickles of it do nothing."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], patches: Switch) -> None:
        self._module = module
        self._function = function
        self._patches = patches

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run, but only for the module that was hooked (a shallow copy shares its hooks) and while the patch is on."""
        if not self._patches.active or module is not self._module:
            return None
        return self._function(module, *args, **kwargs)

    def belongs_to(self, patches: Switch) -> bool:
        """Whether it is one of this patch."""
        return self._patches is patches

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return INERT

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return as_itself(INERT)


def plain_hooks(
    module: nn.Module,
    before: Callable[..., Any] | None,
    after: Callable[..., Any] | None,
    leave: Callable[..., Any] | None,
    patches: Switch,
) -> list[RemovableHandle]:
    """Hooks in the order of registration; those that are None are left out."""
    handles = []
    if before is not None:
        handles.append(module.register_forward_pre_hook(Hook(module, before, patches), prepend=True, with_kwargs=True))
    if after is not None:
        handles.append(module.register_forward_hook(Hook(module, after, patches), with_kwargs=True))
    if leave is not None:
        hook = Hook(module, leave, patches)
        handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))
    return handles


def drop_hooks(module: nn.Module, patches: Switch) -> None:
    """Take a patch's hooks off a module; nothing where there are none (any more)."""
    for place in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(module, place)
        for number in [n for n, hook in hooks.items() if isinstance(hook, Hook) and hook.belongs_to(patches)]:
            for beside in (f"{place}_with_kwargs", f"{place}_always_called"):
                getattr(module, beside, {}).pop(number, None)
            hooks.pop(number, None)


def outermost_hooks(
    module: nn.Module,
    before: Callable[..., Any],
    after: Callable[..., Any],
    leave: Callable[..., Any],
    patches: Switch,
) -> list[RemovableHandle]:
    """Hooks that stay first before a call and last behind it, whoever registers hooks later.

    A replay runs the hooks of others again, so none of them may be left to run on what the replay gave: it would be
    applied twice.
    """
    ids: list[int] = []

    def first(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _to_the_end(module._forward_hooks, ids[1:])
        is_first = next(iter(module._forward_pre_hooks)) == ids[0]
        if not is_first:
            args, kwargs = _as_called(called, args, kwargs)
        changed = before(called, args, kwargs)
        if changed is not None and not is_first:
            raise UnsupportedContextError(
                "another hook has changed this call before ours could, so its latents cannot be moved; patch once that "
                "hook is there (FSDP2: shard the model first)"
            )
        return changed

    def last(*call: Any) -> None:
        leave(*call)
        # Not in `first`: torch is walking through the hooks before a call while one of them runs.
        _to_the_beginning(module._forward_pre_hooks, ids[:1])

    handles = plain_hooks(module, eagerly(first), eagerly(after), eagerly(last), patches)
    ids += [handle.id for handle in handles]
    return handles


def _as_called(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as the sampler gave them, before hooks that were registered in front of ours changed them.

    At the first call only: after it ours are in front again. FSDP2 casts and copies what it is given, caches too.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is module:
            return tuple(frame.f_locals["args"]), dict(frame.f_locals["kwargs"])
        frame = frame.f_back
    return args, kwargs


def _to_the_end(hooks: dict[int, Any], own: Sequence[int]) -> None:
    """Move hooks to the end of a module's, in their order, unless they are there."""
    if [*itertools.islice(reversed(hooks), len(own))] == [*reversed(own)]:
        return
    for number in own:
        if number in hooks:
            hooks[number] = hooks.pop(number)


def _to_the_beginning(hooks: dict[int, Any], own: Sequence[int]) -> None:
    """Move hooks to the beginning of a module's, in their order, unless they are there."""
    if [*itertools.islice(hooks, len(own))] == own:
        return
    for number in [number for number in hooks if number not in own]:
        hooks[number] = hooks.pop(number)
