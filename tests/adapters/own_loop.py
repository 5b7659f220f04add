"""Self-Forcing's loop as a generator, so that videos can be made in turns: yields the video after every call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

STEPS = (1000, 750, 500, 250)
CHUNKS = 5
Handed = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def same(cache):
    return cache


def remade(cache):
    """As DDP and FSDP do at every call: new lists and dicts, of views of the same tensors."""
    return [{key: value.view(value.shape) for key, value in layer.items()} for layer in cache]


def calls(
    pipeline: Any,
    seed: int,
    *,
    noise_seed: int | None = None,
    handed: Handed = same,
    moved: bool = False,
    copied: int = -1,
    guidance: float = 0.0,
    chunks: int = CHUNKS,
) -> Iterator[Tensor]:
    """Make a video with a cache of its own; yields the finished frames (perhaps none) behind every call.

    Args:
        seed: of the noise between steps, and of the video unless ``noise_seed`` is given.
        handed: what becomes of the cache on its way into a call.
        moved: whether the cache is moved to new memory between chunks, as by offloading.
        copied: chunk behind which the video goes on with a copy of the cache, the old one being kept; -1 for none.
        guidance: strength of a second branch with a cache of its own; 0 for none.
    """
    frames = pipeline.num_frame_per_block
    first = torch.Generator().manual_seed(seed if noise_seed is None else noise_seed)
    later = torch.Generator().manual_seed(seed + 1000)
    noise = torch.randn(1, chunks * frames, 3, 8, 8, generator=first)
    branches = [_cache(pipeline, noise) for _ in range(2 if guidance else 1)]
    done: list[Tensor] = []
    kept = None
    for chunk in range(chunks):
        x = noise[:, chunk * frames : (chunk + 1) * frames]
        for step, following in zip((*STEPS, 0), (*STEPS[1:], None, None), strict=True):
            outputs = []
            for number, cache in enumerate(branches):
                # The other branch reads other latents than the model was given, as a prompt would make it.
                outputs.append(_call(pipeline, x, step, handed(cache), chunk * frames, number))
                yield torch.cat(done, 1) if done else noise[:, :0]
            x0 = outputs[0] + guidance * (outputs[0] - outputs[-1])
            if following is not None:
                x = _noised(pipeline, x0, following, later)
            elif step:
                x = x0
                done.append(x0)
        if moved:
            for layer in (layer for cache in branches for layer in cache):
                layer.update({key: value.clone() for key, value in layer.items()})
        if chunk == copied:
            kept = branches
            branches = copy.deepcopy(branches)
    del kept
    yield torch.cat(done, 1)


def last(iterator: Iterator[Tensor]) -> Tensor:
    """The whole video."""
    for video in iterator:  # noqa: B007
        pass
    return video


def in_turns(*iterators: Iterator[Tensor], every: int = 1) -> list[Tensor]:
    """The videos, each advanced by ``every`` calls in its turn."""
    videos: dict[int, Tensor] = {}
    running = dict(enumerate(iterators))
    while running:
        for number, iterator in list(running.items()):
            for _ in range(every):
                try:
                    videos[number] = next(iterator)
                except StopIteration:
                    del running[number]
                    break
    return [videos[number] for number in sorted(videos)]


def _cache(pipeline, noise):
    pipeline._initialize_kv_cache(1, noise.dtype, noise.device, 6 * pipeline.frame_seq_length)
    return pipeline.kv_cache1


def _call(pipeline, x, step, cache, start, branch):
    cross = [{"k": None, "v": None, "is_init": False} for _ in cache]
    return pipeline.generator(
        noisy_image_or_video=x,
        conditional_dict={"prompt_embeds": None},
        timestep=torch.full(x.shape[:2], float(step) if not branch else step * 0.9),
        kv_cache=cache,
        crossattn_cache=cross,
        current_start=start * pipeline.frame_seq_length,
    )[1]


def _noised(pipeline, x0, step, generator):
    flat = x0.flatten(0, 1)
    drawn = torch.randn(flat.shape, generator=generator)
    noisy = pipeline.generator.scheduler.add_noise(flat, drawn, torch.full((flat.shape[0],), float(step)))
    return noisy.unflatten(0, x0.shape[:2])
