"""Every error and warning that tokentrim raises, so that callers can catch them by name; and which are none of ours."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from types import CodeType


class TokenTrimError(Exception):
    """Base class of all errors raised by this package."""


class UnsupportedModelError(TokenTrimError):
    """No installed adapter recognises the model; the message gives every adapter's reason."""


class AmbiguousModelError(TokenTrimError):
    """Several adapters recognise the model; the message names them and how to choose."""


class UnknownAdapterError(TokenTrimError):
    """``adapter=`` names an adapter that is not installed."""


class UnknownObserverError(TokenTrimError):
    """An observer was asked for by a name that no installed plugin provides."""


class UnknownPolicyError(TokenTrimError):
    """A policy was asked for by a name that no installed plugin provides."""


class AlreadyPatchedError(TokenTrimError):
    """The model carries a patch already and ``replace=True`` was not given."""


class CompiledModelError(TokenTrimError):
    """The model was compiled before it was patched, so its hooks would never run."""


class AttachError(TokenTrimError):
    """An adapter recognised the model but found nothing to attach to."""


class UnsupportedProbeError(TokenTrimError):
    """The chosen probe cannot be computed for this model or sampler."""


class UnsupportedContextError(TokenTrimError):
    """The context of this call cannot be pruned exactly (quantised, sharded, foreign layout)."""


class SessionError(TokenTrimError):
    """Two videos are made at the same time on one model, and its calls do not show which is whose."""


class RankError(TokenTrimError):
    """Another rank that shares the model has failed or gone, or is at another chunk; the message names it."""


class UnsupportedPolicyError(TokenTrimError):
    """A policy asks for something that this model, or its adapter, does not have; the message says what."""


class PolicyError(TokenTrimError):
    """A policy gave an answer of the wrong kind; the message names the policy, the hook and what it takes."""


class LatentsError(TokenTrimError):
    """Latents have a shape, batch size or value (NaN, inf) that cannot be judged."""


class PluginError(TokenTrimError):
    """A name was asked for that two plugins claim, or a plugin fails or breaks the hook's contract."""


class ReportError(TokenTrimError):
    """A folder holds no readable report, or an empty one."""


class VideoError(TokenTrimError):
    """A video cannot be read, or is not one."""


class MissingExtraError(TokenTrimError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class TokenTrimWarning(UserWarning):
    """Generation goes on without pruning; a patch saw nothing, and why; or compiled code runs eagerly for a while."""


def of_a_signal(failure: BaseException) -> BaseException | None:
    """What a signal handler of the user's has raised while our code ran, as a time limit does; None if it is ours.

    It ends a call as it would anywhere else, whatever ``on_error`` is. Looked for in what ``failure`` was made of, too:
    a TimeoutError is an OSError, of which we make words.
    """
    handlers = set(_handlers())
    found: BaseException | None = failure
    while found is not None:
        step = found.__traceback__
        while step is not None:
            if step.tb_frame.f_code in handlers:
                return found
            step = step.tb_next
        found = found.__cause__
    return None


def _handlers() -> Iterator[CodeType]:
    """The code of all signal handlers that are written in Python."""
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        if not callable(handler):  # SIG_DFL, SIG_IGN, or one of C
            continue
        for each in (handler, getattr(handler, "__func__", None), type(handler).__call__):
            code = getattr(each, "__code__", None)
            if isinstance(code, CodeType):
                yield code
