"""SGLang plugin: patches the causal Wan of every worker at its first call. Until then nothing of ours is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TARGET = "sglang.multimodal_gen.runtime.models.dits.causal_wanvideo.CausalWanTransformer3DModel.__call__"
"""Not ``forward``: hooks of a module run around that, and the first call must be seen too."""


def register() -> None:
    """Entry point of ``sglang.multimodal_gen.plugins``: hook the transformer's calls."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(TARGET, call_patched, HookType.AROUND)


def call_patched(original: Callable[..., Any], transformer: Any, *args: Any, **kwargs: Any) -> Any:
    """One call of a transformer, which carries a patch from its first call on."""
    if not getattr(transformer, "_tokentrim_seen", False):
        from tokentrim_hooks import patch_in_engine

        from .adapter import SGLang

        patch_in_engine(transformer, SGLang, "TOKENTRIM_SGLANG_POLICY")
        transformer._tokentrim_seen = True
    return original(transformer, *args, **kwargs)
