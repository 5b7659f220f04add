"""The conformance kit on the real MAGI-1: one chunk after the other, and four in flight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from magi1_reference import MagiReference, Prune
from magi1_tiny import Repository, Setup, magi1
from tokentrim_hooks_adapters.magi1 import Magi1
from torch import Tensor

from tokentrim_hooks.testing import AdapterConformance

pytestmark = pytest.mark.upstream


@pytest.fixture(scope="module", autouse=True)
def repository() -> Iterator[None]:
    with magi1() as TestOneAfterTheOther.repository:
        yield


class TestOneAfterTheOther(AdapterConformance):
    """The distilled model: a pass of four steps for each chunk."""

    adapter = Magi1
    chunks, chunk_to_prune, late_chunk = 7, 3, 6
    tokens = (1, 6, 11)
    setup: ClassVar[Setup] = Setup(passes=1, window=1, steps=4, chunks=7)
    repository: ClassVar[Repository]

    def make_model(self) -> Any:
        return self.repository.build(self.setup)

    def run(self, model: Any, seed: int) -> Tensor:
        return self.repository.sample(model, self.setup, seed)

    def reference(self, model: Any, seed: int) -> Tensor:
        with MagiReference(self.repository, model, [Prune(self.chunk_to_prune, self.tokens)]) as reference:
            latents = self.run(model, seed)
        assert reference.masked
        return latents


class TestFourInFlight(TestOneAfterTheOther):
    """With guidance; every chunk sees a few before it."""

    setup: ClassVar[Setup] = Setup(steps=4, chunks=7)
