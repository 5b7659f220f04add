"""What becomes of marks in copies of a KV cache that were made while something in it was dead."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickletools
import subprocess
import sys
import textwrap
import zipfile
from types import SimpleNamespace

import pytest
import tiny_reference
import torch
from own_loop import CHUNKS, STEPS, calls, last

import tokentrim_hooks as tokentrim
from tokentrim_hooks.pruning.context import CacheRows, KeyLayout, Role, Segment
from tokentrim_hooks.pruning.tombstones import alive_rows
from tokentrim_hooks.rollout.pruner import Pruner
from tokentrim_hooks.rollout.repeat.shown import Proof
from tokentrim_hooks.testing import ForcedPolicy, count_syncs

POLICY = ForcedPolicy({2: [0, 3]})
BEHIND = 4 * (len(STEPS) + 1)
"""Calls that the sampler has made when the fourth chunk is committed."""


def marked(layers):
    return [int((~alive_rows(layer["v"])).sum()) for layer in layers]


def amid(pipeline):
    """A video whose fourth chunk is committed, and what is to come of it."""
    video = calls(pipeline, 1)
    for _ in itertools.islice(video, BEHIND):
        pass
    return video


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file


@pytest.fixture
def patched():
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        video = amid(pipeline)
        yield pipeline, handle, video, pipeline.kv_cache1


def test_a_copied_model_carries_no_mark(patched):
    """Its cache is an attribute of the pipeline, which lies before or behind the handle."""
    pipeline, _, video, cache = patched
    before = marked(cache)
    assert min(before) > 0
    for attributes in (vars(pipeline), dict(reversed(vars(pipeline).items()))):
        other = copy.copy(pipeline)
        other.__dict__ = dict(attributes)
        copied = copy.deepcopy(other)
        assert not any(marked(copied.kv_cache1)) and not tokentrim.is_patched(copied)
        assert copied.kv_cache1[0]["v"].isfinite().all()
    assert marked(cache) == before
    assert torch.equal(last(video), alone()), "the patched one goes on as it was"


def alone():
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY):
        return last(calls(pipeline, 1))


def test_a_saved_cache_is_plain_tensors(patched):
    """A copy of the cache alone carries the marks, and nothing of ours."""
    file = saved(patched[3])
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    named = {str(argument) for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)}
    assert named and not [name for name in named if "tokentrim" in name]
    file.seek(0)
    assert marked(torch.load(file, weights_only=True)) == marked(patched[3])


def test_unmark_makes_it_finite(patched):
    _, _, _, cache = patched
    copied, heads_first = copy.deepcopy(cache), [layer["v"].transpose(1, 2).contiguous() for layer in cache]
    assert tokentrim.unmark({"layers": (copied,)}) == sum(marked(cache)) == tokentrim.unmark(heads_first)
    for layer, original, other in zip(copied, cache, heads_first, strict=True):
        dead = ~alive_rows(original["v"])
        assert layer["v"].isfinite().all() and torch.equal(layer["v"][~dead], original["v"][~dead])
        assert torch.equal(layer["v"][dead][:, 0, 1:], original["v"][dead][:, 0, 1:])
        assert torch.equal(other.transpose(1, 2), layer["v"])
    assert tokentrim.unmark(copied) == 0 and min(marked(cache)) > 0


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16), ids=str)
def test_unmark_knows_the_marks_of_every_type(dtype):
    values = torch.ones(1, 4, 2, 8).to(dtype)
    values[:, 1, 0, 0] = float("nan") if dtype is torch.float8_e4m3fn else float("inf")
    assert tokentrim.unmark([values]) == 1
    assert values.float().isfinite().all() and int((values.float() == 0).sum()) == 1


@pytest.mark.parametrize("policy", (tokentrim.ObservePolicy(), ForcedPolicy({})), ids=("observe", "never"))
def test_a_later_patch_goes_on_from_a_copy(policy):
    """What was dead stays so under another patch, which says whose the marks are."""
    right, found = alone(), []
    pipeline = tiny_reference.make()

    def handed(cache):
        return found[-1] if found else cache

    with tokentrim.patched(pipeline, POLICY):
        video = calls(pipeline, 1, handed=handed)
        for _ in itertools.islice(video, BEHIND):
            pass
        found.append(copy.deepcopy(pipeline.kv_cache1))
    said = pytest.warns(tokentrim.TokenTrimWarning, match=r"earlier patch had pruned.*tokentrim\.unmark")
    with tokentrim.patched(pipeline, policy), said:
        assert torch.equal(last(video), right)
    assert CHUNKS > 4 and min(marked(found[-1])) == 0, "unpatch leaves no mark in what it has seen"


FRESH = """
    import itertools, sys, torch, tiny_reference
    from own_loop import calls, last
    import tokentrim_hooks as tokentrim

    cache = torch.load(sys.argv[1], weights_only=True)
    pipeline, found = tiny_reference.make(), []
    video = calls(pipeline, 1, handed=lambda own: found[-1] if found else own)
    for _ in itertools.islice(video, int(sys.argv[2])):
        pass
    found.append(cache)
    with tokentrim.patched(pipeline, tokentrim.ObservePolicy()):
        torch.save(last(video), sys.argv[1])
"""


def test_a_process_that_has_never_pruned_goes_on_from_a_saved_cache(tmp_path):
    """And says whose the marks are."""
    pipeline, file = tiny_reference.make(), tmp_path / "cache.pt"
    with tokentrim.patched(pipeline, POLICY):
        video = calls(pipeline, 1)
        for _ in itertools.islice(video, BEHIND):
            pass
        torch.save(pipeline.kv_cache1, file)
    assert min(marked(torch.load(file))) > 0
    command = [sys.executable, "-c", textwrap.dedent(FRESH), str(file), str(BEHIND)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "tokentrim.unmark" in done.stderr, done.stderr
    frames = pipeline.num_frame_per_block
    assert torch.equal(torch.load(file)[:, -frames:], alone()[:, -frames:]), "the fifth chunk, on the loaded cache"


ROWS = torch.ones(1, 8, 2, 4)
CONTEXTS = {
    "in the sequence": (KeyLayout((Segment(Role.CURRENT, (0,), 2, 2),)), 1, 0),
    "an empty cache": (CacheRows([ROWS], 0, 0, 4), 3, 0),
    "a cache with history": (CacheRows([ROWS], 0, 4, 4), 3, 3),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_it_costs_to_look_for_marks(name):
    """Of three videos that begin amid: questions to the adapter, and reads of the device."""
    context, questions, reads = CONTEXTS[name]
    asked = []
    adapter = SimpleNamespace(name="tried", keeps_memory=False, context=lambda call: asked.append(call) or context)
    proof = Proof()
    with count_syncs() as log:
        for _ in range(3):
            Pruner(adapter, (1, 1), POLICY, proof).inherit(SimpleNamespace(stream=0))
    assert (len(asked), sum(event.ours for event in log.events)) == (questions, reads)


def test_a_video_from_the_beginning_is_not_looked_into(monkeypatch):
    asked = []
    monkeypatch.setattr(Pruner, "inherit", lambda pruner, call: asked.append(call.start))
    pipeline = tiny_reference.make()
    with tokentrim.patched(pipeline, POLICY):
        for seed in range(2):
            last(calls(pipeline, seed))
    assert not asked
