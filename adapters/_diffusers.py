"""What adapters of diffusers models share: where attention is dispatched, and set-ups that cannot be pruned."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks import Patches


def home_of(attention: Any) -> Any:
    """The module whose global ``dispatch_attention_fn`` the attention's processor calls, or None.

    It is the processor's module, which need not be the transformer's: models borrow each other's blocks.
    """
    home = sys.modules.get(type(getattr(attention, "processor", None)).__module__)
    return home if callable(getattr(home, "dispatch_attention_fn", None)) else None


def lacking(transformer: Any, parameters: Sequence[str]) -> str:
    """Why a transformer is none of ours: its forward lacks parameters. Empty if it has them all."""
    known = inspect.signature(transformer.forward).parameters
    missing = [name for name in parameters if name not in known]
    if not missing:
        return ""
    if "pose_hidden_states" in known and "face_pixel_values" in known:
        return "earlier frames are joined to new ones channel by channel, so there is no context token to remove"
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    if any("linear" in type(processor).__name__.lower() for processor in processors):
        return "linear attention sums all tokens into one state, from which none can be removed"
    return f"the transformer's forward lacks {', '.join(missing)}"


def tap_dispatch(patches: Patches, attentions: Sequence[nn.Module]) -> None:
    """Tap the dispatcher of these self attentions; cross attention calls it as well, hence ``within``."""
    homes: dict[int, list[nn.Module]] = {}
    for attention in attentions:
        homes.setdefault(id(home_of(attention)), []).append(attention)
    for group in homes.values():
        patches.tap(
            home_of(group[0]),
            "dispatch_attention_fn",
            q="query",
            k="key",
            v="value",
            mask="attn_mask",
            refuse=("parallel_config",),
            within=group,
        )


def trouble(transformer: Any, attentions: Sequence[Any]) -> str:
    """Why this transformer cannot be pruned as it is set up now; empty if it can. Reads no tensor."""
    registries = [getattr(module, "_diffusers_hook", None) for module in transformer.modules()]
    hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    if getattr(transformer, "is_cache_enabled", False) or any(getattr(h, "_is_stateful", False) for h in hooks):
        return "a diffusers cache is enabled, which counts calls and keeps outputs: call transformer.disable_cache()"
    owners = [transformer, *(getattr(attention, "processor", None) for attention in attentions)]
    if any(getattr(owner, "_parallel_config", None) is not None for owner in owners):
        return "context parallelism is on, so that each device holds other keys: run without enable_parallelism()"
    return ""


def sigma_of(scheduler: Any, step: int, timestep: Tensor) -> Tensor:
    """Noise level of a flow-matching step: the scheduler's own, or from the timestep where there is no scheduler.

    Timesteps may have been truncated to whole numbers, so the scheduler's table is preferred. Read on the device.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and step < len(sigmas):
        return sigmas[step] if torch.is_tensor(sigmas) else torch.as_tensor(sigmas[step])
    return timestep.float().flatten()[0] / 1000


def sample_of(output: Any) -> Tensor:
    """The tensor in a transformer's output, with or without ``return_dict``."""
    sample: Tensor = output["sample"] if isinstance(output, Mapping) else output[0]
    return sample
