"""One video's pruning: chooses tombstones or key selection by the context, proves itself, cleans up."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from tokentrim_hooks.adapter import Adapter, Call
from tokentrim_hooks.errors import TokenTrimWarning
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.drift import grid_of
from tokentrim_hooks.policy.views import Place
from tokentrim_hooks.pruning.account import KeyAccount
from tokentrim_hooks.pruning.account_of_hidden import AccountsOfHidden
from tokentrim_hooks.pruning.context import CacheRows, KeyLayout, anchor_frames, require_grid, require_history
from tokentrim_hooks.pruning.fleeting import FleetingMarks
from tokentrim_hooks.pruning.key_selection import DeadTokens
from tokentrim_hooks.pruning.samples import Samples
from tokentrim_hooks.pruning.sparing import account_of
from tokentrim_hooks.pruning.tap import CallTap
from tokentrim_hooks.pruning.tombstones import FOREIGN_MARKS, Tombstones, Traces, is_marked
from tokentrim_hooks.rollout.answers import context_of
from tokentrim_hooks.rollout.repeat.shown import Proof
from tokentrim_hooks.rollout.scene import Act
from tokentrim_hooks.rollout.steering import Steering, frames_of, require_taken

_logger = logging.getLogger(__name__)


class Pruner:
    """One video's pruning: applies verdicts to its context and gives every denoiser call its tap.

    Args:
        adapter, patch_size: of the model.
        policy: its options ``prune_anchors`` and ``coarse`` say which rows die.
        proof: of the model. failures: what follows a failure of a tap.
        steering: says what policies hide from a single call.

    Attributes:
        anchors: latent frames that the latest prune spared. acts: which policies hid rows from the latest call.
        steering: None where no policy hides.
    """

    def __init__(
        self,
        adapter: Adapter,
        patch_size: tuple[int, int],
        policy: Policy,
        proof: Proof,
        failures: FailurePolicy | None = None,
        steering: Steering | None = None,
    ) -> None:
        self.proof, self.anchors = proof, 0
        self._adapter, self._patch_size, self._policy, self._failures = adapter, patch_size, policy, failures
        self._dead_tokens, self._tombstones = DeadTokens(policy.prune_anchors, policy.coarse), Tombstones()
        self._marked: dict[Hashable, Traces] = {}  # weak: who drops a cache gets the memory back, marks or no marks
        self._left: list[Traces] = []  # where marks were copied from, if that is still there
        self._accounts, self._of_hidden = dict[Hashable, KeyAccount](), AccountsOfHidden(adapter.keeps_memory)
        self._last: CallTap | None = None
        self.steering = steering if steering and steering.hides else None
        self._fleeting = FleetingMarks(adapter.keeps_memory)
        self.acts: list[Act] = []
        self._shown: list[tuple[int, int]] = []  # of earlier parts of one call: attention calls tapped, dead keys
        # Of the chunk in progress: frames with a key, calls with a tap, whether any of them dropped a dead key.
        self._frames: set[int] = set()
        self._tapped, self._dropped, self._hid = 0, False, False

    @property
    def dead(self) -> bool:
        """Whether anything may be dead in the context."""
        return bool(self._marked or self._dead_tokens)

    def tap(self, call: Call, place: Place | None = None, part: Samples | None = None) -> CallTap | None:
        """Tap for one denoiser call; None while nothing is dead or hidden, so that nothing is computed.

        Args:
            call: the call. place: where its video is, for policies that hide rows from it.
            part: samples that the call is made with, where not with all of the batch.
        """
        goes_on = self._last is not None and part is not None and part.before > 0
        self._shown = [*self._shown, self._numbers()] if goes_on else []
        self.let_go()
        if not (self.steering or self._marked or self._dead_tokens.killed_by or self._fleeting.rows):
            return None
        if self.dead and not self.proof.enabled:
            self.clear()  # the proof has failed for another video of this model since
        layout, hidden = self._hide(call, place)
        if not (self.dead or hidden or self._fleeting.rows):
            return None
        if self._dead_tokens and layout is None:
            layout = context_of(self._adapter, call)  # type: ignore[assignment]
            assert not isinstance(layout, CacheRows), "a model keeps its context in one way"
        self._frames |= set() if layout is None else layout.frames
        self._tapped += self.dead
        veil, gated = self._fleeting if self._hid else None, self.proof.layers > 0
        if account := self._accounts.get(call.stream) if call.stream in self._marked else None:
            account.begin(call.start)
        elif place is not None and part is None and (hides := self._fleeting.context):
            account = self._of_hidden.account(hides, call.stream, place.phase, call.start)
        own = call.frames * math.prod(grid_of(call.latents, self._patch_size))
        dead, failures = self._dead_tokens, self._failures
        if part is not None:  # one that fails is followed by the whole batch: nobody steps aside for it
            dead, failures, hidden = dead.of(part), FailurePolicy(), tuple(each.of(part) for each in hidden)
        self._last = CallTap(layout, dead, gated, failures, hidden, veil, account, own, part)
        return self._last

    def _hide(self, call: Call, place: Place | None) -> tuple[KeyLayout | None, tuple[DeadTokens, ...]]:
        """Hide from one call what policies say: by fleeting marks in a cache, else by a layout and the tokens in it."""
        self.acts, self._hid = [], False
        steering = self.steering
        if steering is None or place is None or not self.proof.enabled:
            return None, ()
        context = context_of(self._adapter, call)
        (masks, self.acts), weights = steering.hidden(call, place, context), steering.weights
        if not masks and weights is None:
            return None, ()
        require_taken(self._adapter, self.acts[0].policy, place.phase, context, weights is not None)
        if isinstance(context, CacheRows):
            require_history(context, call.start, int(call.latents.shape[0]))
            self.proof.expected = context.attentions or len(context.values)
            hidden = [*masks.values(), *([] if weights is None else [weights == 0])]
            self._hid = self._fleeting.hide(context, torch.stack(hidden).any(0), weights) > 0
            return None, ()
        frames = [frame for frame, _ in frames_of(context)]
        return context, tuple(DeadTokens.hiding(frames, mask, place.grid, rule) for rule, mask in masks.items())

    def unhide(self, call: Call) -> None:
        """A call has come back: what was hidden from it is to be seen again."""
        if self._fleeting.rows:
            context = context_of(self._adapter, call)
            self._fleeting.take_off(context if isinstance(context, CacheRows) else None)
            self._of_hidden.ended(context, call.stream, call.frames)

    def prune(self, call: Call, tokens: Sequence[Sequence[int]], start: int) -> int:
        """Kill tokens in the context of a call.

        Args:
            call: the call whose context it is.
            tokens: one list per sample; an empty one spares the sample.
            start: latent frame at which the chunk starts for which they die.

        Returns:
            Context rows newly dead.
        """
        require_grid(context := context_of(self._adapter, call), grid := grid_of(call.latents, self._patch_size))
        self.anchors = 0 if self._policy.prune_anchors else anchor_frames(context)
        if isinstance(context, CacheRows):
            require_history(context, call.start, int(call.latents.shape[0]))
            dead = self._mark(context, tokens, call.stream)
        else:
            self.proof.expected = context.attentions or self.proof.expected
            self._frames |= context.frames
            dead = self._dead_tokens.kill(context, tokens, start, grid)
        _logger.debug("pruned %d rows of the context for the chunk at latent frame %d", dead, start)
        return dead

    def _mark(self, context: CacheRows, tokens: Sequence[Sequence[int]], stream: Hashable) -> int:
        # Remembered before it is marked: whatever interrupts the marking, the marks are found again.
        before = self._marked.get(stream)
        self._marked[stream] = Traces.of(context.values)
        self._watch_rows(context, stream)
        dead = self._tombstones.mark(context, tokens, self._policy.prune_anchors, stream)
        if account := self._accounts.get(stream):
            account.marked = [len(chosen) * dead // max(sum(map(len, tokens)), 1) for chosen in tokens]
        if dead:
            self.proof.expected = context.attentions or len(context.values)
        elif before is None:
            del self._marked[stream]
        return dead

    def _watch_rows(self, context: CacheRows, stream: Hashable) -> None:
        """Account for the keys of later calls; not for memory that the adapter says that it keeps right."""
        self._accounts = {known: account for known, account in self._accounts.items() if known in self._marked}
        account = account_of(context, self._adapter.keeps_memory)
        self._accounts |= {} if account is None else {stream: account}

    def inherit(self, call: Call) -> None:
        """Find the marks in a cache that was copied from another video's, or loaded: they were copied with it."""
        context = None if self.proof.in_sequence else context_of(self._adapter, call)
        self.proof.in_sequence = not isinstance(context, CacheRows)
        if not isinstance(context, CacheRows) or not context.stop or not is_marked(context.values[0]):
            return
        if not self.proof.proven:
            warnings.warn(FOREIGN_MARKS, TokenTrimWarning, stacklevel=2)
        self._marked[call.stream] = Traces.of(context.values)
        self._watch_rows(context, call.stream)

    def rewritten(self, context: CacheRows, stream: Hashable) -> None:
        """A policy has rewritten rows, so their contents are new."""
        if stream in self._accounts:
            self._accounts[stream].read(context)

    def follow(self, call: Call, moved: bool = False) -> None:
        """Find the marks again, which were copied, where the cache made its tensors anew or was ``moved`` elsewhere."""
        if (traces := self._marked.get(call.stream)) is not None and (moved or traces.lost):
            context = context_of(self._adapter, call)
            assert isinstance(context, CacheRows)
            self._left = [*(left for left in self._left if not left.lost), traces]
            self._marked[call.stream] = Traces.of(context.values)
            self._tombstones.follow(context.values, call.stream)

    def check(self, finite: bool) -> bool:
        """Whether the replay behind a prune left dead keys out at every attention call; if not, pruning stays off.

        Asked at every replay, on numbers that the host has: attention processors may be exchanged after the first.

        Args:
            finite: whether the output is; looked at for the first prune only, for it costs a synchronisation.
        """
        proof, numbers = self.proof, [*self._shown, self._numbers()]
        calls, dead = min(calls for calls, _ in numbers), max(dead for _, dead in numbers)  # not of what is hidden
        wanted = max(proof.expected, 1) if self._last else 1
        holds = proof.shows(calls, wanted, dead, finite)
        if not holds:
            self.give_up()
        elif not proof.proven:
            _logger.info("the first prune is proved: %s", proof.finding)
        proof.proven = proof.proven or holds
        return holds

    def _numbers(self) -> tuple[int, int]:
        """Attention calls tapped in the latest call, and dead keys that they dropped."""
        return (self._last.calls, self._last.dead_keys) if self._last else (0, 0)

    @property
    def weighs(self) -> bool:
        """Whether the call that comes reads rows with less weight, which are known only in the whole batch."""
        return bool(self._fleeting.weights)

    def let_go(self) -> None:
        """A call is over: its tap may hold masks, and with them the cache."""
        self._dropped = self._dropped or (self._last is not None and self._last.dead_keys > 0)
        self._last = None
        if self.steering is not None:  # else nothing was ever hidden
            self._fleeting.take_off()

    def drop_hidden(self) -> None:
        """A call on copies is over: what was hidden from it is marked in these only."""
        self._fleeting.forget()
        self.let_go()

    def end_chunk(self) -> None:
        """Forget what has left the context for good, so that the tap is off again once nothing dead is to be seen."""
        if self._tapped:
            self._dead_tokens.forget(self._frames)
            if not self._dropped:
                self._marked = {stream: traces for stream, traces in self._marked.items() if not traces.empty}
        self._frames, self._tapped, self._dropped = set(), 0, False

    def returned(self, call: Call, tap: CallTap, notes: list[str]) -> bool:
        """A call with a tap has come back; whether marks in a cache may have reached attention that was not tapped."""
        self.unhide(call)
        self.follow(call)
        notes += self.proof.overlooks(tap)
        if tap.layout is not None or not (self._marked or self._hid):
            return False
        # Or in layers with rows of their own: asked where no failure may cost the video, for it reads the device.
        looked = tap.layers is not None and tap.layers.looks and self._failures is not None and self._failures.warns
        return looked or tap.calls < self.proof.expected

    def require_layers_alike(self) -> None:
        """Raise if layers have marks in other rows than the first; reads the device."""
        for account in self._accounts.values():
            account.layers.require()

    def give_up(self) -> None:
        """Prune nothing more, and bring back what is dead: what was pruned long ago with one element of V at 0."""
        self.proof.enabled = False
        self.clear()

    def revive(self, start: int) -> None:
        """Bring back what was pruned for the chunk at latent frame ``start``; valid until that chunk's rows move."""
        self._tombstones.revive()
        self._marked.clear()
        self._dead_tokens.revive(start)

    def settle(self) -> None:
        """The prune is final: the pruned context goes forward."""
        self._tombstones.settle()

    def clear_copies(self, memo: dict[int, Any]) -> None:
        """:meth:`Traces.clear_copies`, of all that is marked."""
        for traces in self._marked.values():
            traces.clear_copies(memo)

    def clear(self) -> list[Traces]:
        """Forget all marks and leave no cache poisoned: a new video starts, or the patch comes off. Returns where."""
        self._tombstones.revive()
        for traces in (left := [*self._marked.values(), *self._left]):
            traces.clear()
        self._marked, self._left = {}, []
        self._of_hidden.forget()
        self._dead_tokens.killed_by.clear()
        return left
