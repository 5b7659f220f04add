"""What a model must tell: the words in which an adapter describes its model to the core.

An adapter knows the model's attribute names and call signatures and nothing of the method; the core knows the
method and no model. Shapes: ``B`` samples, ``F`` latent frames, ``C`` channels, ``H x W`` latent pixels.
"""

from __future__ import annotations

import enum
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from tokentrim_hooks.errors import UnsupportedProbeError
from tokentrim_hooks.patching.patches import Method, Patches
from tokentrim_hooks.pruning.context import Context


class Phase(enum.Enum):
    """What a denoiser call does for the chunk that it works on."""

    FIRST = "first"
    """First denoising iteration of a new chunk; nothing of the chunk has been recorded yet."""
    REFINE = "refine"
    """A later denoising iteration of the same chunk."""
    COMMIT = "commit"
    """Writes the finished chunk into the context (a clean-context call)."""
    RECACHE = "recache"
    """Rebuilds the context of earlier chunks, for example after a prompt switch."""


@dataclass(frozen=True)
class Match:
    """An adapter recognised a model.

    ``denoiser`` is the module whose calls are watched (or a :class:`Method`, where calls bypass ``__call__``);
    ``patch_size`` the (height, width) in latent pixels that one spatial token covers; ``note`` an optional remark shown
    by ``tokentrim detect``; ``also`` further denoisers of the same rollout (a low-noise expert), each with a context
    of its own: give their calls a :attr:`Call.stream` of their own.
    """

    denoiser: nn.Module | Method
    patch_size: tuple[int, int]
    note: str = ""
    also: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class NoMatch:
    """An adapter did not recognise a model, and why, in words that help its user."""

    reason: str


@dataclass(frozen=True)
class Call:
    """One denoiser call, in the model-independent words of the core.

    Attributes:
        latents: noisy latents of the newest chunk in the call, ``[B, F, C, H, W]``.
        start: absolute latent frame at which that chunk starts.
        stream: key of the context that the call reads. Branches of classifier-free guidance that keep their own
            cache have different streams; the first stream seen in a video is the one that is judged.
        timestep: noise level of ``latents`` in the model's units, any shape, 0 = clean. Read on the device only.
        commits: True or False where call arguments tell whether this call writes clean context, None where only
            ``timestep`` could tell.
        arguments: the denoiser's arguments by name, for the adapter's own use.
    """

    latents: Tensor
    start: int
    stream: Hashable = 0
    timestep: Tensor | None = None
    commits: bool | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Number of latent frames of the chunk."""
        return int(self.latents.shape[1])

    @property
    def end(self) -> int:
        """Absolute latent frame behind the chunk's last one."""
        return self.start + self.frames


@dataclass(frozen=True)
class Seen:
    """What the rollout has seen before a call; given to :meth:`Adapter.phase`.

    ``start`` and ``end`` are the latest chunk's frames (None before the first call), ``steps`` the denoising calls
    of that chunk so far, ``usual_steps`` those of an earlier complete chunk (0 if none), ``committed`` whether a
    commit call was seen for it, ``returned`` the latest prediction handed to the sampler.
    """

    start: int | None = None
    end: int = 0
    steps: int = 0
    usual_steps: int = 0
    committed: bool = False
    returned: Tensor | None = None


