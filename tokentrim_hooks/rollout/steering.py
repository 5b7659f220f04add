"""What policies do beside judging: hide rows from a call, correct the sampler's x0, rewrite the rows of a commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tokentrim_hooks.adapter import Adapter, Call, Phase
from tokentrim_hooks.errors import PolicyError, UnsupportedPolicyError
from tokentrim_hooks.policy.base import Policy, labelled
from tokentrim_hooks.policy.statistics import Moments
from tokentrim_hooks.policy.views import ContextView, Denoised, Place, Rows
from tokentrim_hooks.pruning.autograd_modes import writing
from tokentrim_hooks.pruning.context import CacheRows, Context, KeyLayout, Role
from tokentrim_hooks.rollout.answers import shown, unwritten
from tokentrim_hooks.rollout.scene import Act, Scene
from tokentrim_hooks.rollout.state import ChunkState, VideoState


class Steering:
    """Asks the policies; writes nothing but what they answer.

    Args:
        adapter: of the model. policies: in order.

    Attributes:
        scene: of the call in progress, whose frames policies compare.
        weights: how much the latest call reads of each token, CPU ``[B, frames, tokens]``; None where no policy weighs.
        guides, hides, corrects, settles: whether some policy may move latents, hide rows, change x0, rewrite rows.
            active: whether some policy does more than judge.
        compares: whether some policy does; remembers: earlier predictions that some policy is to be shown.
    """

    def __init__(self, adapter: Adapter, policies: Sequence[Policy]) -> None:
        self._adapter = adapter
        named = labelled(policies)
        self._hiding = [(label, policy) for label, policy in named if policy.overrides("hide")]
        self._correcting = [(label, policy) for label, policy in named if policy.overrides("correct")]
        self.guides = any(policy.overrides("guide") for policy in policies)
        self._settling = [(label, policy) for label, policy in named if policy.overrides("settle")]
        self.hides, self.corrects, self.settles = map(bool, (self._hiding, self._correcting, self._settling))
        self.active = self.hides or self.corrects or self.settles or self.guides
        self.compares = any(policy.compares for _, policy in self._hiding)
        self.scene = Scene()
        self.weights: Tensor | None = None
        self.remembers = max((policy.remembers for _, policy in self._correcting), default=0)

    # ------------------------------------------------------------------------------------------ hide

    def hidden(self, call: Call, place: Place, context: Context) -> tuple[dict[str, Tensor], list[Act]]:
        """What ``call`` may not read, CPU BoolTensors ``[B, frames, tokens]``, and who said so.

        By :attr:`Policy.coarse` of those who said it; nothing where nothing is hidden. Sets :attr:`weights`.
        """
        self.weights = None
        view, samples = view_of(context, place.grid), int(call.latents.shape[0])
        if self.compares and view.frames:
            view = dataclasses.replace(view, summaries=self.scene.frames.of(_numbers(context, view, call.start)))
        found: dict[str, Tensor] = {}
        acts: list[Act] = []
        for label, policy in self._hiding if view.frames else []:
            answer = policy.hide(place, view)
            if answer is None:
                continue
            mask = _checked(answer, policy, view, samples)
            rows = int(mask.sum() if mask.dtype == torch.bool else (mask < 1).sum())
            if not rows:
                continue
            acts.append(Act(label, "hide", rows))
            if mask.dtype != torch.bool:
                self.weights = mask if self.weights is None else self.weights * mask
            else:
                found[policy.coarse] = mask | found[policy.coarse] if policy.coarse in found else mask
        return found, acts

    # ------------------------------------------------------------------------------------------ correct

    def corrected(self, place: Place, x0: Tensor, earlier: Sequence[Tensor], scene: Scene) -> tuple[Tensor, list[Act]]:
        """The x0 that the sampler goes on with, and who changed it; ``x0`` itself where nobody did."""
        acts: list[Act] = []
        fields = {f.name: getattr(place, f.name) for f in dataclasses.fields(Place)}
        for label, policy in self._correcting:
            chunk = Denoised(**fields, prediction=shown(x0), earlier=tuple(earlier), opening=scene.opening)
            with unwritten(policy, "correct", x0, *earlier, *([] if scene.opening is None else [scene.opening])):
                answer = policy.correct(chunk)
            if answer is None:
                continue
            if not isinstance(answer, Tensor) or answer.shape != x0.shape:
                kind = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise PolicyError(
                    f"{type(policy).__name__}.correct returned {kind} for x0 of {tuple(x0.shape)}; "
                    "return latents of the same shape, or None"
                )
            answer = answer.to(x0.dtype)
            acts.append(Act(label, "correct", norm=(answer.float() - x0.float()).norm()))
            x0 = answer
        return x0, acts

    # ------------------------------------------------------------------------------------------ settle

    def settle(self, call: Call, place: Place, context: CacheRows, scene: Scene) -> list[Act]:
        """Rewrite the rows that ``call`` has committed; remember those of the scene's first chunk."""
        first, stop = context.own_rows(call.frames)
        done: dict[str, list[Tensor]] = {}
        for layer, values in enumerate(context.values):
            keys = context.keys[layer] if context.keys else None
            first_values, first_keys = scene.moments.get((call.stream, layer), (None, None))
            anchor_values, anchor_keys = _anchors(context, values, keys)
            written = Rows(
                layer,
                values[:, first:stop],
                None if keys is None else keys[:, first:stop],
                first_values,
                first_keys,
                anchor_values,
                anchor_keys,
            )
            rows = written
            for label, policy in self._settling:
                answer = policy.settle(place, rows)
                if answer is not None:
                    before, rows = rows, _rewritten(answer, rows, policy)
                    done.setdefault(label, []).append(_told_of(before, rows))
            _write(written, rows)
            if (call.stream, layer) not in scene.moments:
                of_keys = None if written.keys is None else Moments.of(written.keys, (1,))
                scene.moments[call.stream, layer] = (Moments.of(written.values, (1,)), of_keys)
        return [Act(label, "settle", len(told) * (stop - first), told=torch.stack(told).mean(0))
                for label, told in done.items()]  # fmt: skip


