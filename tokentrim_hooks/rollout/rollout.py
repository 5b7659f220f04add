"""Follows a denoiser: the forward hooks of a patched model.

The latents go down once: a call is parsed and given to its session (sessions.py), which classifies it (timeline.py);
its prediction is summarised and judged by the policy (session.py, regeneration.py), the verdict marked in the context
(pruner.py). What climbs back is the output that the sampler goes on with, and one record per chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tokentrim_hooks.adapter import Adapter, Match
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.inspection import Binder, profiled, weakly
from tokentrim_hooks.patching.callers import is_driven_by
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.pruning.autograd_modes import without_gradients
from tokentrim_hooks.pruning.call_scope import current_scope, open_scope, scope_of_call
from tokentrim_hooks.report.record import Report
from tokentrim_hooks.rollout.records import Recorder
from tokentrim_hooks.rollout.repeat.shown import Proof
from tokentrim_hooks.rollout.repeat.snapshot import clear_kept_marks
from tokentrim_hooks.rollout.session import Running, found_of
from tokentrim_hooks.rollout.sessions import Sessions
from tokentrim_hooks.rollout.shared import Probe, Shared


class Rollout:
    """``before``, ``after`` and ``leave`` are the forward hooks of a patched model's denoisers.

    Args:
        model: what was patched.
        adapter, match: of the model; the adapter has attached.
        policy, probe, recorder, failures: see :class:`Shared`.
        policies: all of them, in order; ``policy`` is the one that judges.
        layers: self-attention modules whose tapped function also serves cross attention; 0 if it does not.

    Attributes:
        unread_calls: calls that are no rollout's. foreign_calls: those of objects that share the denoiser.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        match: Match,
        policy: Policy,
        probe: Probe,
        recorder: Recorder,
        layers: int = 0,
        failures: FailurePolicy | None = None,
        policies: Sequence[Policy] = (),
    ) -> None:
        proof = Proof(layers, expected=layers)
        self.shared = Shared(
            policy, probe, match.patch_size, recorder, failures or FailurePolicy(), proof, policies=tuple(policies)
        )
        self.unread_calls = self.foreign_calls = 0
        self._model = weakly(model)
        self._denoisers = [weakly(denoiser) for denoiser in (match.denoiser, *match.also)]
        self._sessions = Sessions(adapter, self.shared)
        self._binder = Binder()

    # ------------------------------------------------------------------------------------------ hooks

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Find the call's session, which makes ready for it; return other arguments where a policy moves latents."""
        ranks, scope = self.shared.failures.ranks, current_scope()
        if scope is not None and scope.replayer is self.shared.proof:  # this call is ours, not the sampler's
            ranks.replays += 1
            return None
        ranks.enter()
        changed = profiled("tokentrim.before", self._begin, module, args, kwargs)
        ranks.begun()
        return changed

    def _begin(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        found = None
        if self._is_foreign(module):
            self.foreign_calls += 1
        else:
            found = self._sessions.of(self._binder(module, args, kwargs))
            self.unread_calls += found is None
        if found is None:
            # Inside another call this one has no dead tokens of its own.
            open_scope(None)
            return None
        return found.session.before(module, found, args, kwargs)

    def after(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """Let the session judge what came of the call; return the output that the sampler goes on with."""
        scope = scope_of_call()
        running = None if scope is None or scope.replayer is self.shared.proof else scope.note
        if not isinstance(running, Running) or running.found.session.shared is not self.shared:
            return output
        return profiled("tokentrim.after", without_gradients, self._come_back, module, running, output)

    def _come_back(self, module: nn.Module, running: Running, output: Any) -> Any:
        output = running.found.session.after(module, running, output)
        self._sessions.follow(running.found)
        return output

    def leave(self, _module: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        """Runs also when the call raises (then there is no output): neither tap nor arguments outlive the call."""
        scope = scope_of_call()
        if scope is None or scope.replayer is self.shared.proof:
            return
        found = found_of(scope)
        if found is not None:
            found.session.fail() if output is None else found.session.release()
        if scope.open:
            scope.close()

    def _is_foreign(self, denoiser: Any) -> bool:
        """Whether an object that was not patched and shares the denoiser makes the call, as ``Pipe(**components)``."""
        model = self._model()
        return model is not None and isinstance(denoiser, nn.Module) and not is_driven_by(model, denoiser)

    # ------------------------------------------------------------------------------------------ all sessions

    @property
    def under_way(self) -> int:
        """How many videos may yet go on: those whose context exists."""
        return sum(session.timeline.video is not None for session in self._sessions)

    def reset(self) -> None:
        """Forget statistics and marks: the next call begins a new video."""
        for session in self._sessions:
            session.reset()

    def release(self) -> None:
        """Let go of running calls: the patch comes off."""
        for session in self._sessions:
            session.release()

    def abandon(self) -> None:
        """Step aside for good: leave no mark in any cache."""
        pruned = any(session.pruner.dead for session in self._sessions)
        for session in self._sessions:
            session.abandon()
        for denoiser in self._denoisers if pruned else ():
            clear_kept_marks(denoiser())

    def clear_copies(self, memo: dict[int, Any]) -> None:
        """The model is being copied: a copy is not patched, so its caches carry no mark. ``memo`` is deepcopy's."""
        for session in self._sessions:
            session.pruner.clear_copies(memo)

    def snapshot(self) -> Report:
        """The report so far, chunks in progress included."""
        for session in self._sessions:
            session.idle()
        return self.shared.recorder.snapshot([(s.timeline.video, s.timeline.chunk) for s in self._sessions])
