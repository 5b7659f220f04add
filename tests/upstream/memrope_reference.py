"""What MemRoPE's memory is without dead rows, by hand, for the reference of masked attention.

Dead rows, found by their bits, hold the mean of the living ones when the unpatched model evicts. What its memory then
holds is compared with the rule written out in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comparison import difference
from masked_reference import MaskedReference, fingerprints
from tiny_self_forcing import TOKENS as FRAME
from torch import Tensor

SINK, LEAVING = 3 * FRAME, slice(5 * FRAME, 8 * FRAME)
"""Rows of the sink; rows that leave as a chunk of three frames comes into the full window."""
MEANS = {"long": slice(SINK, SINK + FRAME), "short": slice(SINK + FRAME, SINK + 2 * FRAME)}
SHARE = {"long": 0.01, "short": 0.1}


@contextmanager
def without_dead_rows(reference: MaskedReference, late: bool = True) -> Iterator[list[float]]:
    """Keep dead rows out of the memory; ``late``: what leaves as a prune's own chunk comes is not dead yet.

    Yields, for every evicting call, how far the memory is from the means of living rows that are worked out here.
    """
    generator, off, due = reference.source.generator, list[float](), list[Any]()

    def before(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        fatal = [marks for prune, marks in reference._active if not late or prune.start < reference._frame]
        for layer in given["kv_cache"]:
            full = int(layer["local_end_index"]) == layer["k"].shape[1]
            if full and given["current_start"] >= int(layer["global_end_index"]):
                due.append((layer, dict(layer), *expected_means(layer, fatal)))

    def after(*_: Any) -> None:
        for layer, _, *means in due:
            off.extend(
                difference(layer[name][:, MEANS[age]].double(), mean[age].expand(-1, FRAME, -1, -1))
                for name, mean in zip("kv", means, strict=True)
                for age in MEANS
            )
        due.clear()

    hooks = [generator.register_forward_pre_hook(before, with_kwargs=True), generator.register_forward_hook(after)]
    try:
        yield off
    finally:
        for hook in hooks:
            hook.remove()


def expected_means(layer: dict[str, Any], fatal: list[list[Tensor]]) -> list[dict[str, Tensor]]:
    """Both memories as they should become, of K and of V; dead rows that leave are overwritten by the living's mean."""
    marks, found = fingerprints(layer["v"][:, LEAVING]), []
    dead = torch.zeros_like(marks, dtype=torch.bool)
    for sample in range(len(dead)):
        for prune in fatal:
            dead[sample] |= torch.isin(marks[sample], prune[sample])
    for name in "kv":
        rows = layer[name][:, LEAVING]
        mean = torch.stack([rows[b][~dead[b]].double().mean(0, keepdim=True) for b in range(len(dead))])
        old = {age: layer[name][:, where].double() for age, where in MEANS.items()}
        begun = layer.get("ema_initialized", False)
        found.append({age: SHARE[age] * mean + (1 - SHARE[age]) * old[age] if begun else mean for age in MEANS})
        rows[dead] = mean.to(rows.dtype).expand_as(rows)[dead]
    return found