class Adapter(ABC):
    """Describes one family of models. Subclass, return the class from ``tokentrim_adapters``, prove it with the kit.

    One instance belongs to one patched model, so an adapter may keep what it learns from calls in attributes.
    """

    name: ClassVar[str]
    """Unique name, as in ``tokentrim.patch(model, adapter="...")``."""
    models: ClassVar[tuple[str, ...]] = ()
    """Models that the adapter is written for, for the table of supported models."""
    context_kind: ClassVar[str] = ""
    """In a few words, where the model keeps its context, for the same table."""
    constructors: ClassVar[tuple[str, ...]] = ()
    """Classes (``"module:Class"``) whose new objects ``tokentrim run`` shows to the adapters."""

    @classmethod
    @abstractmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise ``model`` by structure (attributes, signatures), never by a class or module name alone."""

    @abstractmethod
    def attach(self, model: Any, patches: Patches) -> None:
        """Name the places to watch: ``patches.tap`` attention functions, ``patches.wrap`` methods."""

    @abstractmethod
    def parse(self, arguments: Mapping[str, Any]) -> Call | None:
        """Translate one denoiser call, given its arguments by name; None for calls that are not a rollout's."""

    @abstractmethod
    def context(self, call: Call) -> Context:
        """Say where the context of ``call`` lies; asked before and after the call, and when pruning."""

    def phase(self, call: Call, seen: Seen) -> Phase:
        """Say what the call does. The default fits samplers that denoise, then commit the chunk they returned."""
        return default_phase(call, seen)

    def restarts(self, call: Call, seen: Seen) -> bool:
        """Whether ``call`` (of phase FIRST) begins a new video. Default: it starts before the latest chunk."""
        return seen.start is not None and call.start <= seen.start

    def changes_prompt(self, call: Call) -> bool:
        """Whether ``call`` (of phase FIRST) begins a new scene or prompt: statistics start anew, marks stay.

        For models that tell in no call of their own (that would be a RECACHE). Default: never.
        """
        return False

    def prediction(self, call: Call, output: Any) -> Tensor:
        """Return the predicted clean latents x0 of the newest chunk, ``[B, F, C, H, W]``, from the call's output."""
        return output if isinstance(output, Tensor) else output[-1]

    def reference(self, call: Call, output: Any) -> Tensor | None:
        """Return the previous chunk's x0 from the same output, where that chunk is still being denoised."""
        return None

    def accepted(self, call: Call) -> Tensor | None:
        """Return the previous chunk as it was accepted, where a FIRST call can tell; else the latest seen is used."""
        return None

    def replay(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the denoiser again. Override where a call is not idempotent (counters, memory banks)."""
        return denoiser(*args, **kwargs)

    def carry(self, call: Call, before: Tensor, after: Tensor) -> Tensor:
        """Return ``call.latents`` as they were had the previous step predicted ``after`` instead of ``before``.

        Needed for ``probe="candidate"`` only: the same noise is kept. Raises UnsupportedProbeError by default.
        """
        raise UnsupportedProbeError(
            f"adapter {self.name!r} cannot replay a whole chunk of this sampler; use probe='first-step'"
        )

    def with_latents(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call's arguments with ``latents`` in the place of ``call.latents``.

        Override where these are a part or a view of an argument. Raises UnsupportedProbeError if no argument is they.
        """
        if not any(argument is call.latents for argument in (*args, *kwargs.values())):
            raise UnsupportedProbeError(
                f"adapter {self.name!r} cannot put other latents into this call, where they are a part of an argument: "
                "neither probe='candidate' nor a policy with redraw() works with it"
            )
        swap = {id(call.latents): latents}
        return tuple(swap.get(id(a), a) for a in args), {k: swap.get(id(a), a) for k, a in kwargs.items()}


def default_phase(call: Call, seen: Seen) -> Phase:
    """Tell phases apart without reading the device: by frames, by tensor identity, by the usual number of steps."""
    if seen.start is None:
        return Phase.FIRST
    if call.commits and call.start <= seen.start:
        return Phase.COMMIT
    if call.start != seen.start:
        return Phase.FIRST
    if shares_storage(call.latents, seen.returned):
        return Phase.COMMIT
    if seen.committed:
        return Phase.FIRST
    if call.commits is None and 0 < seen.usual_steps <= seen.steps:
        return Phase.COMMIT
    return Phase.REFINE


def shares_storage(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors look at the same memory (a sampler hands back what it was given)."""
    if a is None or b is None or a.device != b.device or a.numel() == 0:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def bind(denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``denoiser(*args, **kwargs)`` by name, defaults included; of a method also ``self``."""
    function = denoiser.forward if isinstance(denoiser, nn.Module) else denoiser
    bound = _signature_of(function).bind(*args, **kwargs)
    bound.apply_defaults()
    owner = {"self": denoiser.__self__} if inspect.ismethod(denoiser) else {}
    return {**owner, **bound.arguments}


_signatures: weakref.WeakKeyDictionary[Any, inspect.Signature] = weakref.WeakKeyDictionary()


def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature, looked up once: inspecting costs more than the rest of our work on a denoiser call."""
    # Not the bound method, which is a new object each time; nor anything that would keep the model alive.
    key = function.__func__ if inspect.ismethod(function) else function
    found = _signatures.get(key)
    if found is None:
        found = _signatures[key] = inspect.signature(function)
    return found
