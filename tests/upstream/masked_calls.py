"""References for policies: the real, unpatched loop, with what a policy does written out by hand around its calls.

``Calls`` follows the generator from outside. Keys are hidden in the kernel by their place: finished frames in order
(sinks first), then the frames of the call itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from masked_reference import Source, fingerprints, masked_attention
from torch import Tensor


@dataclass
class Calls:
    """The generator call in progress: first frame, kind, ordinal among the chunk's, V rows that it has made."""

    start: int = -1
    commit: bool = False
    step: int = -1
    made: list[Tensor] | None = None

    @property
    def phase(self) -> str:
        """As policies name it."""
        return "commit" if self.commit else "refine" if self.step else "first"


@contextmanager
def following(source: Source, after: Callable[[Calls, Any, Any], Any] | None = None) -> Iterator[Calls]:
    """Follow the calls; ``after(calls, arguments, output)`` may give another output."""
    calls = Calls(made=[])

    def arguments_of(module: Any, args: Any, kwargs: Any) -> Any:
        return inspect.signature(module.forward).bind(*args, **kwargs).arguments

    def before(module: Any, args: Any, kwargs: Any) -> None:
        given = arguments_of(module, args, kwargs)
        start, commit = source.start(given), source.commits(given)
        calls.step = calls.step + 1 if start == calls.start and not commit and not calls.commit else 0
        calls.start, calls.commit, calls.made = start, commit, []

    def behind(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return after(calls, arguments_of(module, args, kwargs), output) if after else None

    hooks = [source.generator.register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [source.generator.register_forward_hook(behind, with_kwargs=True)]
    hooks += [value.register_forward_hook(lambda _m, _a, rows: calls.made.append(rows)) for value in source.values]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def hiding(source: Source, dead: Callable[[Calls, int, int], Tensor | None]) -> Iterator[list[int]]:
    """-inf at ``dead(calls, context frames, own frames)``, ``[B or 1, context rows]``; yields rows hidden by kernel."""
    native, hidden = source.namespace.attention, list[int]()

    with following(source) as calls:

        def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            context = k.shape[1] - q.shape[1]
            mask = dead(calls, context // source.tokens, q.shape[1] // source.tokens) if context > 0 else None
            if mask is None or not mask.any():
                return native(q, k, v, *args, **kwargs)
            hidden.append(int(mask.sum()))
            own = torch.zeros(mask.shape[0], q.shape[1], dtype=torch.bool)
            return masked_attention(q, k, v, torch.cat([mask, own], dim=1).expand(q.shape[0], -1))

        with mock.patch.object(source.namespace, "attention", attention):
            yield hidden


@contextmanager
def weighing(source: Source, weight: float, keep: int, sink: int, anchors: bool) -> Iterator[list[int]]:
    """log w at the scores of keys older than the newest ``keep`` finished frames; yields how many, by kernel."""
    native, weighed = source.namespace.attention, list[int]()

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context = (k.shape[1] - q.shape[1]) // source.tokens
        weights = torch.ones(context)
        weights[: max(context - keep, 0)] = weight
        weights[:sink] = weight if anchors else 1.0
        if context <= 0 or bool((weights == 1).all()):
            return native(q, k, v, *args, **kwargs)
        weighed.append(int((weights < 1).sum()))
        rows = torch.cat([weights.repeat_interleave(source.tokens), torch.ones(q.shape[1])])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + rows.log()
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    with mock.patch.object(source.namespace, "attention", attention):
        yield weighed


def commit_window(frames: int, sink: int, anchors: bool, tokens: int, spared: int = 0) -> Any:
    """Dead keys of a commit that reads the newest ``frames`` only; ``spared`` frames lie behind the sink (a bank)."""

    def dead(calls: Calls, context: int, own: int) -> Tensor | None:
        if not calls.commit:
            return None
        gone = torch.zeros(context, dtype=torch.bool)
        gone[: max(context - max(frames - own, 0), 0)] = True
        gone[: sink + spared] = False
        gone[:sink] = not anchors
        return gone.repeat_interleave(tokens)[None]

    return dead


def moved(x: Tensor, dims: tuple[int, ...], goal: Tensor, strength: float) -> Tensor:
    """``x`` with mean and deviation over ``dims`` moved towards those of ``goal``, in float64."""
    x64, goal = x.double(), goal.double()
    mean, std = x64.mean(dims, keepdim=True), x64.std(dims, correction=0, keepdim=True)
    goal_mean, goal_std = goal.mean(dims, keepdim=True), goal.std(dims, correction=0, keepdim=True)
    scaled = (x64 - mean) / std * (std + strength * (goal_std - std))
    return (scaled + mean + strength * (goal_mean - mean)).to(x.dtype)


def latent_moments(strength: float, steps: int) -> Any:
    """For :func:`following`: x0 of a chunk's last step moved towards the first chunk's."""
    opening: list[Tensor] = []

    def after(calls: Calls, _arguments: Any, output: Any) -> Any:
        x0 = output if isinstance(output, Tensor) else output[-1]
        if calls.commit or calls.step != steps - 1:
            return None
        if not opening or calls.start == 0:
            opening[:] = [x0.clone()]
            return None
        x0 = moved(x0, (1, 3, 4), opening[0], strength)
        return x0 if isinstance(output, Tensor) else (*output[:-1], x0)

    return after


@contextmanager
def flowmo(source: Source, step: float, adam: bool, band: float = 0.946) -> Iterator[list[int]]:
    """FlowMo by hand: before calls of the first chunk, a deep copy of the generator and of all that it is given is run
    with gradients, and the latents move; yields the first frames of the calls that were guided.
    """
    guided: list[int] = []

    def move(module: Any, args: Any, kwargs: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        timestep = given["timestep"].flatten()[:1]
        sigmas, steps = source.generator.scheduler.sigmas, source.generator.scheduler.timesteps
        sigma = float(sigmas[(steps - timestep).abs().argmin()])
        if source.start(given) or sigma < band:
            return None
        guided.append(source.start(given))
        twin, copies = copy.deepcopy((module, dict(given)))
        twin._forward_pre_hooks.clear()
        latents = copies["noisy_image_or_video"].detach().clone().requires_grad_()
        with torch.enable_grad():
            output = twin(**{**copies, "noisy_image_or_video": latents})
            x0 = output if isinstance(output, Tensor) else output[-1]
            flow = (latents - x0) / sigma if isinstance(output, Tensor) else output[0]
            motion = (flow[:, 1:] - flow[:, :-1]).abs()
            spread = ((motion - motion.mean(1, keepdim=True)) ** 2).mean(1).mean(1)
            spread.flatten(1).max(1).values.sum().backward()
        slope = latents.grad
        latents = latents.detach() - step * (slope / (slope.abs() + 1e-8) if adam else slope)
        return (), {**given, "noisy_image_or_video": latents}

    hook = source.generator.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield guided
    finally:
        hook.remove()


def row_moments(strength: float, names: tuple[str, ...]) -> Any:
    """For :func:`following`: rows that a commit wrote, known by the bits of V, moved towards the first chunk's."""
    first: dict[Any, Tensor] = {}

    def after(calls: Calls, arguments: Any, _output: Any) -> None:
        if not calls.commit:
            return
        for layer, (cache, made) in enumerate(zip(arguments["kv_cache"], calls.made, strict=True)):
            mine = torch.isin(fingerprints(cache["v"])[0], fingerprints(made)[0]).nonzero().flatten()
            assert len(mine) == made.shape[1]
            for name in names:
                rows = cache[name][:, mine]
                goal = first.setdefault((layer, name), rows.clone())
                if calls.start:
                    cache[name][:, mine] = moved(rows, (1,), goal, strength)

    return after
