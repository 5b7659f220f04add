"""What a model must tell: the words in which an adapter describes its model to the core.

An adapter knows the model's attribute names and call signatures and nothing of the method; the core knows the
method and no model. Shapes: ``B`` samples, ``F`` latent frames, ``C`` channels, ``H x W`` latent pixels.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import TypeVar

from tokentrim_hooks.errors import PluginError, UnsupportedPolicyError, UnsupportedProbeError
from tokentrim_hooks.inspection import shares_storage
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
    """An adapter did not recognise a model, and why, in words that help its user.

    ``near``: how much of what the adapter looks for is there, 0 nothing to 1 all but one thing. What ``patch`` raises
    shows the nearest; ``tokentrim.detect`` shows all.
    """

    reason: str
    near: float = 0.0


@dataclass(frozen=True)
class Call:
    """One denoiser call, in the model-independent words of the core.

    Attributes:
        latents: noisy latents of the newest chunk in the call, ``[B, F, C, H, W]``.
        start: absolute latent frame at which that chunk starts. Where no argument has it, count the frames of the
            chunks before, on the host: a wrapped method of the sampler shows where a chunk and a video begin.
        stream: the context that the call reads: a tensor of its cache, an object, or a number. Branches of
            classifier-free guidance that keep their own cache have different streams; the first one seen in a video is
            judged.
        timestep: noise level of ``latents`` in the model's units, any shape, 0 = clean. Read on the device only.
        commits: True or False where call arguments tell whether this call writes clean context, None where only
            ``timestep`` could tell. So it is None for a prefill (a given image or video that is written into the
            cache like any chunk): at timestep 0 it counts as given, not as judged.
        arguments: the denoiser's arguments by name, for the adapter's own use.
    """

    latents: Tensor
    start: int
    stream: Hashable | Tensor = 0
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


CallT = TypeVar("CallT", bound=Call, default=Call)
"""The kind of :class:`Call` that an adapter's ``parse`` returns and its other methods are given."""


