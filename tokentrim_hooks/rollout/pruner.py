"""One model's pruning: chooses tombstones or key selection by the context, proves itself once, cleans up."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tokentrim_hooks.adapter import Adapter, Call
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import grid_of
from tokentrim_hooks.pruning.context import CacheRows, anchor_frames
from tokentrim_hooks.pruning.key_selection import Ledger
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.pruning.tombstones import Tombstones, Traces


class Pruner:
    """Applies verdicts to contexts and gives every denoiser call its tap.

    ``enabled`` turns False when the self-check of the first prune failed; ``proven`` turns True when it passed.
    """

    def __init__(self, adapter: Adapter, patch_size: tuple[int, int], policy: Policy, layers: int = 0) -> None:
        self.enabled = True
        self.proven = False
        self.finding = ""
        self.anchors = 0
        """Frames of the context that the latest prune spared as sinks or anchors."""
        self._adapter = adapter
        self._patch_size = patch_size
        self._anchors = bool(getattr(policy, "prune_anchors", False))
        self._layers = layers
        self._ledger = Ledger(self._anchors, getattr(policy, "coarse", "any"))
        self._tombstones = Tombstones()
        # Weak: a sampler that drops its cache must get the memory back, marks or no marks.
        self._marked: dict[Hashable, Traces] = {}
        self._expected = layers
        self._last: CallTap | None = None

    @property
    def dead(self) -> bool:
        """Whether anything may be dead in the context."""
        return bool(self._marked or self._ledger.killed)

    def tap(self, call: Call) -> CallTap | None:
        """Tap for one denoiser call; None while nothing is dead, so that nothing is computed."""
        if not self.dead:
            return None
        layout = None
        if self._ledger.killed:
            context = self._adapter.context(call)
            assert not isinstance(context, CacheRows), "a model keeps its context in one way"
            layout = context
        self._last = CallTap(layout, self._ledger, gated=self._layers > 0)
        return self._last

    def prune(self, call: Call, tokens: Sequence[Sequence[int]], chunk: int) -> int:
        """Kill ``tokens`` (one list a sample) in the context of ``call`` for ``chunk``; return rows newly dead."""
        context = self._adapter.context(call)
        self.anchors = 0 if self._anchors else anchor_frames(context)
        if not isinstance(context, CacheRows):
            self._expected = context.attentions or self._expected
            return self._ledger.kill(context, tokens, chunk, grid_of(call.latents, self._patch_size))
        dead = self._tombstones.mark(context, tokens, self._anchors)
        if dead:
            self._marked[call.stream] = Traces.of(context.values)
            self._expected = len(context.values)
        return dead

    def follow(self, call: Call) -> None:
        """After a call: find the marks again where the cache made its tensors anew (concatenation copies the marks)."""
        traces = self._marked.get(call.stream)
        if traces is not None and traces.lost:
            context = self._adapter.context(call)
            assert isinstance(context, CacheRows)
            self._marked[call.stream] = Traces.of(context.values)

    def check(self, finite: bool) -> bool:
        """Self-check after the first prune and replay; on failure everything is revived and pruning stays off."""
        tap = self._last
        calls, dropped, expected = (tap.calls, tap.dropped, max(self._expected, 1)) if tap else (0, 0, 1)
        self.finding = f"{calls} of {expected} attention calls tapped, {dropped} keys dropped, output finite: {finite}"
        self.proven = finite and dropped > 0 and calls >= expected
        if not self.proven:
            self.enabled = False
            self._tombstones.revive()
            self._ledger.killed.clear()
            self._marked.clear()
        return self.proven

    def revive(self, chunk: int) -> None:
        """Bring back what was pruned for ``chunk``; valid until that chunk's rows move."""
        self._tombstones.revive()
        self._marked.clear()
        self._ledger.forget(chunk)

    def settle(self) -> None:
        """The prune is final: the pruned context goes forward."""
        self._tombstones.settle()

    def clear(self) -> None:
        """Forget all marks and leave no cache poisoned: a new video starts, or the patch comes off."""
        self._tombstones.revive()
        for traces in self._marked.values():
            traces.clear()
        self._marked.clear()
        self._ledger.killed.clear()