def _rewritten(answer: object, rows: Rows, policy: Policy) -> Rows:
    """An answer of :meth:`Policy.settle`; a shape that only broadcasts would give one sample's rows to all."""
    if not isinstance(answer, Rows):
        raise PolicyError(f"{type(policy).__name__}.settle returned {type(answer).__name__}; return Rows, or None")
    for name in ("values", "keys"):
        old, new = getattr(rows, name), getattr(answer, name)
        if new is not None and old is not None and not (isinstance(new, Tensor) and new.shape == old.shape):
            kind = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise PolicyError(
                f"{type(policy).__name__}.settle returned {kind} as Rows.{name}; give rows of {tuple(old.shape)}"
            )
    return answer


def _told_of(before: Rows, after: Rows) -> Tensor:
    """:data:`Act.TOLD` of a layer's rows; the last is a number that is finite where all of the new ones are."""
    sides = [torch.var_mean(rows.values.float(), correction=0) for rows in (before, after)]
    keys = sides[1][1] if after.keys is None else after.keys.float().sum()
    return torch.stack([part for variance, mean in sides for part in (mean, variance.sqrt())] + [keys])


def view_of(context: Context, grid: tuple[int, int]) -> ContextView:
    """A context as a policy sees it."""
    if isinstance(context, CacheRows):
        rows = context.frame_rows
        anchors = context.start + context.anchors
        return ContextView(tuple(row < anchors for row in rows), context.rows_per_frame)
    return ContextView(tuple(anchor for _, anchor in frames_of(context)), grid[0] * grid[1])


