"""vLLM-Omni plugin: patches LingBot-World 2 in every worker at its first call."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Entry point of ``vllm_omni.general_plugins``: watch the transformer's calls.

    Around ``__call__``, not by a ``ModelHook``, which comes in at ``forward``: a module's own hooks, such as ours, run
    between the two, and the first call must be seen as well. Asked twice it does nothing more.
    """
    from vllm_omni.diffusion.models.lingbot_world import transformer

    kind: Any = transformer.CausalLingBotWorldTransformer3DModel
    if "__call__" in vars(kind):
        return
    original = kind.__call__

    def call_patched(net: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(net, "_tokentrim_seen", False):
            from tokentrim_hooks import patch_in_engine

            from .adapter import VllmOmniLingBot

            patch_in_engine(net, VllmOmniLingBot, "TOKENTRIM_VLLM_OMNI_POLICY")
            net._tokentrim_seen = True
        return original(net, *args, **kwargs)

    kind.__call__ = call_patched
