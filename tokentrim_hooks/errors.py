"""Every error and warning that tokentrim raises, so that callers can catch them by name."""

from __future__ import annotations


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
