"""The reference model over several ranks: each has some of the heads, and every layer adds up what they found.

Like any tensor-parallel model it hangs when one rank makes a call that another does not make; here it says so instead.
"""

from __future__ import annotations

import itertools

import tiny_reference as tiny
import torch
import torch.distributed as dist
from torch import nn

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
