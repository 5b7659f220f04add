"""What the lifecycle's state machines drive: seven models, the ways to patch them, and what a fresh patch gives."""

from __future__ import annotations

import functools
import io
from typing import Any

import torch
from interruptions import Events
from own_loop import calls, last
from targets import COUNTING, TARGETS

import tokentrim_hooks as tokentrim
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.testing import ForcedPolicy

MODES = {
    "unpatched": None,
    "observe": (tokentrim.ObservePolicy(), "first-step"),
    "never": (ForcedPolicy({}), "first-step"),
    "prune": (ForcedPolicy({2: (1,)}), "first-step"),
    "prune for one chunk": (ForcedPolicy({2: (1,)}, persist=False), "first-step"),
    "prune twice": (ForcedPolicy({1: (0,), 2: (1, 3)}), "first-step"),
    "candidate": (ForcedPolicy({2: (1,)}), "candidate"),
}


class Reference:
    """The reference model: a KV cache."""

    part, modes, own_generators = "generator", tuple(MODES), False
    chunks, beside = 4, 0  # the latter: calls of a video that are of no chunk

    def make(self):
        tiny = {"layers": 1, "dim": 16, "grid": (2, 2), "num_frame_per_block": 2}
        return ReferencePipeline.random(local_attn_size=6, **tiny)

    def run(self, pipeline):
        torch.manual_seed(0)
        return pipeline.inference(torch.randn(1, 8, 3, 8, 8), ["a"], return_latents=True)[1]

    def sharing(self, pipeline):
        return ReferencePipeline(pipeline.generator)


class Diffusers:
    """A model of diffusers, as ``targets.py`` has it; a video draws from a generator of its own."""

    modes, own_generators = tuple(mode for mode in MODES if mode != "candidate"), True

    def sharing(self, pipeline):
        other = type(pipeline)(**pipeline.components)
        other.set_progress_bar_config(disable=True)
        return other


CHUNKS = {"skyreels-v2": 3, "framepack": 4, "helios": 4, "anyflow-far": 5, "ltx-long": 4, "sana-wm": 7}


def _kit(target) -> type[Any]:
    functions = {"make": staticmethod(target.make), "run": staticmethod(target.run)}
    sizes = {"part": target.part, "chunks": CHUNKS[target.name.removesuffix("-counting")], "beside": target.beside}
    return type(target.name, (Diffusers,), {**functions, **sizes})


MODELS = (*(target for target in TARGETS if target.name in CHUNKS), *COUNTING[1:2])
DIFFUSERS = tuple(map(_kit, MODELS))
"""All of them, and one in which a hook counts."""


def patch(pipeline, mode, **options):
    policy, probe = MODES[mode]
    return tokentrim.patch(pipeline, policy, probe=probe, **options)


@functools.cache
def alone(kit, mode, seed=None):
    """A video made by a fresh pipeline in which nothing else happens; ``seed`` is that of a loop of the user's own."""
    pipeline = kit().make()
    handle = None if mode == "unpatched" else patch(pipeline, mode)
    video = kit().run(pipeline) if seed is None else last(calls(pipeline, seed))
    if handle is not None:
        handle.unpatch()
    return video


@functools.cache
def count_of_events(kit, mode):
    """How many places there are to interrupt a run at; the first one of a patch has more, for it proves a call too."""
    pipeline = kit().make()
    handle = None if mode == "unpatched" else patch(pipeline, mode)
    for _ in range(2):
        with Events(getattr(pipeline, kit.part)) as events:
            kit().run(pipeline)
    if handle is not None:
        handle.unpatch()
    return len(events.seen)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def swapped(module):
    twin = object.__new__(type("Custom" + type(module).__name__, (type(module),), {}))
    twin.__dict__ = module.__dict__
    return twin
