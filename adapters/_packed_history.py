"""Models that pack earlier frames into the attention sequence, coarser the older they are (FramePack, Helios).

Keys lie as ``[oldest ... newest history | the chunk | text]``. A history part of scale s joins s frames and s x s
spatial tokens in one key. A pinned first frame may precede the finest part. Nothing is cached: history is embedded
anew at every step, so a dead token stays dead only by being kept from the kernel at every call.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat, nn

from tokentrim_hooks import (
    Adapter,
    Call,
    KeyLayout,
    Patches,
    Phase,
    Role,
    Seen,
    Segment,
    UnsupportedContextError,
    strand,
)

from ._diffusers import PINNED, sample_of, sigma_of, tap_dispatch, trouble


def _none() -> Any:
    """What a weak reference to something that is gone answers."""
    return None


@dataclass(frozen=True)
class Packing:
    """One call's history, as the transformer is given it.

    Attributes:
        parts: (latents ``[B, C, F, H, W]``, scale) from coarse to fine, without the pinned frames.
        pinned: number of pinned frames before the finest part.
        section, video: objects that are the same for all calls of a chunk, and of a video.
    """

    parts: tuple[tuple[Tensor, int], ...]
    pinned: int
    section: object
    video: object


class Latest:
    """The latest call of a model, whichever session it was of: are its objects handed on from call to call?"""

    def __init__(self, pipeline: object) -> None:
        self._pipeline = pipeline
        self._objects: tuple[Any, ...] = (_none, _none)
        self._strand: Any = _none
        self._timestep: Tensor | None = None
        self._calls = 0

    def follow(self, packing: Packing, timestep: Tensor) -> None:
        """A call is made. Its timestep is read only where the chunk before had a single call.

        Raises:
            UnsupportedContextError: it goes on with a chunk whose objects are gone: somebody makes them anew.
        """
        new = any(known() is not now for known, now in zip(self._objects, _told(packing), strict=True))
        alone = self._calls == 1 and self._strand() is strand(self._pipeline)
        if new and alone and any(known() is None for known in self._objects):
            before = self._timestep
            if before is not None and float(timestep.flatten()[0]) < float(before.flatten()[0]):
                raise UnsupportedContextError(
                    "each call is given other tensors for one and the same chunk, as by a wrapper that copies them.\n"
                    "Pass on the sampler's own, or copy them inside the transformer's forward."
                )
        self._calls = 1 if new else self._calls + 1
        self._objects = tuple(weakref.ref(thing) for thing in _told(packing))
        self._strand, self._timestep = weakref.ref(strand(self._pipeline)), timestep


def _told(packing: Packing) -> tuple[object, object]:
    return packing.section, packing.video


@dataclass(frozen=True, kw_only=True)
class PackedCall(Call):
    """A transformer call: chunk ``section`` of the video at denoising step ``step``; ``real`` are history's frames."""

    packing: Packing
    section: int
    step: int
    real: range


