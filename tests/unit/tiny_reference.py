"""A tiny reference pipeline and its run, for tests of what surrounds the model."""

import torch

from tokentrim_hooks.reference.pipeline import ReferencePipeline

PIXELS = 8
CHUNKS = 5


def make(**settings):
    return ReferencePipeline.random(**{"layers": 2, "dim": 16, "grid": (2, 2), "local_attn_size": 6,
                                       "num_frame_per_block": 2, **settings})  # fmt: skip


def run(pipeline, seed=0, batch=1, chunks=CHUNKS):
    torch.manual_seed(seed)
    noise = torch.randn(batch, chunks * pipeline.num_frame_per_block, 3, PIXELS, PIXELS)
    return pipeline.inference(noise, ["a"] * batch, return_latents=True)[1]
