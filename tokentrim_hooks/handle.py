"""The handle of one patched model: report, reset, unpatch; a context manager."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from tokentrim_hooks.adapter import Adapter, Match
from tokentrim_hooks.errors import TokenTrimWarning
from tokentrim_hooks.patching.patches import Method, Patches
from tokentrim_hooks.patching.tap_site import eagerly
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.report.observers import Guarded, Observer, tell
from tokentrim_hooks.report.provenance import versions
from tokentrim_hooks.report.record import Report
from tokentrim_hooks.rollout.rollout import Probe, Rollout

ATTRIBUTE = "_tokentrim_handle"


class PatchHandle:
    """What :func:`tokentrim_hooks.patch` returns. Leaving it as a context manager takes the patch off."""

    def __init__(self, adapter: Adapter, patches: Patches, rollout: Rollout, on_error: str) -> None:
        self.adapter = adapter
        self._patches = patches
        self._rollout = rollout
        self._on_error = on_error
        self._gave_up = False

    @classmethod
    def attach(
        cls,
        model: Any,
        adapter: Adapter,
        match: Match,
        policy: Policy,
        probe: Probe,
        on_error: str,
        observers: Sequence[Observer] = (),
    ) -> PatchHandle:
        """Attach to a recognised model; if any step fails, everything is rolled back and the failure raised."""
        patches = Patches()
        try:
            adapter.attach(model, patches)
            patches.require_tap(adapter.name)
            report = Report(_settings(adapter, match, policy, probe))
            guarded = [Guarded(observer) for observer in observers]
            rollout = Rollout(adapter, match, policy, probe, report, patches.layers, guarded)
            handle = cls(adapter, patches, rollout, on_error)
            patches.forgive = rollout.forgive = handle._forgive
            before, after = handle._guard(rollout.before), handle._guard(rollout.after)
            if isinstance(match.denoiser, Method):
                patches.watch(match.denoiser, before, after, rollout.leave)
            else:
                patches.hook(match.denoiser, before, after, rollout.leave)
            for other in match.also:
                patches.hook(other, before, after, rollout.leave)
            for owner in {id(o): o for o in (model, *owners_of(match))}.values():
                handle._leave_card(owner)
            tell(guarded, "on_start", report.settings)
        except BaseException:
            patches.undo()
            raise
        return handle

    @property
    def active(self) -> bool:
        """Whether the patch is on and working."""
        return self._patches.active and not self._gave_up

    @property
    def report(self) -> Report:
        """Records so far, the chunk in progress included; a snapshot, so read it again after more chunks."""
        return self._rollout.snapshot()

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._rollout.policy

    def reset(self) -> None:
        """Start a new video at the next call: statistics and marks are forgotten."""
        self._rollout.reset()

    def unpatch(self) -> None:
        """Restore the model, to the attribute. Idempotent. Warns if a patched run saw no chunk at all."""
        if not self._patches.active:
            return
        try:
            self._rollout.reset()
        finally:
            self._patches.undo()
            self._rollout.release()
        tell(self._rollout.observers, "on_end")
        if not self._gave_up and self._rollout.unread_calls and not len(self._rollout.report):
            warnings.warn(
                "tokentrim was patched in and the denoiser was called, but no chunk was recognised: nothing was "
                "judged or pruned",
                TokenTrimWarning,
                stacklevel=2,
            )

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()

    def __repr__(self) -> str:
        state = "active" if self.active else "off"
        return f"<PatchHandle {self.adapter.name} {self.policy} {state}>"

    def _leave_card(self, owner: Any) -> None:
        put = type.__setattr__ if isinstance(owner, type) else object.__setattr__
        take = type.__delattr__ if isinstance(owner, type) else object.__delattr__
        put(owner, ATTRIBUTE, self)
        self._patches.on_undo(lambda: take(owner, ATTRIBUTE))

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Run our part of a call so that its failure follows ``on_error``: raise, or warn and step aside."""

        def guarded(module: Any, args: Any, kwargs: Any, *output: Any) -> Any:
            if self._gave_up:
                return None
            try:
                return function(module, args, kwargs, *output)
            except Exception as failure:
                if not self._forgive(failure):
                    raise
                return None

        return eagerly(guarded)

    def _forgive(self, failure: Exception) -> bool:
        """Whether generation goes on after a failure of ours: with ``on_error="warn"``, unpatched."""
        if self._on_error == "warn" and not self._gave_up:
            self._give_up(failure)
        return self._gave_up

    def _give_up(self, failure: Exception) -> None:
        self._gave_up = True
        self._rollout.abandon()
        warnings.warn(
            f"tokentrim stepped aside, generation goes on unpatched: {type(failure).__name__}: {failure}",
            TokenTrimWarning,
            stacklevel=4,
        )


def owners_of(match: Match) -> list[Any]:
    """The objects or classes that carry the patch: of the denoiser and of further ones."""
    return [match.denoiser.owner if isinstance(match.denoiser, Method) else match.denoiser, *match.also]


def handle_of(model: Any) -> PatchHandle | None:
    """The active handle that a model carries, or None."""
    handle = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    return handle if isinstance(handle, PatchHandle) and handle._patches.active else None


def _denoiser_name(match: Match) -> str:
    denoiser = match.denoiser
    return denoiser.name if isinstance(denoiser, Method) else type(denoiser).__name__


def _nothing() -> None:
    """What a pickled handle becomes."""


def _settings(adapter: Adapter, match: Match, policy: Policy, probe: str) -> dict[str, Any]:
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    return {
        "adapter": adapter.name,
        "policy": type(policy).__name__,
        **{f"policy.{field.name}": getattr(policy, field.name) for field in fields},
        "probe": probe,
        "patch_size": list(match.patch_size),
        "denoiser": _denoiser_name(match),
        "torch": torch.__version__,
        "versions": versions(),
    }
