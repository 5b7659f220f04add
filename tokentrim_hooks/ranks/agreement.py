"""How the ranks of a group agree: on what the first of them thinks, unless any of them has failed.

Ranks that share one model make the same calls, and each call has collectives inside. So a rank may neither replay a
call alone nor leave alone; a failure waits until all know of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from textwrap import shorten
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from tokentrim_hooks.errors import RankError
from tokentrim_hooks.ranks.channel import Channel, Post, Slot, channel_of

PATIENCE = 60.0
"""Seconds that a rank which has failed waits for the others before it says so alone: they may be stuck in the model."""
GLANCE = 0.2
"""Seconds that it looks, at the end of a call, whether the others have heard."""


class Opinion(Protocol):
    """What a rank thinks."""

    @property
    def holds(self) -> bool:
        """Whether a check of its own holds; it has to hold on every rank."""

    def marks(self) -> list[int]:
        """Numbers that are about the same on ranks that see the same tokens, with mean 0; none if there are too few."""

    def told(self) -> dict[str, Any]:
        """For the others, in terms of JSON."""

    def adopt(self, told: dict[str, Any], holds: bool) -> Any:
        """The same with the first rank's answers, and with what holds on all."""


OpinionT = TypeVar("OpinionT", bound=Opinion)


class Alone:
    """A process that shares its model with no other: it agrees with itself, at no cost.

    Attributes:
        leads: whether its opinion is what all adopt. alone: whether there are no others.
        replays: denoiser calls of replays so far.
    """

    leads = alone = True
    replays = 0

    def settle(self, turn: str, propose: Callable[[], OpinionT]) -> OpinionT:
        """What all ranks think: ``propose``'s answer, here."""
        return propose()

    def enter(self) -> None:
        """A call of the sampler begins."""

    def begun(self) -> None:
        """The model is about to run."""

    def hears(self, failure: Exception) -> bool:
        """Whether a failure is kept until all ranks have come to the end of what they do."""
        return False

    def tell(self, failure: Exception) -> bool:
        """Tell the others of a failure at a moment when they do not listen; whether it has to wait."""
        return False

    def is_due(self) -> bool:
        """Whether a failure that had to wait is to be raised at the end of this call."""
        return True


