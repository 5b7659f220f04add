"""Random weights with which attention matters to the output of a tiny diffusers transformer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def let_attention_matter(model: nn.Module, blocks: Iterable[Any]) -> None:
    """Draw all matrices, and V of self attention larger; tables of scales and shifts stay."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "scale_shift" not in name:
            parameter.normal_(std=0.2)
    for block in blocks:
        block.attn1.to_v.weight.normal_(std=0.5)
