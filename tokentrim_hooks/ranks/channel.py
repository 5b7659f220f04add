"""A word from every rank to every rank: one small all_reduce on a gloo group of our own, on the host.

Of our own, because a rank that has failed speaks out of turn: on the model's group its word would be taken for a part
of the model's next collective.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

SLOT = 1024
"""Bytes of a rank's own word."""
BODY = 32 * 1024
"""Bytes of what the first rank has to say beside it; what is longer goes in a second collective."""

Slot = dict[str, Any]


@dataclass
class Post:
    """A word on its way; ``buffer`` becomes everybody's. ``body`` is the sender's, in full."""

    work: Any
    buffer: bytearray
    body: bytes

    def done(self, patience: float = 0.0) -> bool:
        """Whether every rank has spoken, after ``patience`` seconds at most."""
        end = time.monotonic() + patience
        while not self.work.is_completed():
            if time.monotonic() >= end:
                return False
            time.sleep(0.001)
        return True


class Channel:
    """What the ranks of a group say to each other. Made once for every group: by all of its ranks, or none.

    Attributes:
        rank, size: in the group. names: ranks of the whole job, in the group's order.
        patches: patches that have used it, the same number on all ranks.
        unheard: words of this rank that nobody may have heard yet, oldest first.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.names = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(self.names)
        self.patches = 0
        self.unheard: deque[Post] = deque()
        alone = self.size == dist.get_world_size()
        self._group = dist.new_group(self.names, backend="gloo", use_local_synchronization=not alone)

    def post(self, slot: Slot, body: object = None) -> Post:
        """Say something, without waiting for the others; only the first rank's ``body`` counts."""
        said = json.dumps(body).encode() if self.rank == 0 else b""
        mine = json.dumps({**slot, "body": len(said)}).encode()
        place, end = self.rank * SLOT, self.size * SLOT
        buffer = bytearray(end + BODY)
        buffer[place : place + len(mine)] = mine
        if len(said) <= BODY:
            buffer[end : end + len(said)] = said
        # All other ranks have zeros there, so that the sum is everybody's word, bit for bit.
        words = torch.frombuffer(buffer, dtype=torch.int64)
        return Post(dist.all_reduce(words, group=self._group, async_op=True), buffer, said)

    def hear(self, post: Post) -> tuple[list[Slot], Any]:
        """Wait for what all ranks have said: their slots, and the first rank's body (None if a rank has failed)."""
        post.work.wait()
        heard = bytes(post.buffer)
        slots = [json.loads(heard[i * SLOT : (i + 1) * SLOT].rstrip(b"\0")) for i in range(self.size)]
        if any(slot["failed"] for slot in slots):
            return slots, None
        length = slots[0]["body"]
        body = heard[self.size * SLOT :][:length] if length <= BODY else self._long(post.body, length)
        return slots, json.loads(body)

    def _long(self, body: bytes, length: int) -> bytes:
        """The first rank's body where it does not fit; everybody knows that from its slot."""
        buffer = bytearray(body or bytes(length))
        dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), self.names[0], group=self._group)
        return bytes(buffer)


_channels: dict[dist.ProcessGroup, Channel] = {}


def channel_of(group: dist.ProcessGroup) -> Channel:
    """The channel of a group; the first time, all of its ranks have to ask."""
    if group not in _channels:
        _channels[group] = Channel(group)
    _channels[group].patches += 1
    return _channels[group]
