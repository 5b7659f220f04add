"""What adapters of diffusers models share: where attention is dispatched, and set-ups that cannot be pruned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokentrim_hooks import (
    Match,
    NoMatch,
    Patches,
    TokenTrimWarning,
    UnsupportedContextError,
    bind,
    home_of,
    is_driven_by,
    lacks,
    parameters_of,
    strand,
)

DISPATCHER = "dispatch_attention_fn"
PINNED = 2**40
"""Frame number of a pinned frame (the first one, or one of negative time index), apart from all frames that age."""


def dispatcher_of(attention: Any) -> Any:
    """The module whose global ``dispatch_attention_fn`` the attention's processor calls, or None.

    It is the processor's module, which need not be the transformer's: models borrow each other's blocks.
    """
    return home_of(getattr(attention, "processor", None), DISPATCHER)


def lacking(transformer: Any, parameters: Sequence[str]) -> str:
    """Why a transformer is none of ours: its forward lacks parameters. Empty if it has them all."""
    reason = lacks(transformer, parameters, "the transformer's forward")
    if not reason:
        return ""
    if {"pose_hidden_states", "face_pixel_values"} <= set(parameters_of(transformer)):
        return "earlier frames are joined to new ones channel by channel, so there is no context token to remove"
    if {"video_indices", "audio_indices", "token_tags"} <= set(parameters_of(transformer)):
        # MiniMax-H3: a keyframe comes back as pixels, is encoded and noised anew, and all else is made for one request.
        return "no call tells whether its clip continues the one before or begins another video from a picture"
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    if any("linear" in type(processor).__name__.lower() for processor in processors):
        return "linear attention sums all tokens into one state, from which none can be removed"
    return reason


def share_of(transformer: Any, names: Sequence[str]) -> float:
    """How many of ``names`` the forward takes, 0 to 1: how near a model is that lacks some of them."""
    taken = parameters_of(transformer)
    return sum(name in taken for name in names) / len(names)


def recognised(
    transformer: nn.Module,
    attentions: Sequence[nn.Module],
    patch_size: Sequence[int],
    home: Callable[[Any], Any] = dispatcher_of,
) -> Match | NoMatch:
    """The end of every probe: self attention can be tapped, a token lies in one frame, nothing stands in the way.

    ``patch_size`` is (frames, height, width) of a token; ``home`` finds the module whose attention function is tapped.
    """
    if not attentions:
        return NoMatch("the transformer's blocks have no self attention where this model has it", near=0.9)
    if not all(map(home, attentions)):
        return NoMatch("an attention processor's module lacks the attention function to tap", near=0.9)
    if patch_size[0] != 1:
        return NoMatch("a token spans several frames", near=0.9)
    reason = trouble(transformer, attentions)
    return NoMatch(reason, near=1.0) if reason else Match(transformer, (int(patch_size[1]), int(patch_size[2])))


def tap_dispatch(patches: Patches, attentions: Sequence[nn.Module]) -> None:
    """Tap the dispatcher of these self attentions; cross attention calls it as well, hence ``within``."""
    names: dict[str, Any] = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask"}
    for home in dict.fromkeys(map(dispatcher_of, attentions)):
        group = [attention for attention in attentions if dispatcher_of(attention) is home]
        patches.tap(home, DISPATCHER, refuse=("parallel_config",), within=group, **names)


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


@dataclass
class Heard:
    """What a pipeline was heard to call, in one thread or task; ``failure`` is what could not be understood."""

    failure: Exception | None = None


HeardT = TypeVar("HeardT", bound=Heard)
ELSEWHERE = (
    "the transformer is called in another thread than the one that prepared the video: it is not pruned.\n"
    "Wait for that thread in a method of the pipeline (Future.result, Thread.join, await), or use one thread."
)


class Overheard(Generic[HeardT]):
    """Listens to what a pipeline calls beside the transformer.

    A failure to understand it is kept for the next transformer call, where ``on_error`` decides what becomes of it.
    A second thread on the same pipeline is refused at its first transformer call, and has called other things before:
    so each has what it was heard to call, and the first one's video does not begin anew by it.

    Args:
        pipeline: whose calls count. Its copies have its methods, and all pipelines of a module share its functions.
        nothing: makes what is known before anything is heard.
    """

    def __init__(self, pipeline: Any, nothing: Callable[[], HeardT]) -> None:
        self._pipeline, self._nothing = pipeline, nothing
        self._known: WeakKeyDictionary[object, HeardT] = WeakKeyDictionary()
        self._told = False

    @property
    def here(self) -> HeardT:
        """What was heard in the thread or task that makes the video: the running one, or one that waits for it."""
        here = strand(self._pipeline)
        if here not in self._known and self._known and not self._told:
            self._told = True
            warnings.warn(ELSEWHERE, TokenTrimWarning, stacklevel=2)
        return self._at(here)

    def _at(self, strand: object) -> HeardT:
        if strand not in self._known:
            self._known[strand] = self._nothing()
        return self._known[strand]

    def listen(
        self, patches: Patches, owner: Any, name: str, learn: Callable[[HeardT, Mapping[str, Any], Any], None]
    ) -> None:
        """Have ``learn(here, arguments, result)`` told of the pipeline's calls of a method or function."""

        def heard(wrapped: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = wrapped(*args, **kwargs)
            if not is_driven_by(self._pipeline, self._pipeline.transformer):
                return result
            here = self._at(strand(self._pipeline))
            try:
                learn(here, bind(wrapped, args, kwargs), result)
            except Exception as failure:
                here.failure = here.failure or failure
            return result

        patches.wrap(owner, name, heard)

    def require(self, subject: str) -> None:
        """Raise UnsupportedContextError if something was not understood."""
        failure = self.here.failure
        if failure is not None:
            raise UnsupportedContextError(f"cannot follow this pipeline's {subject}") from failure


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
