"""Calling the denoiser again, for each step of a chunk, in step with all ranks that share the model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tokentrim_hooks.adapter import Adapter, Call
from tokentrim_hooks.errors import TokenTrimWarning
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.inspection import bind, profiled, weakly
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.pruning.call_scope import scoped
from tokentrim_hooks.rollout.answers import carried, moved_arguments, prediction_of, replayed
from tokentrim_hooks.rollout.opinion import Opinion
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.repeat.proof import NullReplay, random_stream_kept
from tokentrim_hooks.rollout.state import Step


class Replayer:
    """Calls again what the sampler has called, with the context as it is by now.

    Args:
        adapter, policy: of the model. pruner: gives each call its tap.
        failures: knows the ranks that share the model.
    """

    def __init__(self, adapter: Adapter, policy: Policy, pruner: Pruner, failures: FailurePolicy) -> None:
        self._adapter, self._policy, self._pruner, self._failures = adapter, policy, pruner, failures

    def prove(
        self, module: nn.Module, steps: list[Step], output: Any, settle: Callable[[str, Callable[[], Opinion]], Opinion]
    ) -> int:
        """Before a denoiser's first prune: replay with nothing pruned; return the denoiser calls that it cost.

        Args:
            module, steps: the denoiser, and its calls.
            output: of the last step, as the sampler was given it.
            settle: agrees on an opinion with the ranks that share the model, given where they are in words. All make
                the same number of calls, and what one of them finds is raised on all.

        Raises:
            UnsupportedContextError: it gave something else.
        """
        if self._pruner.proof.repeats(module):
            return 0
        times = 1
        null = NullReplay(module, functools.partial(self._replayed_prediction, module, steps))
        with null.undone_if_refused():
            if not settle("proof of repeatability", lambda: self._null_replay(null, steps, output)).holds:
                settle("second call for the proof", lambda: _second_opinion(null))
                times = 2
        self._pruner.proof.repeated.append(weakly(module))
        return times * len(steps)

    def _null_replay(self, null: NullReplay, steps: list[Step], output: Any) -> Opinion:
        """Whether the bits are the same; where nothing can be remembered the call is made all the same, as all do."""
        try:
            null.remember(steps[-1].prediction, *(part for step in steps for part in (step.args, step.kwargs)), output)
        except Exception as failure:
            if not self._failures.hears(failure):
                raise
        return Opinion(holds=null.same())

    def _replayed_prediction(self, module: nn.Module, steps: list[Step]) -> Tensor:
        return prediction_of(self._adapter, steps[-1].call, self.replay(module, steps, redraw=False))

    def replay(self, module: nn.Module, steps: list[Step], redraw: bool = True) -> Any:
        """Call the denoiser again for each step, with the same noise.

        A later step's latents were made from the earlier step's prediction, which has changed: the adapter carries the
        change over. The first step's latents are noise, which only a control policy draws anew, and not where
        ``redraw`` is off.
        """
        with profiled("tokentrim.replay"):
            output, call = self._in_step(module, steps[0], lambda: self._redrawn(steps[0]) if redraw else None)
            for earlier, step in itertools.pairwise(steps):
                carried = functools.partial(self._carried, earlier, step, call, output)
                output, call = self._in_step(module, step, carried)
            if call is not steps[-1].call:
                # The sampler goes on from its own latents, not from those of the replay's last call.
                x0 = prediction_of(self._adapter, call, output)
                if prediction_of(self._adapter, steps[-1].call, output) is not x0:
                    output = self._adapter.with_prediction(steps[-1].call, output, x0)
        return output

    def _in_step(self, module: nn.Module, step: Step, latents: Callable[[], Tensor | None]) -> tuple[Any, Call]:
        """Call again, as all ranks do that share the model: one that fails before the call makes it without us.

        Returns:
            The output, and the call that it came of: with other latents where these were carried over or redrawn.
        """
        ranks = self._failures.ranks
        made = ranks.replays
        try:
            given = latents()
            moved = self._moved(module, step, given)
            return self._call_again(module, step, given), moved
        except Exception as failure:
            if ranks.replays > made or not self._failures.hears(failure):
                raise
        with scoped(None, replayer=self._pruner.proof), random_stream_kept(step.call.latents.device):
            return module(*step.args, **step.kwargs), step.call

    def _moved(self, module: nn.Module, step: Step, latents: Tensor | None) -> Call:
        """The call as it is made again, its arguments too: an adapter reads noisy latents from either."""
        if latents is None:
            return step.call
        args, kwargs = moved_arguments(self._adapter, step.call, step.args, step.kwargs, latents)
        return dataclasses.replace(step.call, latents=latents, arguments=bind(module, args, kwargs))

    def _carried(self, earlier: Step, step: Step, call: Call, output: Any) -> Tensor:
        """Latents of ``step`` after the replay of ``earlier``, which was made as ``call`` and gave ``output``."""
        changed = prediction_of(self._adapter, call, output)
        return carried(self._adapter, step.call, earlier.call, call, earlier.prediction, changed)

    def _redrawn(self, step: Step) -> Tensor | None:
        return self._policy.redraw(step.call.latents, step.call.start)

    def _call_again(self, module: nn.Module, step: Step, latents: Tensor | None) -> Any:
        """Call the denoiser as in ``step``, with other ``latents`` unless None, and its tap on."""
        args, kwargs = step.args, step.kwargs
        if latents is not None:
            args, kwargs = moved_arguments(self._adapter, step.call, args, kwargs, latents)
        tap, device = self._pruner.tap(step.call, step.place), step.call.latents.device
        with scoped(tap, replayer=self._pruner.proof), random_stream_kept(device):
            output = replayed(self._adapter, module, args, kwargs)
        self._pruner.unhide(step.call)
        return output

    def without_marks(self, module: nn.Module, step: Step) -> Any:
        """Call again what our marks have poisoned, with all of them gone; pruning stays off.

        For a model that attends through a path which the first prune did not show: dense in one step and sparse in
        another, or with attention processors that were exchanged since.
        """
        self._pruner.give_up()
        warnings.warn(
            "pruned rows reached attention that is not tapped, in a path that the first prune did not show; they are "
            "back, the call was repeated, and this model is only observed from now on",
            TokenTrimWarning,
            stacklevel=2,
        )
        return self._call_again(module, step, None)


def _second_opinion(null: NullReplay) -> Opinion:
    null.require_noise()
    return Opinion()


def select(prune: list[bool], again: Any, output: Any) -> Any:
    """Take flagged samples from ``again``, the others from ``output``; both have B first in every tensor."""
    if all(prune):
        return again

    def choose(new: Any, old: Any) -> Any:
        if not isinstance(new, Tensor) or new.ndim == 0 or new.shape[0] != len(prune):
            return new
        chosen = torch.tensor(prune, device=new.device).view(-1, *[1] * (new.ndim - 1))
        return torch.where(chosen, new, old)

    return tree_map(choose, again, output)
