"""All that hangs on one model, and how it comes off: an undo stack and a dead-man's switch.

Modules get forward hooks (they survive offloading and keep signatures); methods and module-level functions get wrapt
wrappers. Everything is inert as soon as ``active`` is False, also a copy that somebody else kept. A copied or pickled
model carries inert remains only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import wrapt
from torch import Tensor, nn

from tokentrim_hooks.errors import AttachError
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.patching.compiled import Watch
from tokentrim_hooks.patching.hooks import drop_hooks, outermost_hooks, plain_hooks
from tokentrim_hooks.patching.tap_names import TapNames
from tokentrim_hooks.patching.tap_site import MISSING, TapSite, as_itself, depth_hooks, eagerly
from tokentrim_hooks.pruning.call_scope import BUSY, current_tap


@dataclass(frozen=True)
class Method:
    """A denoiser that is a method, not a module: method ``name`` of an object, or of a class for all its instances."""

    owner: Any
    name: str


_logger = logging.getLogger(__name__)


class Wrapper(wrapt.FunctionWrapper[Any, Any]):
    """A wrapt wrapper whose copies and pickles are the original."""

    def __copy__(self) -> Any:
        return self.__wrapped__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> Any:
        return as_itself(self.__wrapped__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()


class WatchedCall:
    """A wrapped function that remembers what came of its call: a value, or a failure of its own."""

    def __init__(self, wrapped: Callable[..., Any]) -> None:
        functools.update_wrapper(self, wrapped)
        self._wrapped = wrapped
        self.given = False
        self.value: Any = None
        self.failure: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped function."""
        try:
            self.value = self._wrapped(*args, **kwargs)
        except Exception as failure:
            self.failure = failure
            raise
        self.given = True
        return self.value


