"""The part of the conformance kit that tries the hooks of policies which an adapter declares in ``takes``.

What is hidden, corrected or settled is done a second time on the unpatched model, underneath it: in the attention
kernel, at keys that are followed by their values, and in the denoiser's output. Mixed into
:class:`tokentrim_hooks.testing.AdapterConformance`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.token_trim import ObservePolicy
from tokentrim_hooks.policy.views import ContextView, Denoised, Place, Rows
from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.attention import around_calls, changed_calls
from tokentrim_hooks.testing.checks.kernels import shrunk, shrunk_rows

WORDS = "this adapter declares no"


class HooksConformance:
    """Tests of the hooks of policies, one for each, and that policies without an answer change nothing."""

    # ------------------------------------------------------------------------------ hide

    def test_what_a_policy_hides_no_kernel_sees(self: Any) -> None:
        """Hidden from every call from one chunk on, tokens are as dead as if they had been pruned for that chunk."""
        declared(self, "hide")
        if not {"first", "refine", "commit"} <= self.adapter.hides_from:
            raise checks.not_checked(f"rows may be hidden from {', '.join(sorted(self.adapter.hides_from))} calls only")
        expected, model = self.reference(self.make_model(), 9), self.make_model()
        plain = self.run(model, 9)
        assert_hides(self, model, HidesTokens(chunk=self.chunk_to_prune, tokens=tuple(self.tokens), begun=[]), expected)
        assert torch.equal(self.run(model, 9), plain), "unpatched, the model gives other results than before"

    def test_hidden_from_one_call_and_from_no_other(self: Any) -> None:
        """Hidden from a chunk's first call only (or its next, as declared), tokens are seen again by later ones."""
        declared(self, "hide")
        chunk, tokens, per_frame = self.chunk_to_prune, tuple(self.tokens), self._per_frame()
        phase, calls = next((p, c) for p, c in calls_of(self, chunk, 9).items() if c and p in self.adapter.hides_from)
        model = self.make_model()
        expected = checks.run_with_dead_keys(
            lambda: self.run(model, 9), self.denoisers(model), chunk, tokens, per_frame, self.anchor_frames, calls
        )
        plain = self.run(model, 9)
        assert not torch.equal(expected, plain), "the reference itself hid nothing"
        policy = HidesTokens(chunk=chunk, tokens=tokens, begun=[], only=phase)
        with self.patch(model, policy):
            checks.assert_close(self.run(model, 9), expected, self.tolerance)
        assert torch.equal(self.run(model, 9), plain), "unpatched, the model gives other results than before"

    # ------------------------------------------------------------------------------ correct

    def test_the_sampler_goes_on_with_what_a_policy_corrects(self: Any) -> None:
        """x0 halved at one chunk's last denoising call is the denoiser's answer halved there, and nowhere else."""
        declared(self, "correct")
        calls = calls_of(self, self.chunk_to_prune, 9)
        last = max([*calls["first"], *calls["refine"]])
        expected, model = self._halved(last, 9), self.make_model()
        plain = self.run(model, 9)
        assert not torch.equal(expected, plain), "the sampler does not go on with the x0 that the denoiser returns"
        with self.patch(model, Halves(chunk=self.chunk_to_prune)) as handle:
            checks.assert_close(self.run(model, 9), expected, self.tolerance)
        assert any(act["hook"] == "correct" for record in handle.report for act in record.acts), "nothing was corrected"
        assert torch.equal(self.run(model, 9), plain), "unpatched, the model gives other results than before"

    def _halved(self: Any, call: int, seed: int) -> Tensor:
        """Run unpatched, x0 halved in the output of one denoiser call; override where x0 is not the last output."""
        model, count = self.make_model(), checks.Counter()

        def halve(_module: Any, _args: Any, output: Any) -> Any:
            count.up()
            if count.count - 1 != call:
                return None
            return output / 2 if isinstance(output, Tensor) else type(output)([*output[:-1], output[-1] / 2])

        with changed_calls(self.denoisers(model)[0], after=halve):
            latents: Tensor = self.run(model, seed)
        return latents

    # ------------------------------------------------------------------------------ settle

    def test_rows_that_a_policy_settles_are_those_of_the_commit(self: Any) -> None:
        """K and V of one committed chunk made smaller in the cache, by another factor in each layer, are the same rows
        made smaller in every kernel behind it.
        """
        declared(self, "settle")
        if "first" not in self.adapter.hides_from:
            raise checks.not_checked("the model makes new rows of old ones, which the kernel's reference cannot follow")
        chunk, model = self.chunk_to_prune - 1, self.make_model()
        plain = self.run(model, 9)
        with shrunk_rows(self.denoisers(model), chunk) as log:
            expected = self.run(model, 9)
        if not log.rows:
            raise checks.not_checked("the keys of earlier chunks cannot be followed by value")
        assert not torch.equal(expected, plain), "the reference itself changed nothing"
        with self.patch(model, ShrinksRows(chunk=chunk)) as handle:
            checks.assert_close(self.run(model, 9), expected, self.tolerance)
        assert any(act["hook"] == "settle" for record in handle.report for act in record.acts), "nothing was rewritten"
        assert torch.equal(self.run(model, 9), plain), "unpatched, the model gives other results than before"

    # ------------------------------------------------------------------------------ no answer

    def test_policies_without_an_answer_change_no_bit(self: Any) -> None:
        """Asked by every hook that the adapter takes, and answering None, they change neither latents nor the stream
        of random numbers, and nothing is recorded.
        """
        plain = self.run(self.make_model(), 3)
        state, model = torch.get_rng_state(), self.make_model()
        policies = [policy for policy in (HidesNothing(), CorrectsNothing(), SettlesNothing()) if takes(self, policy)]
        with self.patch(model, policies) as handle:
            assert torch.equal(plain, self.run(model, 3)), "policies without an answer change the output"
        assert torch.equal(state, torch.get_rng_state()), "policies without an answer draw random numbers"
        assert not any(record.acts for record in handle.report), "an act is recorded that was none"