class Adapter(ABC, Generic[CallT]):
    """Describes one family of models. Subclass, return the class from ``tokentrim_adapters``, prove it with the kit.

    One instance belongs to one patched model, so an adapter may keep what it learns from calls in attributes. What it
    reads from a call it may carry in a subclass of :class:`Call` of its own: ``class Mine(Adapter[MyCall])``.
    """

    name: ClassVar[str]
    """Unique name, as in ``tokentrim.patch(model, adapter="...")``."""
    models: ClassVar[tuple[str, ...]] = ()
    """Models that the adapter is written for, for the table of supported models."""
    context_kind: ClassVar[str] = ""
    """In a few words, where the model keeps its context, for the same table."""
    constructors: ClassVar[tuple[str, ...]] = ()
    """Classes (``"module:Class"``) whose new objects ``tokentrim run`` shows to the adapters."""

    instead_of: ClassVar[tuple[str, ...]] = ()
    """Names of built-in adapters that leave a model to this one where both recognise it, as a fork's base does. One
    whose class this one derives from need not be named."""

    takes: ClassVar[frozenset[str]] = frozenset({"judge", "hide"})
    """Which hooks of policies the model takes, and ``"commit"`` where it writes finished chunks in calls of their own.
    ``"correct"``: the sampler goes on with the x0 that it is handed, and with nothing else. ``"settle"``: the rows that
    a commit has written may be rewritten, and :attr:`CacheRows.keys` has K beside V. ``"guide"``: as for ``"correct"``,
    and a call can run with gradients on a scratch cache (:meth:`scratch`, :meth:`noise_level`). ``"weigh"``: attention
    reads the cache layer by layer, row for row, so that a row may have a weight. Declare what is proved."""
    hides_from: ClassVar[frozenset[str]] = frozenset({"first", "refine", "commit", "recache"})
    """Phases of calls from which rows may be hidden. Not of those that make new rows *of* hidden ones (a blended sink,
    a memory): a policy that hides from them gets an UnsupportedPolicyError."""
    keeps_memory: ClassVar[bool] = False
    """Whether attention sees more than the rows of a KV cache and the chunk's own: a bank of copies, running means of
    what has left the window, a sink that rows are blended into. True says that the adapter spares that memory, or keeps
    pruned rows out of it; else an UnsupportedContextError says so at a prune, or when such a memory appears."""

    @classmethod
    @abstractmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Recognise ``model`` by structure (attributes, signatures), never by a class or module name alone.

        Asked of everything that anybody wants to patch, pipeline, denoiser or anything else: it changes nothing and
        reads no tensor. What it raises counts as a refusal with that reason.
        """

    @abstractmethod
    def attach(self, model: Any, patches: Patches) -> None:
        """Name the places to watch in what ``probe`` recognised: ``patches.tap`` functions, ``patches.wrap`` methods.

        What goes through ``patches``, the undo stack, needs no code to come off again.

        Raises:
            UnsupportedContextError: attention cannot be tapped as the model is set up; all is undone again.
        """

    def group(self, model: Any) -> ProcessGroup | None:
        """Say which ranks make one video together (tensor or sequence parallel); asked once, after :meth:`attach`.

        Each makes the same calls, keeps the same rows of the context (perhaps some heads only) and predicts the whole
        chunk. They agree on verdicts and failures; None (default): each makes a video of its own (data parallel).
        """
        return None

    @abstractmethod
    def parse(self, arguments: Mapping[str, Any]) -> CallT | None:
        """Translate one denoiser call, just before it is made.

        Asked per call of the sampler, in order, not for a replay; of the same arguments it must answer the same, but
        for a number in ``stream``, which may count the calls of a step where nothing else tells guidance's branches.

        Args:
            arguments: the denoiser's arguments by name, defaults included; for a :class:`Method` also ``self``.

        Returns:
            The call, or None for calls that are not a rollout's (training, scoring, another pipeline's).

        Raises:
            UnsupportedContextError: the context of this call cannot be pruned exactly; the message says what to do.
        """

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Say what tells the video of a call from others that are made at the same time; asked before :meth:`parse`.

        Calls with the same identity are one session: its videos come one after the other, and it has a copy of the
        adapter of its own, taken when it had attached. So keep what is learnt from calls in attributes that are set
        anew, not in lists or dicts made in ``attach``.

        Returns:
            A tensor of the KV cache (told apart by its memory, whatever list or dict it comes in), an object that
            lives as long as the video, :func:`strand` (the thread or task), or numbers. Default: nothing. Then all
            calls are one session, and a second thread that calls amid a call of the first gets a SessionError.
        """
        return ()

    @abstractmethod
    def context(self, call: CallT) -> Context:
        """Say where the context of ``call`` lies *now*: the rows or keys of everything before the chunk.

        Asked before the call (what may the kernel see?), after it (where did the rows go?) and when pruning, which
        comes after the chunk's first call. The answer leaves out the chunk's own rows whether the call has written
        them yet or not, and is about the cache as it is when asked: rows may have rolled during the call.

        Returns:
            :class:`CacheRows` for a KV cache, :class:`KeyLayout` for keys in the sequence; one model, one kind.

        Raises:
            UnsupportedContextError: as for :meth:`parse`.
        """

    def phase(self, call: CallT, seen: Seen) -> Phase:
        """Say what the call does. The default fits samplers that denoise, then commit the chunk they returned."""
        return default_phase(call, seen)

    def restarts(self, call: CallT, seen: Seen) -> bool:
        """Whether ``call`` (of phase FIRST) begins a new video. Default: it starts before the latest chunk."""
        return seen.start is not None and call.start <= seen.start

    def steps(self, call: CallT) -> int | None:
        """How many denoising calls the chunk takes that ``call`` (of phase FIRST) begins, where the sampler says so.

        Default: None, as many as the chunk before. Needed where chunks differ, for policies that correct the last one.
        """
        return None

    def changes_prompt(self, call: CallT) -> bool:
        """Whether ``call`` (of phase FIRST) begins a new scene or prompt: statistics start anew, marks stay.

        For models that switch without rebuilding their context; a call that rebuilds it is a RECACHE. Default: never.
        """
        return False

    def prediction(self, call: CallT, output: Any) -> Tensor:
        """Return the predicted clean latents x0 of the newest chunk, ``[B, F, C, H, W]``, from the call's output.

        Default: the output, or its last item. A model that predicts noise or velocity is converted here.
        """
        if isinstance(output, Tensor):
            return output
        try:
            last: Tensor = output[-1]
        except (KeyError, TypeError, IndexError):
            raise self._no_x0(output, "prediction") from None
        return last

    def with_prediction(self, call: CallT, output: Any, x0: Tensor) -> Any:
        """Return ``output`` as it were had the model predicted ``x0``, for policies that correct it.

        Also for ``probe="candidate"``: the last call of a replay is made from latents that were carried over, but the
        sampler combines its output with its own, ``call.latents``.

        Default: ``x0`` in the place where :meth:`prediction` finds it by default. A model that predicts noise or
        velocity is converted back here.

        Args:
            call: the call. output: what the denoiser returned; left as it is.
            x0: ``[B, F, C, H, W]``, in the type of the prediction.
        """
        if isinstance(output, Tensor):
            return x0
        if not isinstance(output, (list, tuple)):
            raise self._no_x0(output, "with_prediction")
        return type(output)([*output[:-1], x0]) if isinstance(output, list) else (*output[:-1], x0)

    def _no_x0(self, output: Any, method: str) -> PluginError:
        return PluginError(
            f"adapter {self.name!r}: the denoiser returns a {type(output).__name__}, in which the default of "
            f"{method}() does not find x0.\nWrite {method}(), which says where it is."
        )

    def scratch(self, call: CallT) -> Mapping[str, Any]:
        """Return stand-ins for what ``call`` would write, by name of the argument: copies, for a call with gradients.

        The call is made on them, to look ahead, and they are dropped: caches of K and V, their counters, what cross
        attention keeps of the text. Copy what the call reads or writes; a model that writes nothing answers ``{}``.

        Raises:
            UnsupportedPolicyError: a call cannot be made on copies. The default always raises it.
        """
        raise UnsupportedPolicyError(f"adapter {self.name!r} cannot run a call on a scratch cache: leave out guide()")

    def noise_level(self, call: CallT) -> Tensor:
        """Return the noise level of ``call.latents``, 0 clean to 1 pure noise, any shape; for policies that guide."""
        raise UnsupportedPolicyError(f"adapter {self.name!r} does not say how noisy latents are: leave out guide()")

    def in_flight(self, call: CallT, output: Any) -> Tensor | None:
        """Return the previous chunk's x0 from the same output, where that chunk is still being denoised."""
        return None

    def accepted(self, call: CallT) -> Tensor | None:
        """Return the previous chunk as it was accepted, where a FIRST call can tell; else the latest seen is used."""
        return None

    def replay(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the denoiser again. Override where a call is not idempotent (counters, memory banks)."""
        return denoiser(*args, **kwargs)

    def carry(self, call: CallT, before: Tensor, after: Tensor) -> Tensor:
        """Return ``call.latents`` as they were had the previous step predicted ``after`` instead of ``before``.

        Needed for ``probe="candidate"`` only: the same noise is kept, so no random number is drawn.

        Args:
            call: the step whose input is to be made anew, as the sampler made it.
            before, after: x0 that the step before it predicted, and predicts on the pruned context.

        Returns:
            Noisy latents, ``[B, F, C, H, W]``, in the type of ``call.latents``.

        Raises:
            UnsupportedProbeError: this sampler's step cannot be made anew. The default always raises it.
        """
        raise UnsupportedProbeError(
            f"adapter {self.name!r} cannot replay a whole chunk of this sampler; use probe='first-step'"
        )

    def carry_step(self, call: CallT, earlier: CallT, moved: CallT, before: Tensor, after: Tensor) -> Tensor:
        """As :meth:`carry`, where a step keeps a part of its own input, as an ODE solver's does.

        ``earlier`` is the step before as the sampler made it, ``moved`` the same as the replay made it.
        """
        return self.carry(call, before, after)

    def with_latents(
        self, call: CallT, args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``args`` and ``kwargs`` of ``call`` with ``latents``, of the same shape and type, for its own.

        Override where ``call.latents`` is a part or a view of an argument.

        Raises:
            UnsupportedProbeError: none of the arguments is ``call.latents`` itself.
        """
        if not any(argument is call.latents for argument in (*args, *kwargs.values())):
            raise UnsupportedProbeError(
                f"adapter {self.name!r} cannot put other latents into this call, where they are a part of an argument: "
                "use probe='first-step', and no policy with redraw()"
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
