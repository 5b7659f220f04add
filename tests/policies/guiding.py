"""Small pipelines with chunks of three frames, and what guiding must come to in them, in an unpatched loop."""

import copy
import itertools
from dataclasses import dataclass

import torch
from by_hand import PIXELS, make

import tokentrim_hooks as tokentrim

THREE = {"num_frame_per_block": 3, "local_attn_size": 9, "dtype": torch.float64}
"""In float64: Adam's first step is a sign, and where the slope is nearly 0 rounding decides it."""


def pipe(cls=None, **settings):
    """Chunks of three frames, which FlowMo needs."""
    return make(**{**THREE, **settings}) if cls is None else make(cls, **{**THREE, **settings})


def video(pipeline, seed=0, batch=2, chunks=4):
    torch.manual_seed(seed)
    noise = torch.randn(batch, chunks * 3, 3, PIXELS, PIXELS, dtype=torch.float64)
    return pipeline.inference(noise, ["a"] * batch, return_latents=True)[1]


def loss_of(seen):
    """Written out per sample and place: |difference| of neighbours, population variance, mean over channels, max."""
    total = 0
    for sample in seen:
        moves = [(b - a).abs() for a, b in itertools.pairwise(sample)]
        mean = sum(moves) / len(moves)
        variance = sum((move - mean) ** 2 for move in moves) / len(moves)
        total = total + variance.mean(0).max()
    return total


def moved_by_hand(pipeline, latents, sigma, policy):
    """The same latents by the model alone, its cache empty, by torch's own optimisers."""
    generator = copy.deepcopy(pipeline.generator)
    generator._forward_pre_hooks.clear()
    z = latents.detach().clone().requires_grad_()
    make_optimiser = torch.optim.Adam if policy.optimiser == "adam" else torch.optim.SGD
    optimiser = make_optimiser([z], lr=policy.step)
    timestep = torch.full(latents.shape[:2], round(1000 * sigma))
    for _ in range(policy.iterations):
        with torch.enable_grad():
            # The whole chunk without any cache: what a first chunk sees.
            flow, x0 = generator(z, None, timestep)
            loss = loss_of(flow if policy.of == "velocity" else x0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return z.detach()


def expected_video(policy, batch=2, steps=(0,), **settings):
    """The unpatched loop, whose first chunk's calls ``steps`` are made from moved latents."""
    pipeline, place = pipe(**settings), {"call": 0}

    def move(module, args, kwargs):
        call, place["call"] = place["call"], place["call"] + 1
        if call not in steps:
            return None
        sigma = float(kwargs["timestep"].flatten()[0]) / 1000
        latents = moved_by_hand(pipeline, kwargs["noisy_image_or_video"], sigma, policy)
        return args, {**kwargs, "noisy_image_or_video": latents}

    pipeline.generator.register_forward_pre_hook(move, with_kwargs=True)
    return video(pipeline, batch=batch)


@dataclass(frozen=True)
class Descends(tokentrim.Policy):
    """Moves the latents of one chunk's calls against the gradient of x0's square."""

    chunk: int = 2
    phases: tuple[str, ...] = ("first", "refine")
    step: float = 0.02

    def guide(self, chunk):
        if chunk.index != self.chunk or chunk.phase not in self.phases:
            return None
        z = chunk.latents.detach().clone()
        with torch.enable_grad():
            z.requires_grad_()
            (slope,) = torch.autograd.grad(chunk.predict(z).square().sum(), z)
        return z.detach() - self.step * slope


def descended(policy, **settings):
    """The same in an unpatched loop, the look ahead on a copy of the whole pipeline."""
    pipeline, place = pipe(**settings), {"call": -1, "busy": False}

    def move(module, args, kwargs):
        if place["busy"]:
            return None
        place["call"] += 1
        chunk, step = divmod(place["call"], 5)
        phase = "commit" if step == 4 else "refine" if step else "first"
        if chunk != policy.chunk or phase not in policy.phases:
            return None
        twin, given = copy.deepcopy((module, kwargs))
        twin._forward_pre_hooks.clear()
        z = given["noisy_image_or_video"].requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(twin(*args, **given)[1].square().sum(), z)
        return args, {**kwargs, "noisy_image_or_video": z.detach() - policy.step * slope}

    pipeline.generator.register_forward_pre_hook(move, with_kwargs=True)
    return video(pipeline, chunks=5)


def bits_of(value):
    """All tensors in a structure."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in bits_of(part)]
