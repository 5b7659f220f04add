"""The real FlowCache, a fork of MAGI-1: exact as it samples without its caches, refused in words with them.

Its base model with guidance fails upstream, unpatched, without a cache as well: it is the distilled one that runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import TOLERANCE, VISIBLE, difference, pruned_at
from forced import ForcedPolicy
from magi1_reference import MagiReference, Prune
from magi1_tiny import Repository, Setup, magi1

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy, UnsupportedContextError

pytestmark = [pytest.mark.upstream, pytest.mark.checks("magi-1", "exact")]
DEAD = (1, 6, 11)
SETUPS = {"4 chunks in flight": Setup(passes=1), "one chunk after the other": Setup(passes=1, window=1, steps=4)}
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "flowcache": ("flowcache", {}),
    "flowcache without compression": ("flowcache", {"compress_kv_cache": False}),
    "teacache": ("teacache", {}),
}
STAYS = ("forward_velocity", "integrate_velocity", "total_cache_chunk_nums", "compress_kv_cache", "cache_reuse_manager")
"""What its caches put on the sampler's class."""


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with magi1("FlowCache", "FlowCache4MAGI-1") as opened:
        yield opened


@contextmanager
def caching(repository: Repository, name: str, **options: Any) -> Iterator[None]:
    """Its own ``setup_...``, taken back afterwards."""
    sampler = repository.generate.SampleTransport
    with mock.patch.multiple(sampler, create=True, **{name: getattr(sampler, name, None) for name in STAYS}):
        getattr(importlib.import_module(f"inference.pipeline.{name}"), f"setup_{name}")(**options)
        yield


@pytest.mark.parametrize("name", SETUPS)
def test_without_its_caches_it_is_exact(repository: Repository, name: str, record_property: Callable) -> None:
    setup = SETUPS[name]
    dit = repository.build(setup)
    plain = repository.sample(dit, setup)
    with MagiReference(repository, dit, (Prune(3, DEAD),)) as masking:
        reference = repository.sample(dit, setup)
    with tokentrim.patch(dit, ForcedPolicy({3: [DEAD]})) as handle:
        ours = repository.sample(dit, setup)
    effect, error = difference(reference, plain), difference(ours, reference)
    record_property("exact", (f"FlowCache, {name}", effect, error))
    assert masking.masked and pruned_at(handle) == [3]
    assert effect > VISIBLE and error <= TOLERANCE
    with tokentrim.patch(dit, ObservePolicy()):
        assert torch.equal(repository.sample(dit, setup), plain)


@pytest.mark.parametrize("name", CACHES)
def test_with_them_it_is_refused_at_the_first_call(repository: Repository, name: str) -> None:
    """They answer a dict of velocities, skip calls, and reuse, merge and drop K and V."""
    setup, (kind, options) = Setup(passes=1), CACHES[name]
    dit = repository.build(setup)
    with (
        caching(repository, kind, **options),
        tokentrim.patch(dit, ForcedPolicy({3: [DEAD]})),
        pytest.raises(UnsupportedContextError, match=rf"replaced by inference\.pipeline\.{kind}(?s:.*)sample without"),
    ):
        repository.sample(dit, setup)


def test_a_cache_that_is_let_be_samples_as_without_us(repository: Repository) -> None:
    """With on_error="warn" the video is the fork's own."""
    setup = Setup(passes=1)

    def video(patched: bool) -> torch.Tensor:
        dit = repository.build(setup)
        with caching(repository, "flowcache"):
            if not patched:
                return repository.sample(dit, setup)
            with pytest.warns(tokentrim.TokenTrimWarning), tokentrim.patch(dit, on_error="warn"):
                return repository.sample(dit, setup)

    assert torch.equal(video(True), video(False))
