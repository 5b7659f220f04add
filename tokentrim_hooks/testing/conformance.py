"""The conformance kit: subclass :class:`AdapterConformance` in a test module of yours and your adapter is on trial.

The kit believes nothing that an adapter says of itself. It takes fingerprints, counts synchronisations, watches the
attention kernel and computes its own pruned reference, with -inf at keys that it found by their values. A part that it
cannot check on a model is skipped with a reason that begins with ``NOT CHECKED``: an open question, never a pass.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.attention import around_calls, watch_attention
from tokentrim_hooks.testing.fingerprint import assert_same, fingerprint
from tokentrim_hooks.testing.policies import ForcedPolicy
from tokentrim_hooks.testing.syncs import count_syncs


class AdapterConformance:
    """What every adapter must pass. Subclasses set ``adapter`` and write :meth:`make_model` and :meth:`run`.

    Attributes:
        adapter: the adapter class on trial; it must be installed, or :meth:`patch` overridden.
        chunks: chunks that :meth:`run` generates, at least 5.
        chunk_to_prune: ordinal of the chunk whose context is pruned in the tests: not the first, not the last.
        tokens: spatial tokens that are pruned then, the same for every sample.
        anchor_frames: first latent frames of a video that the model never evicts and nobody may prune.
        tolerance: greatest difference to the -inf reference, relative to the largest value.
        own_files: more files of the adapter, whose synchronisations count as its own.
    """

    adapter: ClassVar[type[tokentrim.Adapter[Any]]]
    chunks: ClassVar[int] = 5
    chunk_to_prune: ClassVar[int] = 2
    tokens: ClassVar[Sequence[int]] = (0, 2, 3)
    anchor_frames: ClassVar[int] = 0
    tolerance: ClassVar[float] = 1e-5
    own_files: ClassVar[Sequence[str]] = ()

    # ------------------------------------------------------------------------------ what an author writes

    def make_model(self) -> Any:
        """Build a fresh small model in float32, with the same weights every time."""
        raise NotImplementedError("an adapter's conformance test must write make_model()")

    def run(self, model: Any, seed: int) -> Tensor:
        """Generate ``chunks`` chunks with the model's own sampler, from ``seed`` alone; return the latents."""
        raise NotImplementedError("an adapter's conformance test must write run(model, seed)")

    def patch(self, model: Any, policy: tokentrim.Policy, **options: Any) -> tokentrim.PatchHandle:
        """Patch ``model``; override only to try an adapter that is not installed."""
        return tokentrim.patch(model, policy, adapter=self.adapter.name, **options)

    def reference(self, model: Any, seed: int) -> Tensor:
        """Run the unpatched ``model`` with the tokens pruned, by means that are independent of the adapter.

        Override where the kit cannot tell keys by value (a context that is computed anew in every call). Raise
        unittest.SkipTest("NOT CHECKED: ...") where there is no such means.
        """
        per_frame = self._per_frame()
        return checks.run_with_dead_keys(
            lambda: self.run(model, seed), self.denoisers(model), self.chunk_to_prune, self.tokens, per_frame,
            self.anchor_frames,
        )  # fmt: skip

    # ------------------------------------------------------------------------------ recognition

    def test_detected_by_exactly_this_adapter(self) -> None:
        """Detection names this adapter and no other, and the adapter refuses strangers with a reason."""
        matching = [found.adapter for found in tokentrim.detect(self.make_model()) if found.matches]
        assert matching == [self.adapter.name], f"recognised by {matching}, expected {[self.adapter.name]}"
        for stranger in (object(), nn.Linear(1, 1), None):
            answer = self.adapter.probe(stranger)
            assert isinstance(answer, tokentrim.NoMatch), f"the adapter recognises {stranger!r}"
            assert answer.reason, "a refusal needs a reason"

    def test_the_run_is_deterministic(self) -> None:
        """The premise of all other tests: one seed gives the same bits, on a fresh model and on a used one."""
        model = self.make_model()
        first = self.run(model, 1)
        assert torch.isfinite(first).all(), "the model itself gives NaN or inf"
        assert torch.equal(first, self.run(model, 1)), "a second run on the same model differs"
        assert torch.equal(first, self.run(self.make_model(), 1)), "make_model() gives different weights"
        assert not torch.equal(first, self.run(model, 2)), "run() ignores its seed"

    def test_every_chunk_is_seen_once_and_in_order(self) -> None:
        """Each chunk begins with exactly one FIRST call; all but the first are judged; no call goes unnoticed."""
        model, calls = self.make_model(), checks.Counter()
        with self.patch(model, tokentrim.ObservePolicy()) as handle, around_calls(self.denoisers(model), calls.up):
            self.run(model, 0)
        checks.check_records(handle.report, self.chunks, calls.count)

    # ------------------------------------------------------------------------------ doing nothing

    def test_observing_changes_no_bit(self) -> None:
        """With a policy that never prunes, output and random state are those of the unpatched model."""
        plain = self.run(self.make_model(), 3)
        state = torch.get_rng_state()
        model = self.make_model()
        with self.patch(model, tokentrim.ObservePolicy()):
            assert torch.equal(plain, self.run(model, 3)), "observing changes the output"
        assert torch.equal(state, torch.get_rng_state()), "observing draws random numbers"

    def test_observing_finished_chunks_changes_no_bit(self) -> None:
        """The same for ``probe="candidate"``, where the adapter supports it."""
        plain, model = self.run(self.make_model(), 3), self.make_model()
        try:
            with self.patch(model, tokentrim.ObservePolicy(), probe="candidate") as handle:
                assert torch.equal(plain, self.run(model, 3)), "observing changes the output"
        except tokentrim.UnsupportedProbeError as refusal:
            raise checks.not_checked(str(refusal)) from None
        assert any(record.severity is not None for record in handle.report), "no finished chunk was judged"

    def test_one_synchronisation_a_chunk(self) -> None:
        """While nothing is dead, tokentrim and the adapter wait for the device at most once per chunk."""
        model = self.make_model()
        files = [inspect.getfile(self.adapter), *self.own_files]
        with self.patch(model, tokentrim.ObservePolicy()), count_syncs(files) as log:
            self.run(model, 0)
        assert len(log.ours) <= self.chunks, f"{len(log.ours)} waits in {self.chunks} chunks\n{log}"

    # ------------------------------------------------------------------------------ coming off

    def test_unpatching_leaves_no_trace(self) -> None:
        """After a run with a prune, unpatched, the model is what it was, and runs as it did."""
        model = self.make_model()
        plain, before, own = self._warm(model, lambda: self.run(model, 4))
        with self.patch(model, self._forced()):
            self.run(model, 4)
        assert_same(before, fingerprint(model), own)
        assert not tokentrim.is_patched(model)
        assert torch.equal(plain, self.run(model, 4)), "the unpatched model gives other results than before"

    def test_an_exception_in_mid_chunk_leaves_no_trace(self) -> None:
        """The model fails inside a call, after a prune; unpatched, it is what it was and runs as it did."""
        model = self.make_model()
        linears = checks.Tripwire()
        with linears:
            plain = self.run(model, 4)

        def break_down() -> None:
            with checks.Tripwire(at=int(0.8 * linears.count)):
                checks.assert_raises(checks.Injected, lambda: self.run(model, 4))

        _, before, own = self._warm(model, break_down)
        with self.patch(model, self._forced()):
            break_down()
        assert_same(before, fingerprint(model), own)
        assert torch.equal(plain, self.run(model, 4)), "after an exception the model gives other results than before"

    def test_patching_twice_is_refused_or_replaces(self) -> None:
        """A second patch raises AlreadyPatchedError, also by way of the denoiser; ``replace=True`` takes over."""
        model = self.make_model()
        before = fingerprint(model)
        first = self.patch(model, tokentrim.ObservePolicy())
        checks.assert_raises(tokentrim.AlreadyPatchedError, lambda: self.patch(model, tokentrim.ObservePolicy()))
        assert first.active, "the refused patch took the first one off"
        second = self.patch(model, tokentrim.ObservePolicy(), replace=True)
        assert [first.active, second.active] == [False, True], "replace=True did not take over"
        second.unpatch()
        assert_same(before, fingerprint(model))

    def test_copies_are_unpatched_and_work(self) -> None:
        """A deep copy of a patched model is an unpatched model that works; the original stays patched."""
        plain, model = self.run(self.make_model(), 5), self.make_model()
        with self.patch(model, self._forced()):
            twin = copy.deepcopy(model)
            assert not tokentrim.is_patched(twin) and tokentrim.is_patched(model)
            assert torch.equal(plain, self.run(twin, 5)), "the copy does not work as the unpatched model does"
            with self.patch(twin, tokentrim.ObservePolicy()) as handle:
                assert torch.equal(plain, self.run(twin, 5))
            assert len(handle.report), "the copy cannot be patched"

    def test_pickles_are_unpatched_and_work(self) -> None:
        """The same for a pickle, where the unpatched model pickles."""
        try:
            pickle.loads(pickle.dumps(self.make_model()))
        except Exception as failure:
            raise checks.not_checked(f"the unpatched model does not pickle ({failure})") from None
        plain, model = self.run(self.make_model(), 5), self.make_model()
        with self.patch(model, self._forced()):
            twin = pickle.loads(pickle.dumps(model))
        assert not tokentrim.is_patched(twin)
        assert torch.equal(plain, self.run(twin, 5)), "the unpickled model does not work as the unpatched one does"

    def test_offloading_hooks_in_either_order(self) -> None:
        """A wrapper that replaces ``forward`` on the instance, as accelerate's do, may come before or after."""
        model = self.make_model()
        denoiser = self.denoisers(model)[0]
        if not isinstance(denoiser, nn.Module):
            raise checks.not_checked("the denoiser is a method, offloading hooks go on modules")
        expected = self._pruned(6)
        plain, before, own = self._warm(model, lambda: self.run(model, 6))
        with checks.replaced_forward(denoiser), self.patch(model, self._forced()):
            assert torch.equal(expected, self.run(model, 6)), "patched behind the wrapper, the prune differs"
        with self.patch(model, self._forced()), checks.replaced_forward(denoiser):
            assert torch.equal(expected, self.run(model, 6)), "patched before the wrapper, the prune differs"
        assert_same(before, fingerprint(model), own)
        assert torch.equal(plain, self.run(model, 6))

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
        """From the prune on, every self-attention layer drops the same number of keys, and V is finite in all."""
        model = self.make_model()
        with watch_attention(self.denoisers(model)) as seen, self.patch(model, self._forced()) as handle:
            self.run(model, 8)
        record = next(r for r in handle.report if r.chunk == self.chunk_to_prune)
        checks.check_kernels(seen, handle.report, self.chunk_to_prune, record.dead)

    def test_pruning_equals_minus_infinity(self) -> None:
        """The pruned run equals an unpatched run with -inf at the dead keys, in the kernel, in every later call."""
        expected = self.reference(self.make_model(), 9)
        actual = self._pruned(9)
        assert not torch.equal(expected, self.run(self.make_model(), 9)), "the reference itself pruned nothing"
        checks.assert_close(actual, expected, self.tolerance)

    def test_content_of_dead_rows_does_not_matter(self) -> None:
        """NaN everywhere in the dead rows of a KV cache changes no bit."""
        model = self.make_model()
        with self.patch(model, self._forced()) as handle, checks.poisoned(self.denoisers(model), handle.adapter) as log:
            poisoned = self.run(model, 10)
        if not log.rows:
            raise checks.not_checked("no KV cache with marked rows: the context lies in the sequence")
        assert torch.equal(self._pruned(10), poisoned), f"the content of {log.rows} dead rows reached the output"

    def test_anchors_are_spared(self) -> None:
        """Keys of the declared anchor frames stay in every self-attention call after a prune."""
        if not self.anchor_frames:
            raise checks.not_checked("this test class declares no anchor_frames")
        model, per_frame = self.make_model(), self._per_frame()
        with watch_attention(self.denoisers(model)) as seen, self.patch(model, self._forced()):
            self.run(model, 8)
        checks.check_anchors(seen, self.anchor_frames * per_frame)

    def test_a_second_video_starts_from_nothing(self) -> None:
        """A second run on the patched model repeats the first: marks and statistics do not survive a video."""
        model = self.make_model()
        with self.patch(model, self._forced()) as handle:
            first, second = self.run(model, 11), self.run(model, 11)
        assert torch.equal(first, second), "the second video differs from the first"
        videos = [[r for r in handle.report if r.video == v] for v in (0, 1)]
        assert len(videos[0]) == len(videos[1]) == len(handle.report) // 2, "the second video was not recognised"
        for one, two in zip(*videos, strict=True):
            assert (one.chunk, one.severity, one.threshold, one.dead) == (
                two.chunk, two.severity, two.threshold, two.dead,
            )  # fmt: skip

    # ------------------------------------------------------------------------------ helpers

    def denoisers(self, model: Any) -> list[Any]:
        """The denoisers that the adapter found in ``model``."""
        match = self.adapter.probe(model)
        assert isinstance(match, tokentrim.Match), f"the adapter does not recognise its own model: {match.reason}"
        return [match.denoiser, *match.also]

    def _forced(self) -> ForcedPolicy:
        return ForcedPolicy({self.chunk_to_prune: tuple(self.tokens)})

    def _pruned(self, seed: int) -> Tensor:
        model = self.make_model()
        with self.patch(model, self._forced()):
            return self.run(model, seed)

    def _observed(self, seed: int) -> tokentrim.Report:
        model = self.make_model()
        with self.patch(model, ForcedPolicy()) as handle:
            self.run(model, seed)
        return handle.report

    def _per_frame(self) -> int:
        height, width = next(iter(self._observed(0))).grid
        return height * width

    def _warm(self, model: Any, use: Any) -> tuple[Any, Any, set[str]]:
        """Use the model twice, unpatched: result, fingerprint, and the places that using it changes by itself."""
        use()
        first = fingerprint(model)
        result = use()
        second = fingerprint(model)
        return result, second, first.changed(second)
