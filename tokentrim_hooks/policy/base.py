"""What a policy is: options, and hooks that answer. It sees tensors, never a model, and never synchronises."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokentrim_hooks.policy.options import flag, one_of, whole
from tokentrim_hooks.policy.views import Chunk, ContextView, Denoised, History, Noisy, Place, Rows, Verdict

HOOKS = ("guide", "judge", "hide", "correct", "settle")
"""The hooks of a policy, in the order in which a chunk meets them."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies: a frozen dataclass whose fields are its options, with hooks that do nothing by default.

    Override one or more of :meth:`guide`, :meth:`judge`, :meth:`hide`, :meth:`correct` and :meth:`settle`. Options of
    your own are fields with defaults; check them in ``__post_init__`` and call ``super().__post_init__()`` there. The
    options below say what follows a verdict, so they are every judge's; ``coarse`` holds for what :meth:`hide` names.

    Args:
        max_regenerations: R, regenerations per chunk at most; 0 prunes nothing.
        persist: the pruned context goes forward (the paper, line 19); False brings the tokens back after the chunk.
        prune_anchors: also prune sinks and anchors, which are spared by default.
        coarse: where one key of the context covers several tokens (FramePack, Helios), it dies with ``"any"`` of them
            (the pruned content is gone for sure) or only with ``"all"`` of them (less is lost beside it).

    Raises:
        TypeError: an option that the policy does not have.
        ValueError: a value out of range; the message names the range.

    Example:
        >>> @dataclass(frozen=True)
        ... class WorstToken(Policy):
        ...     '''Prunes the single worst token of a chunk that drifts further than ``limit``.'''
        ...
        ...     limit: float = 1.0
        ...
        ...     def judge(self, chunk, history):
        ...         severity, token = chunk.drift.max(dim=-1)
        ...         threshold = torch.full_like(severity, self.limit)
        ...         return Verdict(token[:, None], severity, threshold, severity > threshold)
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """What a model must have beside the hooks that are overridden: ``"commit"``, calls that only write context;
    ``"weigh"``, keys whose weight :meth:`hide` may say."""

    max_regenerations: int = 1
    persist: bool = True
    prune_anchors: bool = False
    coarse: Literal["any", "all"] = "any"

    def __post_init__(self) -> None:
        whole("max_regenerations", self.max_regenerations)
        flag("persist", self.persist)
        flag("prune_anchors", self.prune_anchors)
        one_of("coarse", self.coarse, "any", "all")

    def guide(self, chunk: Noisy) -> Tensor | None:
        """Move a chunk's noisy latents before a denoising call; asked before each of them, replays aside.

        For samplers that go on from the predicted x0 alone: one that integrates its own latents would lose the move.

        Returns:
            Latents like ``chunk.latents``, which the call is made from; None for those themselves.
        """
        return None

    def judge(self, chunk: Chunk, history: History) -> Verdict | None:
        """Judge a chunk, once per attempt, after the probe's prediction; on the model's device, without reading it.

        Args:
            chunk: the chunk in question. Not asked for a video's first chunk, which has no predecessor, nor for one
                that was handed in as clean context.
            history: severities of the chunks accepted before.

        Returns:
            The verdict; None for no opinion, and then the chunk is accepted and enters no statistics.
        """
        return None

    def hide(self, chunk: Place, context: ContextView) -> Tensor | None:
        """Say what one denoiser call may not read of the context; asked before every call, replays included.

        Args:
            chunk: where the video is; ``phase`` says what the call does.
            context: the finished frames that it could read.

        Returns:
            BoolTensor, True for what is hidden from this call: ``[frames]``, ``[frames, tokens]`` or
            ``[B, frames, tokens]``. On the CPU it costs no synchronisation. None hides nothing. A floating tensor of
            these shapes has weights instead, 1 for what is read as it is, 0 for what is hidden: the attention that a
            key gets is multiplied by its weight, and all are made to sum to 1 again. Set ``requires = {"weigh"}``.
        """
        return None

    def correct(self, chunk: Denoised) -> Tensor | None:
        """Say what the sampler goes on with, after a chunk's last denoising call.

        Not asked while nobody knows which call is the last one: for samplers that tell it by nothing but the number of
        their steps, that is a video's first chunk.

        Returns:
            x0, like ``chunk.prediction``; None for that one itself.
        """
        return None

    def settle(self, chunk: Place, rows: Rows) -> Rows | None:
        """Rewrite the rows that a commit has written; asked after it, per layer.

        Returns:
            ``rows`` with other ``values`` or ``keys`` (``dataclasses.replace``); None to leave them.
        """
        return None

    @property
    def compares(self) -> bool:
        """Whether :meth:`hide` is to be shown summaries of frames: they cost one synchronisation per chunk."""
        return False

    @property
    def remembers(self) -> int:
        """Earlier predictions of a chunk that :meth:`correct` is to be shown: latents that are kept for it."""
        return 0

    @property
    def recalls(self) -> int:
        """Accepted severities that :meth:`judge` is to be shown one by one, the latest; none by default."""
        return 0

    def redraw(self, latents: Tensor, start: int) -> Tensor | None:
        """Other noise to regenerate a chunk from: like ``latents`` ``[B, F, C, H, W]`` of the chunk at latent frame
        ``start``; None for the same noise again. For controls (see :class:`FreshNoise`).
        """
        return None

    @property
    def acting(self) -> Policy:
        """The policy that logs name: another one where this one only adds to what is recorded of it."""
        return self

    def settings(self) -> dict[str, Any]:
        """The options by name, flat: what logs and tables record."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        """The policy with the options that are not at their defaults."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def judges(self) -> bool:
        """Whether the policy overrides :meth:`judge`."""
        return self.overrides("judge")

    @property
    def regenerates(self) -> bool:
        """Whether a verdict of it may have a chunk made again."""
        return self.judges and self.max_regenerations > 0

    def overrides(self, hook: str) -> bool:
        """Whether the policy has a ``hook`` of its own."""
        return hook in hooks_of(type(self))

    @property
    def needs(self) -> frozenset[str]:
        """What it asks of a model: the hooks that it overrides, and what they need beside."""
        return self.requires | set(hooks_of(type(self)))


def labelled(policies: Sequence[Policy]) -> list[tuple[str, Policy]]:
    """Each with the name that records have of it: its class; from the second of a class on with a number behind."""
    found: list[tuple[str, Policy]] = []
    for policy in policies:
        alike = sum(type(other) is type(policy) for _, other in found)
        found.append((f"{type(policy).__name__} {alike + 1}" if alike else type(policy).__name__, policy))
    return found


def hooks_of(policy: type[Policy]) -> tuple[str, ...]:
    """The hooks that a class of policies overrides, in the order in which a chunk meets them."""
    return tuple(hook for hook in HOOKS if getattr(policy, hook) is not getattr(Policy, hook))
