"""The public face: patch, unpatch, patched, is_patched, detect, adapters, policies."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from tokentrim_hooks.adapter import Adapter, Match
from tokentrim_hooks.errors import (
    AlreadyPatchedError,
    CompiledModelError,
    PluginError,
    TokenTrimError,
    TokenTrimWarning,
    UnsupportedPolicyError,
    UnsupportedProbeError,
)
from tokentrim_hooks.failures import OnError
from tokentrim_hooks.handle.checkup import owners_of
from tokentrim_hooks.handle.choice import Detection, ask_all, choose
from tokentrim_hooks.handle.handle import PatchHandle, give_way, handle_of, judge_of
from tokentrim_hooks.inspection import compiled_part
from tokentrim_hooks.loading import FAILURES, why
from tokentrim_hooks.patching.patches import Method
from tokentrim_hooks.plugins import (
    AdapterInfo,
    PolicyInfo,
    all_made,
    installed_adapters,
    installed_policies,
)
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.token_trim import DriftPolicy
from tokentrim_hooks.report.observers import Observer
from tokentrim_hooks.rollout.shared import Probe

NEEDS = {
    "commit": "calls that only write finished chunks into the context",
    "correct": "x0 that may be corrected before the sampler goes on with it",
    "settle": "rows of a cache that may be rewritten once they are committed",
    "hide": "rows that may be hidden from a single call",
    "weigh": "rows that a single call may read with less weight than others",
    "judge": "chunks that can be judged",
    "guide": "calls that can run with gradients on a scratch cache, for a sampler that goes on from x0 alone",
}
"""What an adapter lacks, in words."""


def patch(
    model: Any,
    policy: Policy | Sequence[Policy] | None = None,
    *,
    adapter: str | type[Adapter[Any]] | None = None,
    probe: Probe = "first-step",
    on_error: OnError = "raise",
    replace: bool = False,
    observers: Sequence[Observer | str] = (),
    group: ProcessGroup | None = None,
) -> PatchHandle:
    """Patch a model so that drifting tokens are pruned from its context while it generates.

    Args:
        model: a pipeline or generator that an installed adapter recognises; its source is never touched.
        policy: when and what to prune; ``DriftPolicy()`` (the paper's constants) by default. Several policies are asked
            in order; one of them may judge.
        adapter: name of the adapter to use, instead of detection; or its class, which need not be installed.
        probe: which prediction is judged: ``"first-step"`` (the chunk's first denoising iteration, paper section 1;
            one extra denoiser call per trigger) or ``"candidate"`` (the finished chunk, Algorithm 1; a whole chunk).
        on_error: ``"raise"``, or ``"warn"`` to go on unpatched rather than lose a long generation.
        replace: take an existing patch off first, instead of raising AlreadyPatchedError.
        observers: told of every accepted chunk while the run goes on (:class:`JsonLines`, :class:`ProgressLine`, ...);
            a string names an observer of an installed plugin, as for :func:`make_observer`.
        group: the ranks that make this one video together, where the model itself communicates (tensor or sequence
            parallel): all of them patch, in the same order and with the same options (compared at once), and agree on
            each verdict and on failures, with one small collective per judged chunk and one per regeneration. Default:
            what the adapter says, else none, and every rank judges its own video (data parallel).

    Returns:
        A handle with ``report``, ``reset()`` and ``unpatch()``; also a context manager.

    Raises:
        TokenTrimError: nothing is patched; its subclass says why (docs/errors.md): no adapter or several recognise the
            model, there is a patch already, the model was compiled first, a policy or probe does not suit it ...
        TypeError, ValueError: for a bad option.
    """
    policies = _policies(policy)
    _check_options(probe, on_error)
    chosen, match = choose(model, adapter)
    if probe == "candidate" and chosen.carry is Adapter.carry and chosen.carry_step is Adapter.carry_step:
        raise UnsupportedProbeError(f"adapter {chosen.name!r} cannot replay a whole chunk; use probe='first-step'")
    _require_hooks(chosen, policies)
    existing = _patches_on(model, match, replace)
    for denoiser in (match.denoiser, *match.also):
        _refuse_compiled(denoiser)
    instance, watching = _made(chosen), all_made(observers)
    for handle in existing:
        give_way(handle)
    return PatchHandle.attach(model, instance, match, policies, probe, on_error, watching, group)


def patch_in_engine(model: Any, adapter: type[Adapter[Any]], variable: str) -> PatchHandle | None:
    """Patch a model that an engine serves, for a plugin of that engine: nothing of ours may cost it a video.

    Args:
        model: the transformer, at its first call or before. adapter: of the engine.
        variable: of the environment: a JSON object of fields of :class:`DriftPolicy`; not set, the paper's.

    Returns:
        The handle; None where the model is patched already, or refused, which warns.

    Raises:
        TypeError, ValueError: the variable holds no fields of the policy.
    """
    if is_patched(model):
        return None
    text = os.environ.get(variable, "{}")
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"{variable} is {text!r}, no JSON object.\nGive fields of DriftPolicy, such as {{}}.")
    try:
        return patch(model, DriftPolicy(**fields), adapter=adapter, on_error="warn")
    except TokenTrimError as refusal:
        words = f"{type(model).__name__} stays unpatched: {refusal}"  # which says what to do
        warnings.warn(words, TokenTrimWarning, stacklevel=2)
        return None


def unpatch(model: Any) -> None:
    """Take the patch off ``model``; does nothing if there is none."""
    handle = handle_of(model)
    if handle is not None:
        handle.unpatch()


@contextmanager
def patched(model: Any, policy: Policy | Sequence[Policy] | None = None, **options: Any) -> Iterator[PatchHandle]:
    """``with patched(model) as handle:`` patch for the duration of a block; options as for :func:`patch`."""
    with patch(model, policy, **options) as handle:
        yield handle


def is_patched(model: Any) -> bool:
    """Whether ``model`` itself (a pipeline or its denoiser) carries an active patch."""
    return handle_of(model) is not None


def detect(model: Any) -> list[Detection]:
    """Ask every installed adapter whether it recognises ``model``, and why or why not."""
    return [found for found, _ in ask_all(model)]


def adapters() -> list[AdapterInfo]:
    """List installed adapters with their distributions, and plugins that failed to load with the reason."""
    return installed_adapters()


def policies() -> list[PolicyInfo]:
    """List the policies of installed plugins with their distributions, hooks and classes, by name."""
    return installed_policies()


def _policies(given: Policy | Sequence[Policy] | None) -> list[Policy]:
    """The policies as a list, checked."""
    if given is None:
        return [DriftPolicy()]
    policies: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    if not policies:
        raise ValueError("the list of policies is empty: give one, or ObservePolicy() to prune nothing")
    for policy in policies:
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be an object derived from tokentrim_hooks.Policy, {_instead_of(policy)}")
    judge_of(policies)
    return policies


def _instead_of(given: Any) -> str:
    """What was given for a policy, and what may have been meant."""
    if isinstance(given, type) and issubclass(given, Policy):
        return f"got the class {given.__name__}: call it, {given.__name__}()"
    if isinstance(given, str):
        return f"got {given!r}: make one of a name by tokentrim_hooks.make_policy(name)"
    return f"with judge(chunk, history), got {given!r}"


def _require_hooks(adapter: type[Adapter[Any]], policies: Sequence[Policy]) -> None:
    """Refuse a policy that needs what the model does not have."""
    for policy in policies:
        lacking = sorted(policy.needs - adapter.takes)
        if lacking:
            words = ", ".join(NEEDS.get(need, need) for need in lacking)
            raise UnsupportedPolicyError(
                f"{type(policy).__name__} cannot work on this model: adapter {adapter.name!r} has no {words}.\n"
                "Leave the policy out; `tokentrim adapters` and docs/models.md say which models take which hooks."
            )


def _check_options(probe: str, on_error: str) -> None:
    if probe not in ("first-step", "candidate"):
        raise ValueError(f"probe must be 'first-step' or 'candidate', got {probe!r}")
    if on_error not in ("raise", "warn"):
        raise ValueError(f"on_error must be 'raise' or 'warn', got {on_error!r}")


def _made(adapter: type[Adapter[Any]]) -> Adapter[Any]:
    """An instance of the adapter's class.

    Raises:
        PluginError: its constructor failed.
    """
    try:
        return adapter()
    except FAILURES as failure:
        raise PluginError(
            f"adapter {adapter.name!r} cannot be made: {why(failure)}.\nMend its plugin, or choose another with "
            "adapter=."
        ) from failure


def _patches_on(model: Any, match: Match, replace: bool) -> list[PatchHandle]:
    """Patches that have to come off first; one that is at work only where the user says ``replace``."""
    owners = (model, *owners_of(match))
    found = [handle for owner in (*owners, *map(type, owners)) if (handle := handle_of(owner)) is not None]
    if not replace and any(handle.active for handle in found):
        raise AlreadyPatchedError("this model is patched already; call handle.unpatch() or pass replace=True")
    return found


def _refuse_compiled(denoiser: nn.Module | Method) -> None:
    where = compiled_part(denoiser.owner if isinstance(denoiser, Method) else denoiser)
    if where:
        words = "was compiled before it was patched, and compiled code ignores new hooks"
        raise CompiledModelError(f"{where} {words}; call tokentrim.patch first, then compile")


__all__ = [
    "Detection",
    "TokenTrimError",
    "adapters",
    "detect",
    "is_patched",
    "patch",
    "patch_in_engine",
    "patched",
    "unpatch",
]
