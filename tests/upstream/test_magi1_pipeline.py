"""The real MAGI-1, patched, through several videos, errors, copies, and its own pipeline."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import VISIBLE, difference, pruned_at
from forced import ForcedPolicy
from magi1_reference import CHUNK_ROWS, MagiReference, Prune, spying
from magi1_tiny import LAYERS, Repository, Setup, magi1, prompt
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks import ObservePolicy, TokenTrimWarning
from tokentrim_hooks.testing.fingerprint import assert_same, fingerprint

pytestmark = pytest.mark.upstream

DEAD = (1, 6, 11)
BASE = Setup(steps=4)


@pytest.fixture(scope="module")
def repository() -> Iterator[Repository]:
    with magi1() as opened:
        yield opened


@pytest.fixture(scope="module")
def unpatched(repository: Repository) -> Callable[[Setup], tuple[Any, Tensor]]:
    """A model and the latents that it samples by itself."""

    @functools.cache
    def sampled(setup: Setup) -> tuple[Any, Tensor]:
        dit = repository.build(setup)
        return dit, repository.sample(dit, setup)

    return sampled


# ------------------------------------------------------------------------------------------ videos, errors


def test_a_new_video_starts_afresh(repository: Repository, unpatched: Any) -> None:
    """Also a video of a single chunk after another one: its memory, not its frames, tells."""
    single = BASE.but(chunks=1)
    for setup in (BASE, single):
        dit, latents = unpatched(setup)
        with tokentrim.patch(dit, ForcedPolicy({3: [DEAD]})) as handle:
            first, second = repository.sample(dit, setup), repository.sample(dit, setup)
        assert torch.equal(first, second)
        assert torch.equal(first, latents) == (setup is single)
        halves = [[r for r in handle.report if r.video == video] for video in (0, 1)]
        assert [r.severity for r in halves[0]] == [r.severity for r in halves[1]]
        assert [r.chunk for r in halves[1]] == list(range(setup.chunks))


def test_a_patch_keeps_no_memory_alive(repository: Repository, unpatched: Any) -> None:
    dit, _ = unpatched(BASE)
    with spying(type(dit)) as calls, tokentrim.patch(dit, ForcedPolicy({3: [DEAD]})):
        repository.sample(dit, BASE)
        memory = weakref.ref(calls[-1].memory)
        calls.clear()
        gc.collect()
        assert memory() is None


def test_a_missed_attention_is_noticed(repository: Repository, unpatched: Any) -> None:
    dit, latents = unpatched(BASE)
    with tokentrim.patch(dit, ForcedPolicy({3: [DEAD]})) as handle:
        del dit.videodit_blocks.layers[1].self_attention.core_attention
        with pytest.warns(TokenTrimWarning, match=f"{2 * (LAYERS - 1)} of {2 * LAYERS} attention calls"):
            observed = repository.sample(dit, BASE)
    assert torch.equal(observed, latents)
    assert pruned_at(handle) == []


def test_an_exception_in_mid_chunk_leaves_nothing(repository: Repository, unpatched: Any) -> None:
    dit, latents = unpatched(BASE)
    before = fingerprint(dit)
    attend = repository.layers.flash_attn_func

    def failing(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if k.shape[1] % CHUNK_ROWS:  # the first attention that lacks keys
            raise RuntimeError("out of memory")
        return attend(q, k, v, **options)

    with (
        mock.patch.object(repository.layers, "flash_attn_func", failing),
        pytest.raises(RuntimeError, match="memory"),
        tokentrim.patch(dit, ForcedPolicy({3: [DEAD]})),
    ):
        repository.sample(dit, BASE)
    assert_same(before, fingerprint(dit))
    assert torch.equal(repository.sample(dit, BASE), latents)


def test_a_copy_of_a_patched_model_is_unpatched(repository: Repository, unpatched: Any) -> None:
    dit, latents = unpatched(BASE)
    with tokentrim.patch(dit, ForcedPolicy({3: [DEAD]})) as handle:
        clone = copy.deepcopy(dit)
        assert torch.equal(repository.sample(clone, BASE), latents)
        assert not len(handle.report) and not tokentrim.is_patched(clone)


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        (BASE.but(devices=(1, 2)), "pp_size is 2"),
        (BASE.but(devices=(2, 1), strategy="cp_ulysses"), "cp_size is 2"),
        (BASE.but(strategy="cp_shuffle_overlap"), "cp_shuffle_overlap"),
    ],
    ids=["pipeline stages", "context parallel", "shuffled overlap"],
)
def test_what_is_not_proved_is_refused(repository: Repository, setup: Setup, reason: str) -> None:
    with pytest.raises(tokentrim.UnsupportedModelError, match=reason):
        tokentrim.patch(repository.build(setup))


def test_a_whole_chunk_cannot_be_replayed(unpatched: Any) -> None:
    with pytest.raises(tokentrim.UnsupportedProbeError):
        tokentrim.patch(unpatched(BASE)[0], probe="candidate")


# ------------------------------------------------------------------------------------------ the pipeline


@pytest.fixture
def pipeline(repository: Repository, tmp_path: Path) -> Iterator[Any]:
    """The real MagiPipeline without text encoder and VAE; ``pipeline.saved`` collects the latents of every run."""
    repository.config(BASE).to_json(str(tmp_path / "config.json"))
    home, saved = repository.pipeline, []
    parts = {
        "dist_init": lambda config: None,
        "get_txt_embeddings": lambda text, config: prompt(),
        "post_chunk_process": lambda chunk, config: chunk.transpose(0, 2),
        "save_video_to_disk": lambda video, path, fps: saved.append(video),
        "set_random_seed": torch.manual_seed,
    }
    with mock.patch.multiple(home, **parts), repository.running(BASE):
        made = home.MagiPipeline(str(tmp_path / "config.json"))
        made.saved = saved
        yield made


def run(pipeline: Any) -> Tensor:
    """Run as a user does, from the seed; the latents that would have become the video."""
    torch.manual_seed(0)
    pipeline.run_text_to_video(prompt="a cat", output_path="cat.mp4")
    return pipeline.saved[-1]


def test_pipeline_is_patched_through_its_class(repository: Repository, unpatched: Any, pipeline: Any) -> None:
    dit, _ = unpatched(BASE)
    before, plain = fingerprint(dit), run(pipeline)
    with MagiReference(repository, dit, [Prune(3, DEAD)], drop=True):
        reference = run_with(repository, pipeline, dit)
    with tokentrim.patch(pipeline, ForcedPolicy({3: [DEAD]})) as handle:
        assert tokentrim.is_patched(pipeline)
        pruned = run(pipeline)
        assert torch.equal(repository.sample(dit, BASE), unpatched(BASE)[1])  # a model of nobody's pipeline
        with pytest.raises(tokentrim.AlreadyPatchedError):
            tokentrim.patch(dit)
        held = dit.forward_dispatcher
    assert torch.equal(pruned, reference) and difference(pruned, plain) > VISIBLE
    assert pruned_at(handle) == [3] and len(handle.report) == BASE.chunks
    assert_same(before, fingerprint(dit))
    with mock.patch.object(dit, "forward_dispatcher", held):  # what somebody kept of the patch is dead
        assert torch.equal(repository.sample(dit, BASE), unpatched(BASE)[1])
    assert torch.equal(run(pipeline), plain)
    assert len(handle.report) == BASE.chunks


def run_with(repository: Repository, pipeline: Any, dit: Any) -> Tensor:
    """The pipeline with a model that is there already."""
    with mock.patch.object(repository.pipeline, "get_dit", lambda config: dit):
        return run(pipeline)


def test_what_may_be_patched(repository: Repository, unpatched: Any) -> None:
    dit, latents = unpatched(BASE)
    for model in (SimpleNamespace(module=dit), dit):
        with tokentrim.patch(model, ObservePolicy()) as handle:
            assert tokentrim.is_patched(dit)
            assert torch.equal(repository.sample(dit, BASE), latents)
        assert len(handle.report) == BASE.chunks
    answers = {found.adapter: found.reason for found in tokentrim.detect(torch.nn.Linear(1, 1))}
    assert "get_dit" in answers["magi-1"]
    assert [found.adapter for found in tokentrim.detect(dit) if found.matches] == ["magi-1"]
