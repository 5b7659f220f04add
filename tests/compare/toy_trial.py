"""A user's entry point for ``tokentrim compare``: the reference model with random weights, two measures."""

import torch

from tokentrim_hooks.experiments.compare import Column
from tokentrim_hooks.reference.pipeline import ReferencePipeline

MADE = []


class Toy:
    columns = (Column("brightness", "stability", "lower"), Column("change", "motion"))
    settings = {"toy": 1}  # noqa: RUF012

    def __init__(self, seeds):
        self.model = ReferencePipeline.random(layers=2, dim=16, grid=(2, 2), local_attn_size=6, num_frame_per_block=2)
        self.noise = torch.stack(
            [torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )

    def run(self):
        return self.model.inference(self.noise, return_latents=True)[1]

    def measure(self, video):
        return {"brightness": video.mean((1, 2, 3, 4)), "change": video.diff(dim=1).abs().mean((1, 2, 3, 4))}


def make(seeds):
    MADE.append(list(seeds))
    return Toy(seeds)


def wrong(seeds):
    trial = Toy(seeds)
    trial.measure = lambda video: {"brightness": video.mean(), "change": video.mean((1, 2, 3, 4))}
    return trial
