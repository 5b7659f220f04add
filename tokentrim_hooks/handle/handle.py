"""The handle of one patched model: report, reset, unpatch; a context manager."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch.distributed import ProcessGroup

from tokentrim_hooks.adapter import Adapter, Match
from tokentrim_hooks.errors import PolicyError, TokenTrimWarning
from tokentrim_hooks.failures import FailurePolicy, OnError
from tokentrim_hooks.handle.checkup import ATTRIBUTE, FEW, Checkup, chunks_of, never_called, never_judged, owners_of
from tokentrim_hooks.patching.bypass import Bypass, bypassed
from tokentrim_hooks.patching.patches import Method, Patches
from tokentrim_hooks.policy.base import Policy, labelled
from tokentrim_hooks.ranks.agreement import ranks_of
from tokentrim_hooks.ranks.options import require_alike
from tokentrim_hooks.report.observers import Guarded, Observer, tell
from tokentrim_hooks.report.provenance import versions
from tokentrim_hooks.report.record import Report
from tokentrim_hooks.rollout.records import Recorder
from tokentrim_hooks.rollout.rollout import Rollout
from tokentrim_hooks.rollout.shared import Probe

_logger = logging.getLogger(__name__)


class PatchHandle:
    """What :func:`tokentrim_hooks.patch` returns. Leaving it as a context manager takes the patch off."""

    def __init__(
        self,
        adapter: Adapter,
        policies: Sequence[Policy],
        patches: Patches,
        rollout: Rollout,
        failures: FailurePolicy,
        checkup: Checkup,
    ) -> None:
        self.adapter = adapter
        self.policies = tuple(policies)
        """The policies in force, in order."""
        self._patches = patches
        self._rollout = rollout
        self._failures = failures
        self._checkup = checkup
        self._told = self._called = False
        self._unsure, self._heard = any(policy.judges for policy in policies), 0
        self._owners: list[Any] = []

    @classmethod
    def attach(
        cls,
        model: Any,
        adapter: Adapter,
        match: Match,
        policies: Sequence[Policy],
        probe: Probe,
        on_error: OnError,
        observers: Sequence[Observer] = (),
        group: ProcessGroup | None = None,
    ) -> PatchHandle:
        """Attach to a recognised model; if any step fails, everything is rolled back and the failure raised."""
        failures = FailurePolicy(on_error)
        patches = Patches(failures)
        checkup = Checkup(model, type(adapter), match)
        try:
            adapter.attach(model, patches)
            patches.require_tap(adapter.name)
            failures.ranks = ranks_of(adapter.group(model) if group is None else group)
            settings = _settings(adapter, match, policies, probe)
            require_alike(failures.ranks, {**settings, "on_error": on_error, "versions": None})
            recorder = Recorder(Report(settings), [Guarded(o) for o in observers])
            judge = judge_of(policies)
            rollout = Rollout(model, adapter, match, judge, probe, recorder, patches.layers, failures, policies)
            failures.on_step_aside(rollout.abandon)
            handle = cls(adapter, policies, patches, rollout, failures, checkup)
            handle._watch(match)
            for owner in {id(o): o for o in (model, *owners_of(match))}.values():
                handle._leave_card(owner)
            tell(recorder.observers, "on_start", recorder.report.settings)
        except BaseException:
            patches.undo()
            raise
        _logger.info("patched %s with adapter %r and %s", type(model).__qualname__, adapter.name, handle.policy)
        return handle

    @property
    def active(self) -> bool:
        """Whether the patch is on and working."""
        return self._patches.active and not self._failures.stepped_aside

    @property
    def report(self) -> Report:
        """Records so far, the chunk in progress included; a snapshot, so read it again after more chunks.

        Warns, once, if the denoiser is no longer the one that was patched; so do :meth:`reset` and :meth:`unpatch`.
        """
        report = self._rollout.snapshot()
        self._warn(self._replaced())
        return report

    @property
    def policy(self) -> Policy:
        """The policy that judges."""
        return self._rollout.shared.policy

    def reset(self) -> None:
        """Start a new video at the next call: statistics and marks are forgotten."""
        self._rollout.reset()
        self._warn(self._replaced())
        self._raise_fault()

    def unpatch(self) -> None:
        """Restore the model, to the attribute. Idempotent.

        Warns where the patch did nothing: the denoiser was replaced; it was called, but no chunk was recognised; only
        other pipelines called it; nobody did, though the model shows signs of a run (a patch that comes off unused says
        nothing); or three chunks and more were recorded and none was judged, which is said at the third one, too.
        """
        self._take_off()

    def _take_off(self, quiet: bool = False) -> None:
        """:meth:`unpatch`; with ``quiet`` without a warning: the patch gives way to another one, or to a failure."""
        if self._patches.gone:
            return
        words = "" if quiet else self._replaced(at_end=True)
        # A call that goes on, in whatever thread, prunes nothing from here on.
        self._rollout.shared.proof.enabled = False
        try:
            self._rollout.reset()
        finally:
            self._patches.undo()
            self._owners.clear()
            self._rollout.release()
        recorder = self._rollout.shared.recorder
        tell(recorder.observers, "on_end")
        _logger.info("unpatched: %s", recorder.report.summary().splitlines()[0])
        self._warn(words or ("" if quiet else self._idle()), stacklevel=4)
        if not quiet:
            self._failures.raise_waiting()
            self._raise_fault()

    def _replaced(self, at_end: bool = False) -> str:
        """What became of the denoiser, unless it is in order; said once while the patch is on, and once at its end."""
        return "" if (self._told and not at_end) or not self.active else self._checkup.replaced()

    def _idle(self) -> str:
        """Why nothing was judged, in words; empty if something was, if nobody ran the model, or if we stepped aside."""
        if self._failures.stepped_aside:
            return ""
        report = self._rollout.shared.recorder.report
        if len(report):
            return never_judged(report) if self.policy.judges else ""
        # A call that is in no count was refused, and whoever made it has been told.
        if self._bypass.heard:
            return bypassed("its denoiser")
        signs = "" if self._called else self._checkup.signs_of_run()
        return never_called(self._rollout.foreign_calls, self._rollout.unread_calls, signs)

    def _listen(self) -> None:
        """Look at the first chunks as they are recorded: if none of them is judged, no later one may be."""
        report = self._rollout.shared.recorder.report
        if len(report) == self._heard:
            return
        self._heard = len(report)
        judged = any(record.severity is not None for record in report)
        words = "" if judged else never_judged(report, self._rollout.under_way)
        # Not for ever: the report is looked through, and at the end it is once more.
        self._unsure = not judged and not words and len(chunks_of(report)) < 4 * FEW
        self._warn(words)

    def _raise_fault(self) -> None:
        """What the last chunk's record has shown follows ``on_error`` like any failure."""
        try:
            self._rollout.shared.recorder.raise_fault()
        except PolicyError as failure:
            if not self._failures.forgives(failure):
                raise

    def _tell_of_forward(self, name: str) -> None:
        self._warn(bypassed(name), stacklevel=6)

    def _warn(self, words: str, stacklevel: int = 3) -> None:
        if words:
            self._told = True
            warnings.warn(words, TokenTrimWarning, stacklevel=stacklevel)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A failure speaks for itself: it may have come before the first call.
        self._take_off(quiet=kind is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        self._rollout.clear_copies(memo)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return type(None), ()

    def __repr__(self) -> str:
        state = "active" if self.active else "off"
        return f"<PatchHandle {self.adapter.name} {self.policy} {state}>"

    def _leave_card(self, owner: Any) -> None:
        put = type.__setattr__ if isinstance(owner, type) else object.__setattr__
        take = type.__delattr__ if isinstance(owner, type) else object.__delattr__
        self._patches.on_undo(lambda: take(owner, ATTRIBUTE) if ATTRIBUTE in vars(owner) else None)
        put(owner, ATTRIBUTE, self)
        self._owners.append(owner)

    def _watch(self, match: Match) -> None:
        """Hook the rollout onto the denoiser's calls, and onto those of further denoisers."""
        bypass = self._bypass = Bypass(self._patches, (match.denoiser, *match.also), self._tell_of_forward)
        self._patches.on_undo(bypass.off)
        before, after, leave = self._guard(self._rollout.before), self._guard(self._rollout.after), self._rollout.leave
        if isinstance(match.denoiser, Method):
            self._patches.watch(match.denoiser, before, after, leave)
        else:
            self._patches.hook(match.denoiser, before, after, leave, outermost=True)
        for other in match.also:
            self._patches.hook(other, before, after, leave, outermost=True)

    def _guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Run our part of a call so that its failure follows ``on_error``: raise, or warn and step aside."""

        def guarded(module: Any, args: Any, kwargs: Any, *output: Any) -> Any:
            if not self._called:
                self._called = True
                self._bypass.off()
            if self._failures.stepped_aside:
                self._failures.stand_by(ended=bool(output))
                return None
            recorder = self._rollout.shared.recorder
            if recorder.telling is not None:
                recorder.refuse_observers()
            try:
                found = function(module, args, kwargs, *output)
                if recorder.fault is not None:
                    recorder.raise_fault()
            except Exception as failure:
                if not self._failures.forgives(failure):
                    raise
                return None
            if self._unsure:
                self._listen()
            return found

        return guarded


def give_way(handle: PatchHandle) -> None:
    """Take a patch off because another one comes: nobody waits for a word of what it did not see."""
    handle._take_off(quiet=True)


def handle_of(model: Any) -> PatchHandle | None:
    """The active handle of a model, or None; shallow copies have the attribute too, but they are not patched."""
    handle = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    return handle if isinstance(handle, PatchHandle) and any(owner is model for owner in handle._owners) else None


def judge_of(policies: Sequence[Policy]) -> Policy:
    """The policy that judges; one that judges nothing where there is none.

    Raises:
        ValueError: there are two.
    """
    judges = [policy for policy in policies if policy.judges]
    if len(judges) > 1:
        names = " and ".join(type(policy).__name__ for policy in judges)
        raise ValueError(f"two policies judge a chunk, {names}: give one of them")
    return judges[0] if judges else Policy()


def _settings(adapter: Adapter, match: Match, policies: Sequence[Policy], probe: str) -> dict[str, Any]:
    """What the log records of a patch: the judge's options as ``policy.option``, others' with their policy's name."""
    denoiser, options = match.denoiser, dict[str, Any]()
    for label, policy in labelled(policies):
        prefix = "policy" if policy.judges else f"policy.{label}"
        options |= {f"{prefix}.{name}": value for name, value in policy.settings().items()}
    return {
        "adapter": adapter.name,
        "policy": " + ".join(type(policy.acting).__name__ for policy in policies),
        **options,
        "probe": probe,
        "patch_size": list(match.patch_size),
        "denoiser": denoiser.name if isinstance(denoiser, Method) else type(denoiser).__name__,
        "versions": versions(),
    }
