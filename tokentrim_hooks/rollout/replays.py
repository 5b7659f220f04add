"""Calling the denoiser again, for each step of a chunk, in step with all ranks that share the model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks.adapter import Adapter, Call
from tokentrim_hooks.errors import TokenTrimWarning, UnsupportedContextError
from tokentrim_hooks.failures import FailurePolicy
from tokentrim_hooks.inspection import bind, profiled
from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.pruning.call_scope import scoped
from tokentrim_hooks.pruning.samples import Samples
from tokentrim_hooks.rollout.answers import carried, context_of, moved_arguments, prediction_of, replayed, select
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.repeat.cut import CutCall, NotSeparableError
from tokentrim_hooks.rollout.repeat.parts import Key, Trial, separated
from tokentrim_hooks.rollout.repeat.proof import RandomStreamKept, require_still
from tokentrim_hooks.rollout.repeat.snapshot import Snapshot
from tokentrim_hooks.rollout.state import Step

MISFITS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
"""What a model raises that is called with fewer samples than something that it keeps is of."""


@dataclass(frozen=True)
class Some:
    """Samples to call with, run by run, and an ``output`` of the whole batch that theirs is put into."""

    runs: list[Samples]
    output: Any


class Replayer:
    """Calls again what the sampler has called, with the context as it is by now.

    Args:
        adapter, policy: of the model. pruner: gives each call its tap.
        failures: knows the ranks that share the model.
    """

    def __init__(self, adapter: Adapter, policy: Policy, pruner: Pruner, failures: FailurePolicy) -> None:
        self._adapter, self._policy, self._pruner, self._failures = adapter, policy, pruner, failures

    def regenerate(self, module: nn.Module, steps: list[Step], flags: list[bool], output: Any) -> tuple[Any, int]:
        """Call again for the samples that are flagged.

        Args:
            module, steps: the denoiser, and its calls.
            flags: of each sample, whether it is regenerated.
            output: of the last step, as it was, for the others.

        Returns:
            The output for all samples, and denoiser calls that showed that some can be made alone: none but at first.
        """
        redrawn = functools.cache(lambda: self._redrawn(steps[0]))
        runs, key = self._separated(module, steps[0], flags)
        known = self._pruner.proof.parts.finding(module, key) if runs else ""
        if runs and known == "":
            try:
                return self.replay(module, steps, redrawn, Some(runs, output)), 0
            except (NotSeparableError, UnsupportedContextError) as why:
                # Texts of other lengths, say. What does not come of the part itself the whole batch meets again.
                self._pruner.proof.parts.say(str(why))
        again = functools.partial(self.replay, module, steps, redrawn)
        if not runs or known:
            return select(flags, again(), output), 0
        return self._regenerated_both_ways(module, steps, flags, output, again, Some(runs, output), key)

    def _separated(self, module: nn.Module, step: Step, flags: list[bool]) -> tuple[list[Samples], Key]:
        """The runs of samples that can be called alone, none where that is no use; and what kind of call it is."""
        nothing: tuple[list[Samples], Key] = ([], (0, ()))
        if all(flags) or not any(flags):
            return nothing
        try:
            if not self._failures.ranks.alone:
                raise NotSeparableError("ranks share the model, and all make the same calls")
            if type(self._adapter).replay is not Adapter.replay:
                raise NotSeparableError(f"adapter {self._adapter.name!r} replays a call in its own way")
            context = context_of(self._adapter, step.call)
            return separated(module, step.call.latents, step.args, step.kwargs, context, flags)
        except NotSeparableError as why:
            self._pruner.proof.parts.say(str(why))
            return nothing

    def _regenerated_both_ways(
        self,
        module: nn.Module,
        steps: list[Step],
        flags: list[bool],
        output: Any,
        again: Callable[..., Any],
        some: Some,
        key: Key,
    ) -> tuple[Any, int]:
        """Regenerate the whole batch, then some samples alone, and learn from it.

        Where both are the same it is the samples alone that count, as they will from then on: a video does not depend
        on whether it is the first to be regenerated.
        """
        call = steps[-1].call
        trial = Trial(lambda: context_of(self._adapter, call), call.frames, flags)
        whole = select(flags, again(), output)
        after = Snapshot(module, *(part for step in steps for part in (step.args, step.kwargs)))
        try:
            trial.whole_made(whole)
            parts = again(some)
            why = trial.finding(parts)
        except (NotSeparableError, UnsupportedContextError, *MISFITS) as failure:
            why = f"{type(failure).__name__}: {failure}" if isinstance(failure, MISFITS) else str(failure)
        except BaseException:
            after.put_back()
            raise
        self._pruner.proof.parts.learn(module, key, why)
        if not why:
            return parts, len(steps)
        # Made once more, so that all is as the whole batch leaves it, also what is known of its attention.
        after.put_back()
        return select(flags, again(), output), 2 * len(steps)

    def replay(
        self,
        module: nn.Module,
        steps: list[Step],
        first: Callable[[], Tensor | None] | None = None,
        some: Some | None = None,
    ) -> Any:
        """Call the denoiser again for each step, with the same noise.

        A later step's latents were made from the earlier step's prediction, which has changed: the adapter carries the
        change over. The first step's latents are noise, which only a control policy draws anew.

        Args:
            module, steps: the denoiser, and its calls.
            first: answers other latents for the first of them, or None; left out, those that the policy draws.
            some: with which samples, and an output of all that theirs is put into; None: the whole batch.
        """
        first = first or functools.partial(self._redrawn, steps[0])
        return profiled("tokentrim.replay", self._one_by_one, module, steps, first, some)

    def _one_by_one(
        self, module: nn.Module, steps: list[Step], first: Callable[[], Tensor | None], some: Some | None
    ) -> Any:
        recall = self._pruner.proof.recall
        recall.rewind(module, steps[0].course)
        output, call = self.in_step(module, steps[0], first, some)
        lost = recall.left_otherwise(module, steps[0].course)
        for earlier, step in itertools.pairwise(steps):
            recall.rewind(module, step.course)
            carried = functools.partial(self._carried, earlier, step, call, output)
            output, call = self.in_step(module, step, carried, some)
            lost += recall.left_otherwise(module, step.course)
        # Not earlier: ranks that share the model make all of these calls.
        require_still(lost)
        if call is not steps[-1].call:
            # The sampler goes on from its own latents, not from those of the replay's last call.
            x0 = prediction_of(self._adapter, call, output)
            if prediction_of(self._adapter, steps[-1].call, output) is not x0:
                output = self._adapter.with_prediction(steps[-1].call, output, x0)
        return output

    def in_step(
        self, module: nn.Module, step: Step, latents: Callable[[], Tensor | None], some: Some | None
    ) -> tuple[Any, Call]:
        """Call again, as all ranks do that share the model: one that fails before the call makes it without us.

        Returns:
            The output, and the call that it came of: with other latents where these were carried over or redrawn.
        """
        ranks = self._failures.ranks
        made = ranks.replays
        try:
            given = latents()
            moved = self._moved(module, step, given)
            return self._call_again(module, step, given, some), moved
        except Exception as failure:
            if ranks.replays > made or not self._failures.hears(failure):
                raise
        with scoped(None, replayer=self._pruner.proof), RandomStreamKept(step.call.latents.device):
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

    def _call_again(self, module: nn.Module, step: Step, latents: Tensor | None, some: Some | None = None) -> Any:
        """Call the denoiser as in ``step``, with other ``latents`` unless None, and its tap on."""
        args, kwargs = step.args, step.kwargs
        if latents is not None:
            args, kwargs = moved_arguments(self._adapter, step.call, args, kwargs, latents)
        if some is None:
            return self._tapped(module, step, args, kwargs)
        output, counted = some.output, self._pruner.proof.recall.taken(module)
        for run in some.runs:
            counted.put_back()
            cut = CutCall(run, args, kwargs)
            made = self._tapped(module, step, cut.args, cut.kwargs, run)
            cut.carry_over()
            output = cut.among(made, output)
        return output

    def _tapped(
        self, module: nn.Module, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any], part: Samples | None = None
    ) -> Any:
        """Make a call of ``step`` with these arguments, which may be those of a part of its batch."""
        tap, device = self._pruner.tap(step.call, step.place, part), step.call.latents.device
        if part is not None and self._pruner.weighs:
            self._pruner.unhide(step.call)
            raise NotSeparableError("a policy weighs keys")
        with scoped(tap, replayer=self._pruner.proof), RandomStreamKept(device):
            output = replayed(self._adapter, module, args, kwargs)
        self._pruner.unhide(step.call)
        return output

    def without_marks(self, module: nn.Module, step: Step) -> Any:
        """Call again what our marks have poisoned, with all of them gone; pruning stays off.

        For a model that attends through a path which the first prune did not show: dense in one step and sparse in
        another, or with attention processors that were exchanged since.
        """
        self._pruner.give_up()
        if step.course is not None:
            step.course.before.put_back()
        warnings.warn(
            "pruned rows reached attention that is not tapped, in a path that the first prune did not show; they are "
            "back, the call was repeated, and this model is only observed from now on",
            TokenTrimWarning,
            stacklevel=2,
        )
        return self._call_again(module, step, None)
