"""The kit's tests of what an adapter says: x0, frames and their order, the patch size, and a candidate's replay."""

from __future__ import annotations

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.checks.probes import Predictions, check_delivered, check_tokens, rows_of_pixels
from tokentrim_hooks.testing.laws.trial import Trial


class StatementTests(Trial):
    """Statements of the adapter against what the model does."""

    def test_x0_is_what_the_sampler_delivers(self) -> None:
        """The last step's prediction of every chunk is what ``run`` returns at that chunk's frames, in that order."""
        model = self.make_model()
        with self.patch(model, tokentrim.ObservePolicy()) as handle, checks.counting(self.denoisers(model)) as calls:
            predictions = Predictions(handle.adapter)
            video = self.delivered(self.run(model, 12))
        predictions.require_comparable(calls.count)
        check_delivered(predictions.last, video)

    def test_one_pixel_moves_one_token(self) -> None:
        """A pixel of the noisy latents changes the V row of the token that ``patch_size`` puts it in, and no other."""
        model = self.make_model()
        match = self.adapter.probe(model)
        assert isinstance(match, tokentrim.Match)
        with self.patch(model, tokentrim.ObservePolicy()) as handle:
            rows, size = rows_of_pixels(lambda: self.run(model, 13), self.denoisers(model)[0], handle.adapter)
        check_tokens(rows, size, match.patch_size)

    def test_a_candidate_prune_equals_minus_infinity(self) -> None:
        """The same for ``probe="candidate"``: the whole chunk is made anew, as if pruned before its first call."""
        model = self.make_model()
        try:
            with self.patch(model, self._forced(), probe="candidate") as handle:
                actual = self.run(model, 9)
        except tokentrim.UnsupportedProbeError as refusal:
            raise checks.not_checked(str(refusal)) from None
        assert any(record.pruned for record in handle.report), "no finished chunk was pruned"
        checks.assert_close(actual, self.reference(self.make_model(), 9), self.tolerance)
