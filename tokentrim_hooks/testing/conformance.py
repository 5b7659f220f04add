"""The conformance kit: subclass :class:`AdapterConformance` in a test module of yours and your adapter is on trial.

The kit believes nothing that an adapter says of itself. It takes fingerprints, counts synchronisations, watches the
attention kernel and computes its own pruned reference, with -inf at keys that it found by their values. A part that it
cannot check on a model is skipped with a reason that begins with ``NOT CHECKED``: an open question, never a pass.
"""

from __future__ import annotations

import copy
import inspect
import pickle

import torch
from torch import nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.checks.probes import Predictions
from tokentrim_hooks.testing.fingerprint import assert_same, fingerprint
from tokentrim_hooks.testing.laws.company import CompanyTests
from tokentrim_hooks.testing.laws.exactness import PruningTests
from tokentrim_hooks.testing.laws.guided import GuideConformance
from tokentrim_hooks.testing.laws.hooks import HooksConformance
from tokentrim_hooks.testing.laws.statements import StatementTests
from tokentrim_hooks.testing.laws.weights import WeighConformance
from tokentrim_hooks.testing.policies import CountingPolicy
from tokentrim_hooks.testing.syncs import count_syncs


class AdapterConformance(
    StatementTests, PruningTests, CompanyTests, HooksConformance, GuideConformance, WeighConformance
):
    """What every adapter must pass. Subclasses set ``adapter`` and write :meth:`make_model` and :meth:`run`.

    All settings, and what else can be overridden, are those of :class:`tokentrim_hooks.testing.laws.trial.Trial`.
    """

    # ------------------------------------------------------------------------------ recognition

    def test_detected_by_exactly_this_adapter(self) -> None:
        """Detection names this adapter and no other, and the adapter refuses strangers with a reason."""
        model = self.make_model()
        giving_way = {*self.adapter.instead_of, *(vars(base).get("name", "") for base in self.adapter.__mro__)}
        others = {found.adapter for found in tokentrim.detect(model) if found.matches} - giving_way
        assert not others, f"also recognised by {sorted(others)}"
        self.denoisers(model)
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
        """Each chunk begins with exactly one FIRST call; all but the first are judged, against what was judged before;
        no call goes unnoticed.
        """
        model, counts = self.make_model(), CountingPolicy(known=[])
        with self.patch(model, counts) as handle, checks.counting(self.denoisers(model)) as calls:
            heard = Predictions(handle.adapter)
            self.run(model, 0)
        checks.check_records(handle.report, self.chunks, self.overlap, self.backwards)
        assert sorted({*counts.known}) == list(range(self.chunks - 1)), (
            f"severities known at each judged chunk: {counts.known}, expected one more each time: run() is one scene, "
            "and neither changes_prompt() nor phase() may begin another"
        )
        if not heard.in_flight:  # a call for several chunks is one chunk's only, and some are none's
            checks.check_calls(handle.report, calls.count)

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
        """While nothing is dead, tokentrim and the adapter wait for the device at most once per chunk.

        Where the sampler is a function, no pipeline's method, further calls of a video's first chunk are asked as well
        whether they are still that video's.
        """
        model = self.make_model()
        files = [inspect.getfile(self.adapter), *self.own_files]
        with self.patch(model, tokentrim.ObservePolicy()) as handle, count_syncs(files) as log:
            self.run(model, 0)
        further = sum(record.phases.get("refine", 0) for record in handle.report.records[:1])
        asked = sum("begins_anew" in wait.place for wait in log.ours)
        waits = len(log.ours) - min(asked, further)
        assert waits <= self.chunks, f"{waits} waits in {self.chunks} chunks\n{log}"

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
        whole = fingerprint(model)

        def break_down() -> None:
            with checks.Tripwire(at=int(0.8 * linears.count)):
                checks.assert_raises(checks.Injected, lambda: self.run(model, 4))

        _, before, own = self._warm(model, break_down)
        own |= whole.changed(before)  # a replay makes the failure come at an earlier step of the sampler
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
        try:
            works = torch.equal(plain, self.run(copy.deepcopy(model), 5))
        except Exception as failure:
            raise checks.not_checked(f"the unpatched model cannot be copied ({failure})") from None
        if not works:
            raise checks.not_checked("a copy of the unpatched model gives other results")
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
