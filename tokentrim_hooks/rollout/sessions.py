"""Which session a denoiser call belongs to: videos that alternate, or run in several threads, each have their own."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from tokentrim_hooks.adapter import Adapter, Call
from tokentrim_hooks.rollout.answers import identity_of, parsed
from tokentrim_hooks.rollout.names import Key, copied, gone
from tokentrim_hooks.rollout.session import Found, Session
from tokentrim_hooks.rollout.shared import Shared


class Sessions:
    """The sessions of one patched model, by what :meth:`Adapter.identity` says of their calls.

    The first session has the adapter itself, every other a copy of it as it was when it had attached: what an adapter
    learns from calls belongs to one session.
    """

    def __init__(self, adapter: Adapter, shared: Shared) -> None:
        self._adapter, self._shared = adapter, shared
        self._as_attached = copy.copy(adapter)
        self._by_key: dict[Key, Session] = {}
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[Session]:
        """Every session once."""
        return iter(list(dict.fromkeys(self._by_key.values())))

    def of(self, arguments: Mapping[str, Any]) -> Found | None:
        """The session that a call belongs to, which has taken it.

        None for calls that are no rollout's, and for those that are made inside another call of their session.

        Raises:
            SessionError: it cannot be told to which of two running videos the call belongs.
        """
        with self._lock:
            found = self._find(arguments)
            if found is not None:
                found.session.take(found)
            return found

    def _find(self, arguments: Mapping[str, Any]) -> Found | None:
        parts = identity_of(self._adapter, arguments)
        key = self._shared.names.key(parts)
        session = self._by_key.get(key)
        if session is None:
            return self._join(key, parts, arguments)
        if not session.free():
            return None
        call = parsed(session.adapter, arguments)
        if call is None:
            return None
        # The stream is mostly what tells the call apart, and has its name already.
        call = renamed(call, key[0] if parts and call.stream is parts[0] else self._shared.names.of(call.stream))
        first = session.timeline.mistook(call)
        return Found(session, call, key, arguments) if first is None else self._open(key, arguments, first)

    def follow(self, found: Found) -> None:
        """After a call: know its context again where the cache made its tensors anew."""
        self._shared.names.follow(found.key, identity_of(self._adapter, found.arguments))

    def _join(self, key: Key, parts: Sequence[Any], arguments: Mapping[str, Any]) -> Found | None:
        """A context never seen before: a branch of guidance, one that has moved in memory, or a new session's."""
        if not self._by_key:
            return self._open(key, arguments)
        call = read_call(copy.copy(self._as_attached), arguments, self._shared)
        if call is None:
            return None
        for known, session in list(self._by_key.items()):
            idle = session.idle()
            if idle and not gone(known) and session.timeline.takes(call):
                self._by_key[key] = session
                return Found(session, call, key, arguments)
            if (gone(known) or idle) and session.timeline.continues(call) and (gone(known) or copied(known, parts)):
                return self._move(known, parts, arguments)
        self._forget_the_gone()
        return self._open(key, arguments)

    def _move(self, known: Key, parts: Sequence[Any], arguments: Mapping[str, Any]) -> Found | None:
        """A session's context lies elsewhere by now (offloaded and fetched again), and its marks with it."""
        self._shared.names.move(known, parts)
        found = self._find(arguments)
        if found is not None:
            found.session.pruner.follow(found.call, moved=True)
        return found

    def _open(self, key: Key, arguments: Mapping[str, Any], missed: Call | None = None) -> Found | None:
        """A new session, unless the call is no rollout's; ``missed`` is the call that came before it."""
        taken = any(session.adapter is self._adapter for session in self)
        session = Session(copy.copy(self._as_attached) if taken else self._adapter, self._shared)
        call = read_call(session.adapter, arguments, self._shared)
        if call is None:
            return None
        self._by_key[key] = session
        if missed is not None:
            session.timeline.make_up_for(missed)
        return Found(session, call, key, arguments)

    def _forget_the_gone(self) -> None:
        """Sessions whose context exists no more have made their last chunk."""
        for key, session in list(self._by_key.items()):
            if gone(key):
                del self._by_key[key]
                if session not in self._by_key.values():
                    session.reset()


def read_call(adapter: Adapter, arguments: Mapping[str, Any], shared: Shared) -> Call | None:
    """The call in the core's words, its context by name; None for calls that are no rollout's."""
    call = parsed(adapter, arguments)
    return None if call is None else renamed(call, shared.names.of(call.stream))


def renamed(call: Call, stream: Hashable) -> Call:
    """The call with another name of its context."""
    if stream is call.stream:
        return call
    if type(call) is not Call:
        return dataclasses.replace(call, stream=stream)
    # As replace(), which takes four times as long, at every denoiser call.
    made = object.__new__(Call)
    vars(made).update(vars(call), stream=stream)
    return made