class Ranks(Alone):
    """A rank among others.

    Args:
        channel: to the others.
    """

    alone = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._patch = channel.patches
        self.leads = channel.rank == 0
        self.replays = 0
        self._call = 0
        # The call at whose end all ranks will surely have seen what is posted now.
        self._seen_at = 0
        self._due: int | None = None
        self._proposing = False
        self._heard: BaseException | None = None
        self._known: Exception | None = None

    @property
    def names(self) -> list[int]:
        """The ranks of the group, as the whole job counts them."""
        return self._channel.names

    def enter(self) -> None:
        """A call of the sampler begins. What is posted before the model runs has been seen when it has run."""
        self._call += 1
        self._seen_at = self._call

    def begun(self) -> None:
        """The model is about to run: from now on it takes one more call."""
        self._seen_at = self._call + 1

    def settle(self, turn: str, propose: Callable[[], OpinionT]) -> OpinionT:
        """Ask ``propose``, then agree with the others; all ranks call this at the same place.

        Args:
            turn: where the rollout is, in words; the same on all ranks.
            propose: this rank's opinion. While it runs, failures are kept where that keeps the ranks in step.

        Raises:
            RankError: another rank has failed, or is elsewhere. What ``propose`` has raised, or kept.
        """
        answer = self._ask(propose)
        failure = self._heard
        slot = self._slot(turn, failure, holds=answer is None or answer.holds)
        slot["marks"] = [] if answer is None else answer.marks()
        try:
            slots, told = self._exchange(slot, None if answer is None else answer.told(), failure)
            self._check(slots, failure)
        except RankError as other:
            self._known = other
            raise
        assert answer is not None
        adopted: OpinionT = answer.adopt(told, all(each["holds"] for each in slots))
        return adopted

    def _ask(self, propose: Callable[[], OpinionT]) -> OpinionT | None:
        answer = None
        self._heard, self._proposing = None, True
        try:
            answer = propose()
        except Exception as failure:
            self._heard = self._heard or failure
        except BaseException as end:
            # The user's word: it is not kept waiting.
            self._leave_word(self._slot("", end, holds=True))
            raise
        finally:
            self._proposing = False
        return None if self._heard else answer

    def _leave_word(self, slot: Slot, body: object = None) -> bool:
        """Say something that the others hear when they agree next; whether that could be said."""
        try:
            self._channel.unheard.append(self._channel.post(slot, body))
        except RuntimeError:
            return False
        return True

    def _slot(self, turn: str, failure: BaseException | None, holds: bool, late: bool = False) -> Slot:
        words = "" if failure is None else f"{type(failure).__name__}: {failure}"
        words = "".join(letter if letter.isascii() and letter.isprintable() else " " for letter in words[:300])
        seen_at = self._seen_at if late else self._call + 1
        return {"patch": self._patch, "turn": turn, "failed": words, "late": late, "due": seen_at, "holds": holds}

    def _exchange(self, slot: Slot, body: object, failure: BaseException | None) -> tuple[list[Slot], Any]:
        """Everybody's words of this turn; again where somebody's are of a patch that has come off unheard."""
        unheard = self._channel.unheard
        while unheard and unheard[0].done():
            unheard.popleft()
        while True:
            if not unheard and not self._leave_word(slot, body):
                raise RankError("the group's ranks cannot be reached any more; look at what the others have said")
            if failure is not None and not unheard[0].done(PATIENCE):
                self._raise(failure)
            slots, told = self._hear(unheard.popleft())
            if all(each["patch"] == self._patch for each in slots):
                return slots, told

    def _hear(self, post: Post) -> tuple[list[Slot], Any]:
        try:
            return self._channel.hear(post)
        except RuntimeError as failure:
            raise RankError(
                f"another rank of the group has gone, or does not answer: {shorten(str(failure), 160)}\n"
                "Look at what that rank has said."
            ) from failure

    def _check(self, slots: list[Slot], failure: BaseException | None) -> None:
        """Raise where a rank has failed, or where they are not at the same place."""
        if any(slot["late"] for slot in slots):
            self._due = max(slot["due"] for slot in slots)
        if failure is not None:
            self._raise(failure)
        for name, slot in zip(self.names, slots, strict=True):
            if slot["failed"]:
                raise RankError(f"rank {name} of the group has failed, so none goes on: {slot['failed']}")
        for (name, slot), (other, second) in itertools.pairwise(zip(self.names, slots, strict=True)):
            if slot["turn"] != second["turn"]:
                raise RankError(
                    f"ranks are out of step: rank {name} is at {slot['turn']}, rank {other} at {second['turn']}.\n"
                    "Give patch() the group of the ranks that share one video, or no group at all."
                )
        for name, slot in zip(self.names, slots, strict=True):
            if _unlike(slots[0].get("marks", []), slot.get("marks", [])):
                raise RankError(
                    f"ranks {self.names[0]} and {name} judge other tokens: each has a part of the chunk, or another "
                    "video.\nGive patch() a group that divides heads; ranks with videos of their own need none."
                )

    def _raise(self, failure: BaseException) -> None:
        if isinstance(failure, Exception):
            self._known = failure
        raise failure

    def hears(self, failure: Exception) -> bool:
        """Keep a failure until the end of ``propose``; False outside of it."""
        if self._proposing:
            self._heard = self._heard or failure
        return self._proposing

    def tell(self, failure: Exception) -> bool:
        """Tell the others; whether the failure has to wait until they know.

        Not where it was agreed on; then it waits only if a third rank has told of its own out of turn.
        """
        if failure is self._known:
            return self._due is not None
        return self._leave_word(self._slot("", failure, holds=True, late=True))

    def is_due(self) -> bool:
        """Whether all ranks leave at the end of this call; none of them earlier, or it would be missed in the next."""
        unheard = self._channel.unheard
        while self._due is None and unheard and unheard[0].done(GLANCE):
            try:
                slots, _ = self._hear(unheard.popleft())
            except RankError:
                return True  # nobody is left to be told
            if all(slot["patch"] == self._patch for slot in slots):
                self._due = max(slot["due"] for slot in slots)
        due = self._due is not None and self._call >= self._due
        if due:
            self._due = None
        return due


def _unlike(some: list[int], others: list[int]) -> bool:
    """Whether two ranks' marks have little in common: less than a half of what rounding would leave."""
    if not some or len(some) != len(others):
        return False
    common = sum(x * y for x, y in zip(some, others, strict=True))
    return 2 * common < math.hypot(*some) * math.hypot(*others)


def ranks_of(group: object) -> Alone:
    """How this process agrees with the others of ``group``; all of its ranks have to ask.

    Raises:
        TypeError: it is no process group.
    """
    if group is None:
        return Alone()
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group of torch.distributed, got {group!r}")
    return Ranks(channel_of(group)) if dist.get_world_size(group) > 1 else Alone()
