"""Kits of the example models of other kinds: per-site temporal attention, and a velocity over history in sequence."""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from tokentrim_hooks.testing import AdapterConformance

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "kinds"))
import per_site
import velocity


class Hidden(TorchFunctionMode):
    """-inf in torch's kernel where ``dead(value)`` is True, a mask over ``[batch, keys]``; None leaves a call alone."""

    def __init__(self, dead):
        super().__init__()
        self.dead = dead

    def __torch_function__(self, func, types, args=(), kwargs=None):
        mask = self.dead(args[2]) if getattr(func, "__name__", "") == "scaled_dot_product_attention" else None
        if mask is None:
            return func(*args, **(kwargs or {}))
        bias = torch.zeros(mask.shape).masked_fill(mask, -torch.inf)[:, None, None].expand(-1, 1, args[0].shape[2], -1)
        return func(*args, attn_mask=bias)


class Kind(AdapterConformance):
    """A kit whose reference knows the frame of every key by counting: history ends at the running call's frame."""

    chunks = 8
    batch = 1

    def run(self, model, seed):
        torch.manual_seed(seed)
        return model.generate(torch.randn(self.batch, 2 * self.chunks, 4, 8, 4))

    def reference(self, model, seed):
        first = 2 * self.chunk_to_prune
        at = []

        def dead(value):
            history = self.history(value) if at else 0
            gone = [at[-1] >= first and at[-1] - history + i < first for i in range(history)] if history else []
            return self.mask(value, gone) if any(gone) else None

        hook = model.net.register_forward_pre_hook(lambda _, args: at.append(args[3]))
        with Hidden(dead):
            result = self.run(model, seed)
        hook.remove()
        return result


class PerSite(Kind):
    adapter = per_site.LoomAdapter
    late_chunk = 6

    def make_model(self):
        return per_site.Loom()

    def history(self, value):
        """Cached frames: the spatial attention has frames for samples and sites for keys."""
        return 0 if len(value) % 16 or value.shape[2] == 16 else value.shape[2] - 2

    def mask(self, value, gone):
        mask = torch.zeros(len(value), value.shape[2], dtype=torch.bool)
        for site in range(len(value)):
            mask[site, : len(gone)] = torch.tensor(gone) & (site % 16 in self.tokens)
        return mask


class Velocity(Kind):
    adapter = velocity.StreamAdapter
    late_chunk = 6

    def make_model(self):
        return velocity.Stream()

    def history(self, value):
        return value.shape[2] // 16 - 2

    def mask(self, value, gone):
        line = [dead and token in self.tokens for dead in gone for token in range(16)] + [False] * 32
        return torch.tensor(line).expand(len(value), -1)
