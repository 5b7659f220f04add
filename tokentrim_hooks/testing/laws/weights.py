"""The part of the conformance kit that tries policies which give tokens of the context a weight.

The same is done a second time on the unpatched model: log w added to the scores, in the attention kernel, of keys that
are followed by their values. Mixed into :class:`tokentrim_hooks.testing.AdapterConformance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokentrim_hooks.policy.views import ContextView, Place
from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.laws.hooks import HidesTokens, assert_hides, calls_of, declared


class WeighConformance:
    """Tests of weights: in every call, in one call alone, and that 1 is no weight."""

    def test_a_weighed_token_gets_that_share_of_attention(self: Any) -> None:
        """Weighed in every call from one chunk on, each token by a number of its own, as log w in the softmax."""
        declared(self, "weigh")
        if not {"first", "refine", "commit"} <= self.adapter.hides_from:
            raise checks.not_checked(f"rows may be weighed in {', '.join(sorted(self.adapter.hides_from))} calls only")
        self._weigh(None)

    def test_weighed_in_one_call_and_in_no_other(self: Any) -> None:
        """Weighed in a chunk's first call only (or its next, as declared), tokens count in full in later ones."""
        declared(self, "weigh")
        calls = calls_of(self, self.chunk_to_prune, 9).items()
        self._weigh(next((p, c) for p, c in calls if c and p in self.adapter.hides_from))

    def test_a_weight_of_one_changes_no_bit(self: Any) -> None:
        """Neither latents nor the stream of random numbers, and nothing is recorded."""
        declared(self, "weigh")
        plain = self.run(self.make_model(), 3)
        state, model = torch.get_rng_state(), self.make_model()
        with self.patch(model, WeighsTokens(chunk=1, tokens=(), begun=[])) as handle:
            assert torch.equal(plain, self.run(model, 3)), "weights of 1 change the output"
        assert torch.equal(state, torch.get_rng_state()), "weights of 1 draw random numbers"
        assert not any(record.acts for record in handle.report), "an act is recorded that was none"

    def weighed_reference(
        self: Any, model: Any, seed: int, weights: dict[int, float], calls: list[int] | None
    ) -> Tensor:
        """Run unpatched with log w added at these tokens of what is behind ``anchor_frames`` and before
        ``chunk_to_prune``, from that chunk on, or in ``calls`` of it. Override where :meth:`reference` had to be.
        """
        return checks.run_with_weights(
            lambda: self.run(model, seed),
            self.denoisers(model),
            self.chunk_to_prune,
            weights,
            self._per_frame(),
            self.anchor_frames,
            calls,
        )

    def _weigh(self: Any, only: tuple[str, list[int]] | None) -> None:
        chunk, model = self.chunk_to_prune, self.make_model()
        phase, calls = only or ("", None)
        policy = WeighsTokens(chunk=chunk, tokens=tuple(self.tokens), begun=[], only=phase)
        plain, expected = self.run(model, 9), self.weighed_reference(model, 9, policy.weights, calls)
        assert not torch.equal(expected, plain), "the reference itself weighed nothing"
        assert_hides(self, model, policy, expected)
        assert torch.equal(self.run(model, 9), plain), "unpatched, the model gives other results than before"


@dataclass(frozen=True, kw_only=True)
class WeighsTokens(HidesTokens):
    """As :class:`HidesTokens`, but the tokens weigh less, each another share; without tokens all weigh 1."""

    requires: ClassVar[frozenset[str]] = frozenset({"weigh"})

    @property
    def weights(self) -> dict[int, float]:
        """By token, evenly between 0 and 1."""
        return {token: (place + 1) / (len(self.tokens) + 1) for place, token in enumerate(self.tokens)}

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """The weights, of all finished frames but those that are newer than the chunk's beginning."""
        hidden = super().hide(chunk, context)
        if hidden is None:
            return None
        weights = torch.ones(context.tokens)
        for token, weight in self.weights.items():
            weights[token] = weight
        return torch.where(hidden, weights, 1.0)
