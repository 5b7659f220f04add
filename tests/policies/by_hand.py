"""The same methods by hand, on an unpatched pipeline: what a patched one has to equal."""

import copy

import torch

from tokentrim_hooks.reference import model as reference_model
from tokentrim_hooks.reference.pipeline import ReferencePipeline

TOKENS = 4
FRAMES = 2
PIXELS = 8


def make(cls=ReferencePipeline, **settings):
    options = {"layers": 2, "dim": 16, "grid": (2, 2), "local_attn_size": 6, "num_frame_per_block": FRAMES}
    return cls.random(**{**options, **settings})


def twin_of(pipeline):
    """A pipeline of the same networks with caches of its own: another video, made at the same time."""
    twin = copy.copy(pipeline)
    twin._modules = dict(pipeline._modules)
    twin.kv_cache1 = twin.crossattn_cache = None
    return twin


def run(pipeline, seed=0, batch=2, chunks=7):
    torch.manual_seed(seed)
    noise = torch.randn(batch, chunks * FRAMES, 3, PIXELS, PIXELS)
    return pipeline.inference(noise, ["a"] * batch, return_latents=True)[1]


class ByHand(ReferencePipeline):
    """Shows every call: ``reads(kind, keys)`` gives dead keys ``[B, keys]``, ``answers`` and ``wrote`` change it."""

    reads = answers = wrote = None

    def _call(self, latents, timestep, conditional, start):
        steps = [int(step) for step in self.denoising_step_list]
        kind = "commit" if not int(timestep.flatten()[0]) else steps.index(int(timestep.flatten()[0]))
        native = reference_model.attention

        def masked(q, k, v):
            dead = self.reads(kind, k.shape[1])
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(dead.expand(q.shape[0], -1)[:, None, None], float("-inf"))
            return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

        reference_model.attention = masked if self.reads else native
        try:
            x0 = super()._call(latents, timestep, conditional, start)
        finally:
            reference_model.attention = native
        if kind == "commit" and self.wrote:
            self.wrote(self.kv_cache1, start // FRAMES)
        return x0 if kind == "commit" or not self.answers else self.answers(x0, kind, start // FRAMES)


def moments_moved(x, dims, target, strength):
    """``x`` with mean and deviation over ``dims`` moved towards those of ``target``, written out in float64."""
    x64, goal = x.double(), target.double()
    mean, goal_mean = x64.mean(dims, keepdim=True), goal.mean(dims, keepdim=True)
    std = (x64 - mean).pow(2).mean(dims, keepdim=True).sqrt()
    goal_std = (goal - goal_mean).pow(2).mean(dims, keepdim=True).sqrt()
    new_std, new_mean = std + strength * (goal_std - std), mean + strength * (goal_mean - mean)
    return ((x64 - mean) / std * new_std + new_mean).to(x.dtype)
