"""Set-ups of FramePack that cannot be pruned, and what is said then."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tokentrim_hooks as tokentrim

sys.path.insert(0, str(Path(__file__).parent))
import framepack_tiny as tiny


def test_refuses_a_diffusers_cache():
    from diffusers import FirstBlockCacheConfig

    twin = tiny.pipeline()
    twin.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(tokentrim.UnsupportedModelError, match="disable_cache"):
        tokentrim.patch(twin)
    twin.transformer.disable_cache()
    with tokentrim.patched(twin):
        twin.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(tokentrim.UnsupportedContextError, match="disable_cache"):
            tiny.run(twin)


def test_refuses_context_parallelism():
    twin = tiny.pipeline()
    twin.transformer.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(tokentrim.UnsupportedModelError, match="context parallelism"):
        tokentrim.patch(twin)


def test_refuses_a_transformer_without_history():
    twin = tiny.pipeline()
    twin.transformer.clean_x_embedder = None
    with pytest.raises(tokentrim.UnsupportedModelError, match="reads no history"):
        tokentrim.patch(twin)