def takes(kit: Any, policy: Policy) -> bool:
    """Whether the adapter on trial takes a policy."""
    return policy.needs <= frozenset(kit.adapter.takes)


def declared(kit: Any, hook: str) -> None:
    """Skip where the adapter does not take a hook: policies that need it are refused by ``patch``."""
    if hook not in kit.adapter.takes:
        raise checks.not_checked(f"{WORDS} {hook!r}")


# ------------------------------------------------------------------------------------------------- policies


def assert_hides(kit: Any, model: Any, policy: HidesTokens, expected: Tensor) -> None:
    """Under ``policy``, which hides tokens or weighs them, the model gives what is expected, and its records say so."""
    with kit.patch(model, policy) as handle:
        hidden = kit.run(model, 9)
    if not policy.begun:
        raise checks.not_checked("when the chunk began none before it was finished: several are in flight")
    checks.assert_close(hidden, expected, kit.tolerance)
    assert any(act["hook"] == "hide" for record in handle.report for act in record.acts), "nothing was hidden"


@dataclass(frozen=True, kw_only=True)
class HidesTokens(Policy):
    """Hides ``tokens`` of the frames before ``chunk``, sinks and anchors aside, from its calls and all later ones.

    ``only``: from that chunk's calls of this phase only. ``begun`` keeps the frame at which the chunk began.
    """

    chunk: int
    tokens: tuple[int, ...]
    begun: list[int]
    only: str = ""

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """The tokens, of all finished frames but those that are newer than the chunk's beginning."""
        if chunk.index < self.chunk or (self.only and (chunk.index, chunk.phase) != (self.chunk, self.only)):
            return None
        if chunk.index == self.chunk:
            self.begun[:] = [chunk.start]
        if not self.begun:
            return None
        old = [frame for frame, anchor in enumerate(context.anchors) if not anchor]
        newer = abs(chunk.start - self.begun[0])
        mask = torch.zeros(context.frames, context.tokens, dtype=torch.bool)
        for frame in old[: max(len(old) - newer, 0)]:
            mask[frame, list(self.tokens)] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class Halves(Policy):
    """Halves x0 of one chunk."""

    chunk: int

    def correct(self, chunk: Denoised) -> Tensor | None:
        """Half of it, or no answer."""
        return chunk.prediction / 2 if chunk.index == self.chunk else None


@dataclass(frozen=True, kw_only=True)
class ShrinksRows(Policy):
    """Shrinks the rows that the commit of one chunk wrote."""

    chunk: int

    def settle(self, chunk: Place, rows: Rows) -> Rows | None:
        """A part of K and V, or no answer."""
        if chunk.index != self.chunk or rows.keys is None:
            return None
        part = shrunk(rows.layer)
        return replace(rows, values=rows.values * part, keys=rows.keys * part)


@dataclass(frozen=True)
class HidesNothing(Policy):
    """Asked at every call, hides nothing."""

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """No answer at first steps; nowhere a token at others, which is the same."""
        return None if chunk.phase == "first" else torch.zeros(context.frames, dtype=torch.bool)


@dataclass(frozen=True)
class CorrectsNothing(Policy):
    """Asked at every chunk, corrects nothing."""

    def correct(self, chunk: Denoised) -> Tensor | None:
        """No answer."""
        return None


@dataclass(frozen=True)
class SettlesNothing(Policy):
    """Asked at every commit, rewrites nothing."""

    def settle(self, chunk: Place, rows: Rows) -> Rows | None:
        """No answer."""
        return None


# ------------------------------------------------------------------------------------------------- references


def calls_of(kit: Any, chunk: int, seed: int) -> dict[str, list[int]]:
    """Ordinals of the denoiser calls of a chunk, by phase, branches of guidance included."""
    model, count = kit.make_model(), checks.Counter()
    with kit.patch(model, ObservePolicy()) as handle, around_calls(kit.denoisers(model), count.up):
        kit.run(model, seed)
    records = [record for record in handle.report if record.sample == 0]
    counts = [sum(record.phases.values()) for record in records]
    branches, extra = divmod(count.count, max(sum(counts), 1))
    if extra:
        raise checks.not_checked("not every denoiser call belongs to a phase of a chunk")
    place = branches * sum(counts[:chunk])
    found: dict[str, list[int]] = {}
    for phase in ("first", "refine", "commit"):
        stop = place + branches * records[chunk].phases.get(phase, 0)
        found[phase], place = list(range(place, stop)), stop
    return found
