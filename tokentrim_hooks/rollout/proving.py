"""What a model must show before its first prune: that a call can be made twice, and that rows are where tokens are."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks.adapter import Adapter, Call
from tokentrim_hooks.errors import UnsupportedContextError, UnsupportedProbeError
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.inspection import weakly
from tokentrim_hooks.pruning.account import keeps_contents
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.ranks.agreement import Alone
from tokentrim_hooks.rollout.answers import context_of, moved_arguments, prediction_of
from tokentrim_hooks.rollout.opinion import Opinion
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.repeat.order import RowOrder
from tokentrim_hooks.rollout.repeat.proof import NullReplay
from tokentrim_hooks.rollout.replays import Replayer
from tokentrim_hooks.rollout.state import Step

_logger = logging.getLogger(__name__)

Settle = Callable[[str, Callable[[], Opinion]], Opinion]
"""Agrees on an opinion with the ranks that share the model, given where they are in words."""


class Prover:
    """Calls again, with nothing pruned, what the sampler has called.

    Args:
        adapter, patch_size: of the model. pruner: keeps what was shown.
        failures: knows the ranks that share the model. replayer: makes the calls.
    """

    def __init__(
        self,
        adapter: Adapter,
        patch_size: tuple[int, int],
        pruner: Pruner,
        failures: FailurePolicy,
        replayer: Replayer,
    ) -> None:
        self._adapter, self._patch_size, self._pruner = adapter, patch_size, pruner
        self._failures, self._replayer = failures, replayer

    def prove(self, module: nn.Module, steps: list[Step], output: Any, settle: Settle, prunes: bool = True) -> int:
        """Before a denoiser's first prune: replay with nothing pruned; return the denoiser calls that it cost.

        What only hides repeats no call, and asks for the order of frames alone: a model that cannot be called twice,
        and is as it was, goes on without that.

        Args:
            module, steps: the denoiser, and its calls.
            output: of the last step, as the sampler was given it.
            settle: all ranks make the same number of calls, and what one of them finds is raised on all.
            prunes: whether calls will be repeated from now on.

        Raises:
            UnsupportedContextError: it gave something else, or its rows lie in another order than tokens.
        """
        proof, recall = self._pruner.proof, self._pruner.proof.recall
        if proof.repeats(module):
            return 0
        order = self._order(module, steps[-1], settle)
        if order is None and not prunes:
            proof.ordered.append(weakly(module))
            return 0
        courses, again = [step.course for step in steps], functools.partial(self._replayed_prediction, module, steps)
        null, known, times = NullReplay(module, again, recall, courses), recall.counts(module), 1
        first = functools.partial(self._null_replay, null, module, steps, output, order)
        with self._forgiven(null, module, order, prunes), null.undone_if_refused():
            holds = settle("proof of repeatability", first).holds
            if not proof.orders(module):
                proof.ordered.append(weakly(module))
            while not holds:
                holds = settle(f"call {times + 1} for the proof", lambda: Opinion(holds=null.same())).holds
                times += 1
            # A rank may count what others do not, as its progress; all are to make the same number of calls.
            counts = known or (times > 1 and not settle("counts", lambda: Opinion(holds=not null.counts)).holds)
            recall.proved(module, counts)
            if not counts:
                proof.repeated.append(weakly(module))
        return times * len(steps) + (order is not None)

    @contextlib.contextmanager
    def _forgiven(self, null: NullReplay, module: nn.Module, order: RowOrder | None, prunes: bool) -> Iterator[None]:
        """Let a model go on that gives something else when a call is made twice, where none will be."""
        try:
            yield
        except UnsupportedContextError as failure:
            forgives = not prunes and null.is_undone and type(self._failures.ranks) is Alone
            if not forgives or order is None or order.refusal():
                raise
            _logger.info("in which order frames lie could not be shown: %s", failure)
            self._pruner.proof.ordered.append(weakly(module))

    def wants_order(self, module: nn.Module, call: Call) -> bool:
        """Whether rows are hidden from calls by their place alone, and frames were not asked for their order."""
        proof = self._pruner.proof
        return proof.enabled and not proof.orders(module) and self._hides_by_place(call)

    def _hides_by_place(self, call: Call) -> bool:
        """Whether policies hide rows of a cache whose adapter does not say which frame is where."""
        context = None if self._pruner.steering is None else context_of(self._adapter, call)
        return isinstance(context, CacheRows) and not context.tells_frames

    def _order(self, module: nn.Module, step: Step, settle: Settle) -> RowOrder | None:
        """The order of rows that a call is to show, once for a denoiser; None where it cannot, on any rank."""
        if self._pruner.proof.orders(module):
            return None
        order = RowOrder(step.call.latents, self._patch_size, self._hides_by_place(step.call))
        return order if settle("order of rows", lambda: Opinion(again=self._shows(order, step))).again else None

    def _shows(self, order: RowOrder, step: Step) -> bool:
        """Whether a call can show the order of rows: in a cache, where the adapter can put in other latents."""
        context = context_of(self._adapter, step.call)
        if order.tokens < 2 or not isinstance(context, CacheRows) or not keeps_contents(context):
            return False
        try:
            moved_arguments(self._adapter, step.call, step.args, step.kwargs, step.call.latents)
        except UnsupportedProbeError:
            return False
        return True

    def _null_replay(
        self, null: NullReplay, module: nn.Module, steps: list[Step], output: Any, order: RowOrder | None
    ) -> Opinion:
        """Whether the bits are the same; where nothing can be remembered the calls are made all the same, as all do."""
        with self._heard():
            null.remember(steps[-1].prediction, *(part for step in steps for part in (step.args, step.kwargs)), output)
        if order is not None:
            # Before the call that shows that it gives the same: that one writes its own rows once more.
            self._with_other_latents(module, steps[-1], order)
            null.put_back()
        same = null.same()
        if order is not None:
            order.require()
        return Opinion(holds=same)

    def _with_other_latents(self, module: nn.Module, step: Step, order: RowOrder) -> None:
        def latents() -> Tensor:
            order.begin(self._rows(step))
            return order.latents

        self._replayer.in_step(module, step, latents, None)
        with self._heard():
            order.end(self._rows(step))

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """What fails in here is raised once all ranks have made their calls; at once where there are no others."""
        try:
            yield
        except Exception as failure:
            if not self._failures.hears(failure):
                raise

    def _rows(self, step: Step) -> CacheRows:
        context = context_of(self._adapter, step.call)
        assert isinstance(context, CacheRows), "a model keeps its context in one way"
        return context

    def _replayed_prediction(self, module: nn.Module, steps: list[Step]) -> Tensor:
        again = self._replayer.replay(module, steps, lambda: None)
        return prediction_of(self._adapter, steps[-1].call, again)