def _numbers(context: Context, view: ContextView, start: int) -> list[int | None]:
    """Which latent frame each frame of a view is; None for the anchors of a cache, which may be any."""
    if not isinstance(context, CacheRows):
        return [frame for frame, _ in frames_of(context)]
    # The other frames of a cache are the newest finished ones, in order.
    end = start if context.end is None else context.end
    recent = iter([frame for frame, _ in context.frames] or range(end - view.anchors.count(False), end))
    return [None if anchor else next(recent) for anchor in view.anchors]


def frames_of(layout: KeyLayout) -> list[tuple[int, bool]]:
    """(latent frame, whether it is an anchor) of all finished frames of a layout: anchors, then oldest first.

    A video that is made backwards has its older frames behind the chunk: of those the nearest is the newest.
    """
    end = max((frame for s in layout.segments if s.role is Role.CURRENT for frame in s.frames), default=0)
    anchors = {frame for s in layout.segments if s.role is Role.ANCHOR for frame in s.frames}
    others = {frame for s in layout.segments if s.role is Role.CONTEXT for frame in s.frames} - anchors
    aged = sorted(others, key=lambda frame: frame if frame <= end else -frame)
    return [*((frame, True) for frame in sorted(anchors)), *((frame, False) for frame in aged)]


def _checked(answer: Tensor, policy: Policy, view: ContextView, samples: int) -> Tensor:
    """An answer of :meth:`Policy.hide` as ``[B, frames, tokens]`` on the CPU."""
    shapes = ((view.frames,), (view.frames, view.tokens), (samples, view.frames, view.tokens))
    is_kind = isinstance(answer, Tensor) and (answer.dtype == torch.bool or answer.dtype.is_floating_point)
    if not is_kind or tuple(answer.shape) not in shapes:
        kind = f"{answer.dtype} {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise PolicyError(
            f"{type(policy).__name__}.hide returned {kind} for {view.frames} frames of {view.tokens} tokens; "
            "return a BoolTensor (or weights) [frames], [frames, tokens] or [B, frames, tokens], or None"
        )
    mask = answer.cpu() if answer.dtype == torch.bool else answer.float().cpu()
    if mask.dtype != torch.bool and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise PolicyError(
            f"{type(policy).__name__}.hide returned weights outside of [0, 1]; "
            "give 1 for a token that is read as it is"
        )
    mask = mask[:, None] if mask.ndim == 1 else mask
    return mask.expand(samples, view.frames, view.tokens)


def _anchors(context: CacheRows, values: Tensor, keys: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if not context.anchors:
        return None, None
    rows = slice(context.start, context.start + context.anchors)
    return values[:, rows], None if keys is None else keys[:, rows]


def _write(old: Rows, new: Rows) -> None:
    """Write what a policy answered over the rows in the cache."""
    pairs = ((old.values, new.values), (old.keys, new.keys))
    for place, rows in pairs:
        if place is not None and rows is not None and rows is not place:
            writing(place, place.copy_, rows)


def place_of(call: Call, phase: Phase | None, video: VideoState, chunk: ChunkState) -> Place:
    """Where a video is at a call, for a policy; another branch of guidance is where the judged one is."""
    word = chunk.phase if phase is None else phase.value
    return Place(word, video.index, call.start, call.frames, chunk.grid)


def require_taken(adapter: Adapter, policy: str, phase: str, context: Context, weighs: bool) -> None:
    """Raise UnsupportedPolicyError unless the model takes it that ``policy`` hides rows from a call, or weighs them."""
    if weighs and ("weigh" not in adapter.takes or not isinstance(context, CacheRows)):
        raise UnsupportedPolicyError(
            f"{policy} weighs keys, and adapter {adapter.name!r} takes only policies that hide them: let hide() answer "
            "True and False"
        )
    if phase not in adapter.hides_from:
        raise UnsupportedPolicyError(
            f"{policy} hides rows from a {phase!r} call, which makes new rows of old ones, for good.\n"
            f"Hide from {', '.join(sorted(adapter.hides_from))} calls only."
        )
