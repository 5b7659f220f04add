"""The Self-Forcing adapter on the reference model passes the conformance kit, with and without sink and rolling."""

import torch
from tokentrim_hooks_adapters.self_forcing import SelfForcing

from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.testing import AdapterConformance


class Reference(AdapterConformance):
    """Seven chunks on a grid of 2 x 8 tokens of 8 x 2 pixels, so that height and width cannot be taken for another."""

    adapter = SelfForcing
    chunks = 7
    window = 21
    batch = 1

    def make_model(self):
        options = {"local_attn_size": self.window, "sink_size": self.anchor_frames}
        pipeline = ReferencePipeline.random(seed=0, grid=(2, 8), **options)
        pipeline.generator.model.patch_size = (1, 8, 2)
        return pipeline

    def run(self, model, seed):
        torch.manual_seed(seed)
        noise = torch.randn(self.batch, 3 * self.chunks, 3, 16, 16)
        return model.inference(noise, ["a prompt"] * self.batch, return_latents=True)[1]


class TestGrowingCache(Reference):
    pass


class TestRollingCache(Reference):
    window = 9
    chunk_to_prune = 3


class TestSink(Reference):
    window = 9
    anchor_frames = 3
    chunk_to_prune = 3


class TestBatch(Reference):
    window = 9
    batch = 2
