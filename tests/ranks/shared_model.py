"""The reference model over several ranks: each has some of the heads, and every layer adds up what they found.

Like any tensor-parallel model it hangs when one rank makes a call that another does not make; here it says so instead.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import tiny_reference as tiny
import torch
import torch.distributed as dist
from torch import nn

from tokentrim_hooks.reference import model

dot_product = model.attention
HEADS = 4


class OutOfStep(Exception):
    """The ranks are not in the same call of the model."""


def whole(**settings):
    """The model in one process."""
    return tiny.make(**{"heads": HEADS, "dim": 32, **settings})


def divided(**settings):
    """This rank's part of it: the same weights, divided by heads; K and V of the other heads are elsewhere."""
    pipeline = whole(**settings)
    model = pipeline.generator.model
    for block in model.blocks:
        _divide(block.self_attn)
    model.num_heads //= dist.get_world_size()
    keep_in_step(model)
    return pipeline


def keep_in_step(module):
    """Every call has a collective, which tells whether all ranks are in the same call."""
    numbers = itertools.count()
    module.register_forward_pre_hook(lambda *_: _check_step(next(numbers)))


def _divide(layer):
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * layer.dim // size, (rank + 1) * layer.dim // size)
    for projection in (layer.q, layer.k, layer.v):
        projection.weight = nn.Parameter(projection.weight[mine].clone(), requires_grad=False)
        projection.bias = nn.Parameter(projection.bias[mine].clone(), requires_grad=False)
    layer.o.weight = nn.Parameter(layer.o.weight[:, mine].clone(), requires_grad=False)
    layer.o.bias = nn.Parameter(layer.o.bias / size, requires_grad=False)
    layer.num_heads //= size
    layer.register_forward_hook(_summed)


def _summed(_layer, _args, output):
    output = output.clone()
    dist.all_reduce(output)
    return output


def _check_step(number):
    most = torch.tensor([number, -number])
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if most[0] != -most[1]:
        raise OutOfStep(f"this rank is in call {number}, others in {-int(most[1])} to {int(most[0])}")


# ------------------------------------------------------------------------------------------ tokens over ranks


def ring(q, k, v):
    """Attention of this rank's queries over the keys of all ranks, each of which keeps those of its own tokens."""
    gathered = []
    for mine in (k, v):
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine.contiguous())
        gathered.append(torch.cat(parts, dim=1))
    return dot_product(q, *gathered)


@contextmanager
def tokens_over_ranks():
    """Self attention of all reference models in this process goes over ranks."""
    native, model.attention = model.attention, ring
    try:
        yield
    finally:
        model.attention = native


def by_tokens(**settings):
    """The model with every frame's tokens divided: latents and prediction are whole, what lies between is a part."""
    pipeline = whole(**settings)
    net, size = pipeline.generator.model, dist.get_world_size()
    embed, unembed, arguments = net._embed, net._unembed, net._attention_arguments

    def part(tokens, dim=1):
        frames = tokens.unflatten(dim, (-1, net.grid[0] * net.grid[1]))
        return frames.chunk(size, dim + 1)[dist.get_rank()].flatten(dim, dim + 1)

    def joined(hidden, time, x, t):
        parts = [torch.empty_like(hidden) for _ in range(size)]
        dist.all_gather(parts, hidden.contiguous())
        frames = [each.unflatten(1, (time.shape[1], -1)) for each in parts]
        return unembed(torch.cat(frames, dim=2).flatten(1, 2), time, x, t)

    def placed(frame_index, current_start, copies):
        given = arguments(frame_index, current_start, copies)
        table = tuple(part(each, 0) for each in given["table"])
        return {**given, "table": table, "current_start": current_start // size}

    net._embed, net._unembed = lambda x, t: part(embed(x, t)), joined
    net._attention_arguments = placed
    for block in net.blocks:
        block.self_attn.max_attention_size //= size
    keep_in_step(net)
    return pipeline


def by_picture(**settings):
    """The model on this rank's part of the picture: latents, cache and prediction are the part's."""
    pipeline = whole(**{"grid": (4, 4), **settings})
    keep_in_step(pipeline.generator.model)
    return pipeline
