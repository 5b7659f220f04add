"""Tells ranks that divide the tokens of a chunk from those that divide heads: of the former no prune is exact."""

from __future__ import annotations

import torch.distributed as dist

from tokentrim_hooks.errors import UnsupportedContextError


def require_all_queries(queries: int, own: int) -> None:
    """Raise UnsupportedContextError where self attention has only a part of the chunk's tokens for queries on a rank.

    Where heads are divided (tensor parallel, Ulysses) it has all of them. In a ring, or where K and V are gathered,
    each rank keeps the rows of its own tokens: a row is not the token that its number says.

    Args:
        queries: of the first self attention of a call. own: tokens of the chunk that the call works on.
    """
    if not 0 < queries < own or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return
    raise UnsupportedContextError(
        f"self attention has {queries} of the chunk's {own} tokens on this rank, so a row is another token on each.\n"
        "Run with heads divided over ranks (Ulysses), or on one device: divided tokens cannot be pruned."
    )
