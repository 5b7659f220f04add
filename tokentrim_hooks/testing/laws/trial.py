"""What the kit knows of a model on trial: what its author writes, and runs that its tests have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.attention import watch_attention
from tokentrim_hooks.testing.fingerprint import fingerprint
from tokentrim_hooks.testing.policies import ForcedPolicy


class Trial:
    """An adapter on trial. Subclasses set ``adapter`` and write :meth:`make_model` and :meth:`run`.

    Attributes:
        adapter: the adapter class on trial; it need not be installed.
        chunks: chunks that :meth:`run` generates, at least 5; as many as it takes to evict three times.
        chunk_to_prune: ordinal of the chunk whose context is pruned in the tests: not the first, not the last.
        late_chunk: the same for a prune behind several evictions; 0 is the last one, where the kit can make the
            reference itself.
        tokens: spatial tokens that are pruned then, the same for every sample.
        anchor_frames: first latent frames of a video that the model never evicts and nobody may prune.
        overlap: latent frames that a chunk shares with the one before it, as windows with a tail in common do.
        backwards: whether the sampler makes the end of the video first.
        tolerance: greatest difference to the -inf reference, relative to the largest value.
        own_files: more files of the adapter, whose synchronisations count as its own.
    """

    adapter: ClassVar[type[tokentrim.Adapter[Any]]]
    chunks: ClassVar[int] = 5
    chunk_to_prune: int = 2
    late_chunk: ClassVar[int] = 0
    tokens: ClassVar[Sequence[int]] = (0, 2, 3)
    anchor_frames: ClassVar[int] = 0
    overlap: ClassVar[int] = 0
    backwards: ClassVar[bool] = False
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
        """Patch ``model`` with the adapter on trial, installed or not."""
        return tokentrim.patch(model, policy, adapter=self.adapter, **options)

    def delivered(self, result: Tensor) -> Tensor:
        """Latents ``[B, F, C, H, W]`` of the whole video from what :meth:`run` returns, frame 0 first.

        Override where these are something else. The default takes them as they are, or turns ``[B, C, F, H, W]``.
        """
        return result

    def reference(self, model: Any, seed: int) -> Tensor:
        """Run the unpatched ``model`` with ``tokens`` dead from ``chunk_to_prune`` on, independently of the adapter.

        Override where the kit cannot tell keys by value (a context that is computed anew in every call). Raise
        unittest.SkipTest("NOT CHECKED: ...") where there is no such means.
        """
        per_frame = self._per_frame()
        return checks.run_with_dead_keys(
            lambda: self.run(model, seed), self.denoisers(model), self.chunk_to_prune, self.tokens, per_frame,
            self.anchor_frames,
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
        return self._grid_and_samples()[0]

    def _grid_and_samples(self) -> tuple[int, int]:
        """Tokens of a frame, and samples in the batch."""
        report = self._observed(0)
        height, width = next(iter(report)).grid
        return height * width, 1 + max(record.sample for record in report)

    def _evictions(self, seed: int) -> int:
        """How often rows leave the unpatched model's context."""
        model = self.make_model()
        with watch_attention(self.denoisers(model)) as seen:
            self.run(model, seed)
        return checks.evictions(seen)

    def _warm(self, model: Any, use: Any) -> tuple[Any, Any, set[str]]:
        """Use the model twice, unpatched: result, fingerprint, and the places that using it changes by itself."""
        use()
        first = fingerprint(model)
        result = use()
        second = fingerprint(model)
        return result, second, first.changed(second)
