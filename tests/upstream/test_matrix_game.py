"""The real Matrix-Game 2: what is pruned is dead in the KV cache and, site by site, in the caches of the mouse."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import fork_checks
import pytest
import torch
from comparison import OTHERS, TOKENS, TOLERANCE, VISIBLE, Comparison, difference, pruned_at, trace
from forced import ForcedPolicy
from harness import checkout, plain_attention
from masked_calls import commit_window, following, hiding
from masked_reference import MaskedReference, Prune, masked_attention
from tiny_matrix_game import MouseReference, generate, matrix_game, matrix_pipeline, skip_init, source_of
from tiny_self_forcing import Repository, Setup
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import CommitWindow, UnsupportedContextError

pytestmark = [pytest.mark.upstream, pytest.mark.checks("matrix-game-2", "exact")]
Record = Callable[[str, Any], None]
CHUNKS = 7
WINDOWS = {"universal": (6, True), "gta_drive": (4, True), "templerun": (6, False)}
"""Frames in the window, and whether there is a mouse: by the name of the configuration."""


@dataclass
class Actions(Comparison):
    """A comparison whose reference masks the caches of the mouse, too."""

    action: Any = None
    sites: int = 0

    def reference(self, prunes: Any, **options: Any) -> Tensor:
        if options.get("drop"):
            return super().reference(prunes, **options)
        with MouseReference(self.source, prunes, action=self.action) as reference:
            latents = self.run()
        self.sites = sum(reference.sites)
        assert any(any(counts) for counts in reference.masked)
        return latents


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with matrix_game() as opened:
        yield opened


def compare(repository: Repository, name: str = "universal") -> Actions:
    window, mouse = WINDOWS[name]
    pipeline = matrix_pipeline(repository, Setup(window=window), mouse)

    def video() -> Tensor:
        with torch.no_grad():
            return generate(pipeline, 3 * CHUNKS, mouse)

    return Actions(video, pipeline, source_of(repository, pipeline), action=repository.diffusion)


CASES = {
    "before the window is full": {1: [TOKENS]},
    "as it rolls": {2: [TOKENS]},
    "late": {5: [TOKENS]},
    "two prunes": {2: [TOKENS], 4: [OTHERS]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", WINDOWS)
def test_prune_equals_masked_attention(repository: Repository, name: str, case: str, record_property: Record) -> None:
    comparison, plan = compare(repository, name), CASES[case]
    reference = comparison.reference([Prune(3 * chunk, tokens) for chunk, tokens in plan.items()])
    assert bool(comparison.sites) == WINDOWS[name][1]
    for probe in ("first-step", "candidate"):
        ours, handle = comparison.patched(ForcedPolicy(plan), probe=probe)
        comparison.exact(f"Matrix-Game 2 {name}, {case}, {probe}", record_property, ours, reference)
        assert pruned_at(handle) == sorted(plan)
        assert trace(handle) == [Setup().trace()] * CHUNKS


def test_the_mouse_remembers_what_the_cache_forgets(repository: Repository) -> None:
    """With the mouse's caches left as they are, the video is another: marks in the one cache alone are half a prune."""
    comparison = compare(repository)
    ours, _ = comparison.patched(ForcedPolicy({2: [TOKENS]}))
    with MaskedReference(comparison.source, [Prune(6, [TOKENS])]):
        half = comparison.run()
    assert difference(ours, half) > VISIBLE


def test_marks_lie_in_both_caches_and_in_no_keyboard(repository: Repository) -> None:
    comparison = compare(repository)
    pipeline = comparison.model
    with tokentrim.patch(pipeline, ForcedPolicy({CHUNKS - 1: [TOKENS]})):
        comparison.run()
        dead = ~pipeline.kv_cache1[1]["v"][0, :, 0, 0].isfinite()
        sites = ~pipeline.kv_cache_mouse[1]["v"][:, :, 0, 0].isfinite()
        assert torch.equal(sites.T.flatten(), dead) and int(dead.sum()) == 3 * len(TOKENS)
        assert bool(pipeline.kv_cache_keyboard[1]["v"].isfinite().all())
    assert all(bool(layer["v"].isfinite().all()) for layer in [*pipeline.kv_cache1, *pipeline.kv_cache_mouse])


def test_a_hidden_frame_is_hidden_from_the_mouse(repository: Repository) -> None:
    """A commit reads the newest frames only, in both caches; written out by place in the kernels."""
    comparison, plain = compare(repository), plain_attention
    source, hidden = comparison.source, list[int]()
    with following(source) as calls, hiding(source, commit_window(4, 0, False, 80)) as rows:

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            old = k.shape[1] - q.shape[1] - 1
            if not calls.commit or old < 1 or bool((v == v[:1]).all()):  # the keyboard's is the same at all sites
                return plain(q, k, v)
            hidden.append(old)
            return masked_attention(q, k, v, (torch.arange(k.shape[1]) < old)[None].expand(k.shape[0], -1))

        with mock.patch.object(repository.diffusion, "flash_attn_func", attention):
            reference = comparison.run()
    with tokentrim.patch(comparison.model, CommitWindow(4)):
        ours = comparison.run()
    assert set(hidden) == {2} and len(hidden) == 2 * (CHUNKS - 1) and set(rows) == {2 * 80}
    assert difference(reference, comparison.run()) > VISIBLE
    assert difference(ours, reference) <= TOLERANCE


def test_a_sink_is_refused(repository: Repository) -> None:
    """The caches of the mouse have none, whatever the configuration says."""
    with pytest.raises(UnsupportedContextError, match="sink_size"):
        tokentrim.patch(matrix_pipeline(repository, Setup(window=6, sink=1)))


def test_what_every_fork_must_show(repository: Repository) -> None:
    comparison = compare(repository)
    native = repository.diffusion.flash_attn_func
    fork_checks.detected(comparison, "matrix-game-2")
    fork_checks.neutral(comparison, chunks=CHUNKS)
    fork_checks.replayed(compare(repository, "templerun"), chunk=4, block=3)
    fork_checks.restored(comparison, chunk=3)
    fork_checks.started_afresh(comparison, chunk=3, chunks=CHUNKS)
    assert repository.diffusion.flash_attn_func is native


def test_matrix_game_3_is_refused_by_name() -> None:
    """The real class; what was found of it is in docs/models.md."""
    with checkout("Matrix-Game", stubs=("flash_attn",), subfolder="Matrix-Game-3") as folder:
        skip_init(folder, "wan", "wan.modules")
        kind = importlib.import_module("wan.modules.model").WanModel
        model = kind("ti2v", dim=64, ffn_dim=64, freq_dim=32, num_heads=2, num_layers=1, text_dim=16, text_len=8)
        with pytest.raises(tokentrim.UnsupportedModelError, match="this is Matrix-Game 3"):
            tokentrim.patch(model)