class PackedHistory(Adapter[PackedCall]):
    """Common part of the adapters for packed history; a family says how its arguments are to be read."""

    context_kind = "packed history frames in the attention sequence, coarser with age"

    transformer: Any
    inverted = False
    """Whether chunks are made from the last to the first, so that history holds what comes after."""

    # ------------------------------------------------------------------------------------------ the family's part

    @classmethod
    @abstractmethod
    def attentions(cls, transformer: Any) -> list[nn.Module]:
        """Self attentions, in order."""

    @abstractmethod
    def packing(self, arguments: Mapping[str, Any]) -> Packing | None:
        """Read the history of a call; None if it has none."""

    @abstractmethod
    def begin(self, packing: Packing, arguments: Mapping[str, Any]) -> int:
        """A new video begins: set ``inverted``; return how many frames its history holds already."""

    def starts_over(self, packing: Packing, arguments: Mapping[str, Any]) -> bool:
        """Whether a new section begins a new video although ``packing.video`` is that of the section before."""
        return False

    def others(self, call: PackedCall) -> int:
        """Keys behind the chunk's own (text)."""
        return 0

    # ------------------------------------------------------------------------------------------ the core's questions

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap self attention, and begin to follow the sampler."""
        self.transformer = getattr(model, "transformer", model)
        self.pipeline = model
        # Weak, or the last video's tensors would outlive it.
        self._video = self._chunk = self._timestep = _none
        self._section, self._step, self._branch, self._start, self._given = 0, 0, 0, 0, 0
        self._latest = Latest(model)  # one for all sessions: arguments made anew seem another video's
        self.tap(patches)

    def tap(self, patches: Patches) -> None:
        """Tap the function that self attention goes through."""
        tap_dispatch(patches, self.attentions(self.transformer))

    def parse(self, arguments: Mapping[str, Any]) -> PackedCall | None:
        """Read one call. A step's second call, with the very same timestep, is guidance's other branch."""
        packing = self.packing(arguments)
        if packing is None:
            return None
        noisy: Tensor = arguments["hidden_states"]
        self._follow(packing, arguments, frames=int(noisy.shape[2]))
        return PackedCall(
            noisy.transpose(1, 2),
            start=self._start,
            stream=self._branch,
            commits=False,
            arguments=arguments,
            packing=packing,
            section=self._section,
            step=self._step,
            real=self._real(int(noisy.shape[2])),
        )

    def _follow(self, packing: Packing, arguments: Mapping[str, Any], frames: int) -> None:
        """Which chunk, step and branch: told by the objects that the sampler passes, without reading any."""
        opens, new_section = self._video() is not packing.video, self._chunk() is not packing.section
        self._latest.follow(packing, arguments["timestep"])
        self._video, self._chunk = weakref.ref(packing.video), weakref.ref(packing.section)
        if opens or (new_section and self.starts_over(packing, arguments)):
            self._given = self.begin(packing, arguments)
            self._section, self._start = -1, -frames if self.inverted else self._given
            self._begin_section(0, packing)
        elif new_section:
            self._begin_section(-frames if self.inverted else frames, packing)
        elif arguments["timestep"] is self._timestep():
            self._branch += 1
        else:
            self._step, self._branch = self._step + 1, 0
        self._timestep = weakref.ref(arguments["timestep"])

    def _begin_section(self, shift: int, packing: Packing) -> None:
        self._section, self._step, self._branch = self._section + 1, 0, 0
        self._start += shift
        reason = trouble(self.transformer, self.attentions(self.transformer))
        if reason:
            raise UnsupportedContextError(reason)

    def _real(self, frames: int) -> range:
        """Frames that exist: made or given before this chunk. Beyond them history is blank."""
        return range(self._start + frames, 0) if self.inverted else range(0, self._start)

    def phase(self, call: PackedCall, seen: Seen) -> Phase:
        """A chunk begins at its first step. Nothing is committed: history is embedded anew at every step."""
        return Phase.FIRST if call.step == 0 else Phase.REFINE

    def restarts(self, call: PackedCall, seen: Seen) -> bool:
        """The first section begins a video, wherever the last one ended and in whichever direction it runs."""
        return call.section == 0

    def accepted(self, call: PackedCall) -> Tensor | None:
        """The chunk before, as the history has it; None where it does not reach that far."""
        if len(call.real) < call.frames:
            return None
        parts = [part for part, _ in call.packing.parts]
        history = cat(parts[::-1] if self.inverted else parts, dim=2)
        if history.shape[2] < call.frames:
            return None
        nearest = history[:, :, : call.frames] if self.inverted else history[:, :, -call.frames :]
        return nearest.transpose(1, 2).to(call.latents.device)

    def prediction(self, call: PackedCall, output: Any) -> Tensor:
        """x0 = x - sigma v."""
        scheduler = getattr(self.pipeline, "scheduler", None)  # now: users put another one in between videos
        sigma = sigma_of(scheduler, call.step, call.arguments["timestep"])
        return call.latents.float() - sigma * sample_of(output).transpose(1, 2).float()

    def context(self, call: PackedCall) -> KeyLayout:
        """Keys of self attention, history first. Blank history counts as nothing, pinned frames as anchors."""
        height, width = self._grid(call)
        segments: list[Segment] = []
        frames = self._history_frames(call)
        for (_, scale), numbers in zip(call.packing.parts, frames, strict=True):
            if scale == 1 and call.packing.pinned:
                segments.append(Segment(Role.ANCHOR, (PINNED,) * call.packing.pinned, height, width))
            segments += _aged(numbers, scale, height, width, call.real)
        segments.append(Segment(Role.CURRENT, range(call.start, call.end), height, width))
        others = self.others(call)
        return KeyLayout((*segments, Segment(Role.OTHER, (0,), others, 1)) if others else tuple(segments))

    def _grid(self, call: PackedCall) -> tuple[int, int]:
        patch_size = self.transformer.config.patch_size
        down, across = (patch_size, patch_size) if isinstance(patch_size, int) else (patch_size[1], patch_size[2])
        return call.latents.shape[-2] // down, call.latents.shape[-1] // across

    def _history_frames(self, call: PackedCall) -> list[range]:
        """Frame numbers of every part, coarse to fine: before the chunk, or behind it where the video runs back."""
        counts = [int(part.shape[2]) for part, _ in call.packing.parts]
        near = [sum(counts[i + 1 :]) for i in range(len(counts))]
        if self.inverted:
            return [range(call.end + gap, call.end + gap + count) for gap, count in zip(near, counts, strict=True)]
        return [range(call.start - gap - count, call.start - gap) for gap, count in zip(near, counts, strict=True)]


def _aged(frames: Sequence[int], scale: int, height: int, width: int, real: range) -> list[Segment]:
    """Segments of one history part: one for each group of frames that share their keys."""
    down, across = -(-height // scale), -(-width // scale)
    segments = []
    for first in range(0, len(frames), scale):
        group = frames[first : first + scale]
        alive = [frame for frame in group if frame in real]
        # A key over blank and real frames is judged by the real ones.
        shown = [min(max(frame, alive[0]), alive[-1]) for frame in group] if alive else list(group)
        role = Role.CONTEXT if alive else Role.OTHER
        segments.append(Segment(role, shown, down, across, (scale, scale, scale)))
    return segments
