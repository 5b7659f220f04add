"""What a user should hear of a patch that does nothing: its denoiser was replaced, never called, never judged.

Nothing here changes a model, and a model in order costs one question to its adapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from tokentrim_hooks.adapter import Adapter, Match
from tokentrim_hooks.inspection import weakly
from tokentrim_hooks.loading import asked
from tokentrim_hooks.patching.patches import Method
from tokentrim_hooks.report.record import BROKEN_OFF, Report

ATTRIBUTE = "_tokentrim_handle"
"""Where a patched object keeps its handle; None in its copies."""
AGAIN = "Its calls are not seen: nothing of them is judged or pruned. Patch again, with replace=True."
FEW = 3
"""So many chunks without a verdict are no accident."""


def owners_of(match: Match) -> list[Any]:
    """The objects or classes that carry the patch: of the denoiser and of further ones."""
    return [match.denoiser.owner if isinstance(match.denoiser, Method) else match.denoiser, *match.also]


class Denoiser:
    """A denoiser as it was when it was patched, and where the model had it."""

    def __init__(self, model: Any, owner: Any) -> None:
        self._owner, self._kind = weakly(owner), type(owner)
        self._place = next((name for name, part in _parts(model).items() if part is owner), "")

    def change(self, model: Any, found: Any) -> str:
        """What has become of it, in words; empty if it is what it was. ``found`` is what the adapter finds now.

        A wrapper around it is no change (the calls still arrive), nor is a class derived from its own, as FSDP2 makes
        one; a model that has no denoiser left has none that could go unseen.
        """
        old, new = self._owner(), self._parts_now(model) if found is None else found
        if new is None or (new is not old and isinstance(new, nn.Module) and any(m is old for m in new.modules())):
            return ""
        where = f"the model's {self._place or 'denoiser'}"
        if new is not old:
            return f"{where}, a {self._kind.__name__}, {_instead(old, new)}. {AGAIN}"
        if not isinstance(new, type) and not issubclass(type(new), self._kind):
            return (
                f"the class of {where} was changed after the patch, from {self._kind.__name__} to "
                f"{type(new).__name__}, and what was patched belongs to the first. Patch again, with replace=True."
            )
        return ""

    def _parts_now(self, model: Any) -> Any:
        return _parts(model).get(self._place)


def _instead(old: Any, new: Any) -> str:
    kind, attributes = type(new).__name__, getattr(new, "__dict__", {})
    if attributes is getattr(old, "__dict__", None):
        return f"was replaced after the patch by a {kind} that shares its attributes (its class was swapped)"
    if ATTRIBUTE in attributes and attributes[ATTRIBUTE] is None:
        return "was replaced after the patch by a copy, and copies carry no patch"
    return f"was replaced after the patch by another {kind}"


def _parts(model: Any) -> dict[str, Any]:
    """Attributes and submodules by name."""
    attributes = getattr(model, "__dict__", {})
    return {**attributes, **(attributes.get("_modules") or {})}


class Checkup:
    """Compares a patched model with what it was; made before anything is attached.

    Args:
        model, adapter, match: what was patched, by whom, and what the adapter found.
    """

    def __init__(self, model: Any, adapter: type[Adapter[Any]], match: Match) -> None:
        self._model, self._adapter = weakly(model), adapter
        owners = owners_of(match)
        self._denoisers = [Denoiser(model, owner) for owner in owners]
        # A denoiser that was given itself shows no run of anybody.
        self._before = {} if any(model is owner for owner in owners) else _footprint(model)

    def replaced(self) -> str:
        """Which denoiser is no longer the one that was patched, and what to do; empty if all are."""
        model = self._model()
        if model is None:
            return ""
        answer = asked(self._adapter, model)
        found = owners_of(answer) if isinstance(answer, Match) else []
        found += [None] * len(self._denoisers)
        changes = (known.change(model, now) for known, now in zip(self._denoisers, found, strict=False))
        return next(filter(None, changes), "")

    def signs_of_run(self) -> str:
        """Where the model shows signs of a run, in words; empty if nowhere.

        Samplers leave settings in the model and timesteps in its scheduler, which other pipelines may share.
        """
        model = self._model()
        if model is None or not self._before:
            return ""
        before, now = self._before, _values(model)
        names = before.keys() ^ now.keys() | {n for n in before.keys() & now.keys() if not _is(before[n], now[n])}
        if any(len(name) == 1 for name in names):
            return "the model was run"
        return f"the model, or another that shares its {min(names)[0]}, was run" if names else ""


def _values(model: Any) -> dict[tuple[str, ...], Any]:
    """Attributes of the model, and of those of its parts that are no modules."""
    own: Mapping[str, Any] = getattr(model, "__dict__", {})
    values: dict[tuple[str, ...], Any] = {(name,): value for name, value in own.items() if name != ATTRIBUTE}
    for name, part in own.items():
        if name != ATTRIBUTE and not isinstance(part, (nn.Module, type)):
            values |= {(name, key): value for key, value in getattr(part, "__dict__", {}).items()}
    return values


def _footprint(model: Any) -> dict[tuple[str, ...], Any]:
    """By name what tells a value from another one; nothing is kept alive."""
    return {name: _sign_of(value) for name, value in _values(model).items()}


def _sign_of(value: Any) -> Any:
    try:
        return weakref.ref(value)
    except TypeError:
        return id(value)


def _is(sign: Any, value: Any) -> bool:
    return sign() is value if isinstance(sign, weakref.ref) else sign == id(value)


def chunks_of(report: Report) -> set[tuple[int, int]]:
    """(video, chunk) of all that was recorded."""
    return {(record.video, record.chunk) for record in report}


def never_judged(report: Report, under_way: int = 0) -> str:
    """Why none of several chunks has a verdict, in words; empty if one has, or if some were handed in as context.

    ``under_way`` counts videos that may yet go on, as those of a server that makes several in turns.
    """
    # A chunk that was broken off (Ctrl-C) says nothing, nor does a first one that another has followed.
    made = {(record.video, record.chunk) for record in report if record.phases and BROKEN_OFF not in record.notes}
    longer = {record.video for record in report if record.chunk}
    chunks = {place for place in made if place[1]} or {place for place in made if place[0] not in longer}
    if len(chunks) < FEW or any(record.given or record.severity is not None for record in report):
        return ""
    if all(chunk == 0 for _, chunk in chunks):
        # The newest one may always go on; it is those before it that show that none does.
        if under_way > 1 and len(chunks) - under_way < FEW - 1:
            return ""
        reason = (
            "every one opened a new video, and a video's first chunk has nothing to drift from. If they belong to one "
            "video, the calls do not say so: make it in one run of the sampler. Videos of one chunk cannot be pruned."
        )
    else:
        reason = "the policy gave no verdict on any of them."
    return f"tokentrim recorded {len(made)} chunks and judged none: {reason}"


def never_called(foreign: int, unread: int, signs: str) -> str:
    """Why there is no record at all, in words; empty where nothing was run."""
    if unread:
        return (
            "tokentrim was patched in and the denoiser was called, but no chunk was recognised: nothing was judged or "
            "pruned"
        )
    if foreign:
        return (
            f"tokentrim was patched in, but all {foreign} calls of the denoiser came from another pipeline that shares "
            "it: nothing was judged or pruned. Patch the pipeline that you run."
        )
    if signs:
        return (
            f"tokentrim was patched in, but its denoiser was never called, although {signs}: nothing was "
            "judged or pruned. Calls must go through the denoiser that was patched, and as denoiser(...), not "
            "denoiser.forward(...), which runs no hooks."
        )
    return ""