class Patches:
    """Undo stack of one patched model. Adapters call :meth:`tap` and :meth:`wrap`; undoing is the core's business.

    Args:
        failures: what follows a failure of an adapter's wrapper.
    """

    def __init__(self, failures: FailurePolicy | None = None) -> None:
        self.active = True
        self.taps = 0
        self.layers = 0
        self._failures = failures or FailurePolicy()
        self._undo: list[Callable[[], None]] = []

    def hook(
        self,
        module: nn.Module,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
        leave: Callable[..., Any] | None = None,
        outermost: bool = False,
    ) -> None:
        """Watch the calls of a module: ``before(module, args, kwargs)``, ``after(module, args, kwargs, output)``.

        ``leave`` has ``after``'s signature and runs also when the call raises an Exception. With ``outermost`` these
        stay the first and the last hooks of the module, whoever registers others later; all three are needed then.
        """
        # What takes them off is there before they are, here and below: Ctrl-C may come in between.
        if outermost and before and after and leave:
            watch = Watch(module, before, after, leave, self, self._put)
            self._undo.append(lambda: drop_hooks(module, watch))
            outermost_hooks(module, watch.before, after, leave, watch)
            self._stand_outside(module, watch)
        else:
            self._undo.append(lambda: drop_hooks(module, self))
            plain_hooks(module, before, after, leave, self)

    def _stand_outside(self, module: nn.Module, watch: Watch) -> None:
        """Stay out of the denoiser's graph, whether it is compiled in place or by ``torch.compile(module)``."""
        self._wrap(module, "compile", watch.compiled)
        called = module.__call__
        self._put(module, "__call__", watch.enter_at(called, called))

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
        heads: str | None = None,
        within: Iterable[nn.Module] = (),
        only: Callable[[Tensor], bool] | None = None,
    ) -> None:
        """Let only live keys reach the attention function ``namespace.name``.

        ``namespace`` is a module of Python, a dict, or an attention module of the model (``name`` is ``"forward"``).
        The names say which parameters hold q, k, v: ``[B, length, heads, head_dim]``, or with ``heads_first``
        ``[B, heads, length, head_dim]``, or ``[B, length, heads * head_dim]``, where ``heads`` names the parameter with
        the number of heads. The result is ``[B, length, ...]``, or a tuple that begins with it.
        Where the same function also serves cross attention, ``within`` lists the self-attention modules in whose
        calls it counts: so is ``torch.nn.functional.scaled_dot_product_attention``, whose names are known, tapped for
        modules that call it inside their own forward.
        A call that sets a parameter named in ``refuse`` raises instead of going wrong. ``lengths`` names the parameter
        with the number of keys of each sample, where all given keys are valid. ``only(v)``, a function of a module,
        says whether a call reads the context, where the same function also reads a memory of something else.

        Raises:
            AttachError: there is no such function, it has no parameter of that name, or it is tapped otherwise already.
        """
        names = TapNames(q, k, v, mask, refuse, heads_first, lengths, heads, only=only)
        self._undo.append(lambda: TapSite.release(namespace, name, self))
        TapSite.use(namespace, name, names, self)
        self.taps += 1
        modules = list(within)
        self.layers += len(modules)
        for module in modules:
            self.hook(module, before=depth_hooks()[0], leave=depth_hooks()[1])
        where = f"only inside {len(modules)} self-attention modules" if modules else "which only self attention calls"
        _logger.info("tapped %s.%s, %s", _name_of(namespace), name, where)

    def tap_packed(self, owner: Any, name: str, attend: Callable[..., Any]) -> None:
        """Tap an attention method that packs queries of several chunks, each with a range of keys of its own.

        While something is dead ``attend(tap, attention, *args, **kwargs)`` stands in for the calls of
        ``owner.name``: it asks ``tap.live_range(...)`` for each range and calls ``attention``, the original, on what
        is left. Calls in which it asks nothing count as no attention over the context.
        """

        def through(attention: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tap = current_tap()
            if tap is None or tap.off:
                return attention(*args, **kwargs)
            try:
                with tap.counting_ranges():
                    return attend(tap, attention, *args, **kwargs)
            except Exception as failure:
                if not tap.steps_aside(failure):
                    raise
                return attention(*args, **kwargs)

        through = eagerly(through)

        def tapped(attention: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return through(attention, args, kwargs) if BUSY.maybe else attention(*args, **kwargs)

        self._wrap(owner, name, tapped)
        self.taps += 1
        _logger.info("tapped %s.%s, which packs queries of several chunks", _name_of(owner), name)

    def wrap(
        self,
        owner: Any,
        name: str,
        wrapper: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any],
        *,
        pruned_only: bool = False,
    ) -> None:
        """Wrap a method or function, wrapt style: ``wrapper(wrapped, instance, args, kwargs)``.

        With ``pruned_only`` it comes in only where something is dead in the context of the denoiser call (or hidden
        from it): what keeps dead rows out of a model's memory reads and allocates nothing before.
        With ``on_error="warn"`` a failure of ``wrapper`` itself costs the call nothing: ``wrapped`` answers alone.
        """

        def guarded(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if pruned_only and not (BUSY.now and current_tap()):
                return wrapped(*args, **kwargs)
            original = WatchedCall(wrapped)
            try:
                return wrapper(original, instance, args, kwargs)
            except Exception as failure:
                if failure is original.failure or not self._failures.forgives(failure):
                    raise
                return original.value if original.given else wrapped(*args, **kwargs)

        self._wrap(owner, name, guarded)

    def _wrap(self, owner: Any, name: str, wrapper: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self._put(owner, name, Wrapper(getattr(owner, name), wrapper, enabled=lambda: self.active))

    def _put(self, owner: Any, name: str, stand_in: Any) -> None:
        """Put something in the place of an attribute, which comes back when the patch comes off."""
        before = vars(owner).get(name, MISSING)

        def undo() -> None:
            if vars(owner).get(name) is not stand_in:
                return
            if before is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)
        setattr(owner, name, stand_in)

    def watch(
        self,
        method: Method,
        before: Callable[..., Any],
        after: Callable[..., Any],
        leave: Callable[..., Any],
    ) -> None:
        """Watch the calls of a method as :meth:`hook` watches a module's; the wrapped method stands for the module."""
        before, after = eagerly(before), eagerly(after)

        def watched(wrapped: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = None
            try:
                args, kwargs = before(wrapped, args, kwargs) or (args, kwargs)
                output = wrapped(*args, **kwargs)
                replaced = after(wrapped, args, kwargs, output)
                return output if replaced is None else replaced
            finally:
                leave(wrapped, args, kwargs, output)

        self._wrap(method.owner, method.name, watched)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Run ``action`` when the patch comes off."""
        self._undo.append(action)

    def require_tap(self, adapter: str) -> None:
        """Raise AttachError if the adapter attached nothing that could prune."""
        if not self.taps:
            raise AttachError(
                f"adapter {adapter!r} found no attention function to tap; "
                "nothing was patched. Report it as a bug"
            )

    @property
    def gone(self) -> bool:
        """Whether everything was taken off."""
        return not self.active and not self._undo

    def undo(self) -> None:
        """Take everything off, last first; runs to the end even if a step fails, then raises the first failure."""
        # The dead-man's switch comes first: what somebody has kept, copied or wrapped since does nothing from now on,
        # also if taking it off fails. Last first, because a wrapper that was put on another one can only be taken off
        # before it; what somebody else has wrapped meanwhile stays where it is, inert.
        self.active = False
        failures: list[Exception] = []
        while steps := self._undo[-1:]:
            try:
                steps[0]()
            except Exception as failure:
                failures.append(failure)
            # Not before: a step in which Ctrl-C comes is taken again when this is called again.
            with contextlib.suppress(ValueError):
                self._undo.remove(steps[0])
        if failures:
            raise failures[0]


def _name_of(owner: Any) -> str:
    """What a log calls an object that something was tapped on: a Python module by its name, else by its class."""
    return str(getattr(owner, "__name__", type(owner).__name__))
