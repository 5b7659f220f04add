"""The kit's tests of pruning: exact, from its chunk on, at every layer, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.attention import watch_attention
from tokentrim_hooks.testing.checks.memory import held
from tokentrim_hooks.testing.checks.probes import HeldRows
from tokentrim_hooks.testing.laws.trial import Trial
from tokentrim_hooks.testing.policies import ForcedPolicy


class PruningTests(Trial):
    """Forced prunes against references of the kit's own."""

    # ------------------------------------------------------------------------------ pruning

    def test_a_prune_has_an_effect_from_its_chunk_on(self) -> None:
        """The forced prune is recorded with its tokens, kills rows, and changes the output and later drift."""
        model = self.make_model()
        plain = self.run(self.make_model(), 7)
        with self.patch(model, self._forced()) as handle:
            pruned = self.run(model, 7)
        record = next(r for r in handle.report if r.chunk == self.chunk_to_prune)
        assert record.pruned and record.regenerations == 1, f"nothing was pruned; notes: {record.notes}"
        assert set(record.tokens) == set(self.tokens) and record.dead > 0 and record.extra_calls >= 1
        assert torch.isfinite(pruned).all(), "the pruned run holds NaN or inf"
        assert not torch.equal(plain, pruned), "the prune has no effect on the output"
        earlier = [r.severity for r in handle.report if r.chunk < self.chunk_to_prune]
        assert earlier == [r.severity for r in self._observed(7) if r.chunk < self.chunk_to_prune], (
            "the prune reached back to earlier chunks"
        )

    def test_no_kernel_sees_a_dead_key(self) -> None:
        """Every layer over the context drops the dead keys from the prune on, other ones in every sample of a batch."""
        model = self.make_model()
        grid, samples = self._grid_and_samples()
        chosen = [[(token + sample) % grid for token in self.tokens] for sample in range(samples)]
        policy = ForcedPolicy({self.chunk_to_prune: chosen})
        with watch_attention(self.denoisers(model)) as seen, self.patch(model, policy) as handle:
            held = HeldRows(handle.adapter)
            self.run(model, 8)
        dead = sum(record.dead for record in handle.report if record.chunk == self.chunk_to_prune)
        start = next(record.start for record in handle.report if record.chunk == self.chunk_to_prune)
        checks.check_kernels(seen, dead, samples * held.at.get(start, 0), held.coarse)

    def test_pruning_equals_minus_infinity(self) -> None:
        """The pruned run equals an unpatched run with -inf at the dead keys, in the kernel, in every later call."""
        expected = self.reference(self.make_model(), 9)
        actual = self._pruned(9)
        assert not torch.equal(expected, self.run(self.make_model(), 9)), "the reference itself pruned nothing"
        checks.assert_close(actual, expected, self.tolerance)

    def test_a_late_prune_equals_minus_infinity(self) -> None:
        """The same after the model has evicted three times: an adapter may be right until the cache rolls."""
        own = type(self).reference is not Trial.reference
        if own and not self.late_chunk:
            raise checks.not_checked("reference() is this class's own and no late_chunk is set")
        self.chunk_to_prune = self.late_chunk or self.chunks - 1
        evictions = 3 if own else self._evictions(9)
        checks.assert_close(self._pruned(9), self.reference(self.make_model(), 9), self.tolerance)
        if evictions < 3:
            raise checks.not_checked(
                f"rows left the context {evictions} times in {self.chunks} chunks: exact, but set more chunks (or a "
                "smaller window) so that they do three times; a model that never evicts has nothing to show here"
            )

    def test_content_of_dead_rows_does_not_matter(self) -> None:
        """NaN everywhere in the dead rows of a KV cache changes no bit."""
        model = self.make_model()
        with self.patch(model, self._forced()) as handle, checks.poisoned(self.denoisers(model), handle.adapter) as log:
            poisoned = self.run(model, 10)
        if not log.rows:
            raise checks.not_checked("no KV cache with marked rows: the context lies in the sequence")
        assert torch.equal(self._pruned(10), poisoned), f"the content of {log.rows} dead rows reached the output"

    def test_anchors_are_spared(self) -> None:
        """Keys of the declared anchor frames stay in every self-attention call after a prune; no others ever stay."""
        model, per_frame = self.make_model(), self._per_frame()
        keys = self.anchor_frames * per_frame
        with watch_attention(self.denoisers(model)) as plain:
            self.run(model, 8)
        if not keys:
            checks.check_no_sink(plain, per_frame)
            raise checks.not_checked("this test class declares no anchor_frames")
        try:
            checks.check_anchors(plain, keys)
        except AssertionError as found:
            raise checks.not_checked(f"unpatched, the model itself does not keep its first keys: {found}") from None
        with watch_attention(self.denoisers(model)) as seen, self.patch(model, self._forced()):
            self.run(model, 8)
        checks.check_anchors(seen, keys)

    def _twice(self, model: Any) -> tuple[Tensor, Tensor, int]:
        """Two videos of one model, and how many bytes of tensors the second has left behind."""
        first = self.run(model, 11)
        before = held((first,))
        second = self.run(model, 11)
        return first, second, held((first, second)) - before

    def _require_no_growth(self, limit: int) -> None:
        """The video before may be kept, but none before that: so ask again behind two more."""
        model = self.make_model()
        with self.patch(model, self._forced()):
            self._twice(model)
            kept = self._twice(model)[2]
        if kept > limit and self._twice(self.make_model())[2] <= limit:
            raise AssertionError(
                f"tensors of {kept} bytes more are kept after every video of {2 * limit}: what is kept of calls?"
            )

    def test_a_second_video_starts_from_nothing(self) -> None:
        """A second run on the patched model repeats the first: marks, statistics and tensors do not survive a video."""
        model = self.make_model()
        with self.patch(model, self._forced()) as handle:
            first, second, kept = self._twice(model)
        assert torch.equal(first, second), "the second video differs from the first"
        if kept > second.nbytes // 2:
            self._require_no_growth(second.nbytes // 2)
        videos = [[r for r in handle.report if r.video == v] for v in (0, 1)]
        assert len(videos[0]) == len(videos[1]) == len(handle.report) // 2, "the second video was not recognised"
        for one, two in zip(*videos, strict=True):
            assert (one.chunk, one.severity, one.threshold, one.dead) == (
                two.chunk, two.severity, two.threshold, two.dead,
            )  # fmt: skip
