"""Accounts for every key that attention sees over a KV cache in which something is dead.

Each key is a row of the cache that the adapter describes, or one of the chunk in the call. A model may keep other
memory, which was made of rows: running means of what has left the window (EMA tokens), copies in a bank, a sink into
which rows are blended. What was pruned lives on there, or its mark spreads there and kills what nobody has pruned; both
would go wrong in silence. So rows are known by their content, which rolls, evictions and copies leave alone: a key with
a content that no row has had is refused.

A row is the same token in every head and layer, and a frame leaves as a whole; else a mark lies on what nobody has
pruned. Contents are of all heads for that reason, and layers.py and frames of which some rows are gone are looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tokentrim_hooks.errors import LatentsError, UnsupportedContextError
from tokentrim_hooks.pruning.context import CacheRows
from tokentrim_hooks.pruning.frames import WholeFrames
from tokentrim_hooks.pruning.in_place import RowsInPlace
from tokentrim_hooks.pruning.layers import LayersAlike
from tokentrim_hooks.pruning.samples import Samples

ELEMENTS, MIXER = 4, 0x5851F42D4C957F2D
"""Elements of a row's first head that its content is told by, and an odd number that mixes bits into one number."""
SIGNS = 62
"""Elements whose signs tell a row of float8: they outlive the scale, and the rounding, that it is kept with."""
KINDS = 4
"""Kinds of calls that are remembered, the latest of each."""


class KeyAccount:
    """The rows of one cache by content, from call to call. Nothing here keeps the cache alive, or reads the device.

    Args:
        context: the cache, for the call that follows.
        whole: whether frames are looked at of which some rows are gone.
    """

    def __init__(self, context: CacheRows, whole: bool = True) -> None:
        self._whole = whole
        self.of_hidden = False
        """Whether it is of a call from which rows are hidden: these are dead to it, and alive again behind it."""
        self.astray: Tensor | None = None
        """Whether finished frames lie in another order than they lay: BoolTensor ``[]``, where that is asked."""
        self.marked: list[int] = []
        """Rows marked since the latest call, of each sample; a call that sees all rows must see them, too."""
        self.in_place: RowsInPlace | None = None
        """Where keys are looked for before anything is sorted; None: nowhere."""
        # By the number of queries: calls of one kind may read more of the cache than others between them.
        self._seen: dict[int, Tensor] = {}
        # A view by frames belongs to layers that attend per site, whose keys are one token's.
        values = context.values[0]
        self._most = (context.stop, int(values.shape[1])) if values.ndim == 4 else None
        # What the call that came first after a prune was held to: its other parts are, too.
        self._marked_most: tuple[list[int], tuple[int, int] | None] = ([], None)
        self._start, self._same, self._beside = -1, False, False
        self._thorough: Callable[[], Tensor] | None = None
        self.layers = LayersAlike(any(each.ndim == 5 for each in context.values))
        """Whether all layers have the same dead rows."""
        self.read(context)

    def begin(self, start: int) -> None:
        """A call comes for the chunk at latent frame ``start``: rows move between chunks, hardly within one."""
        self._start, self._same = start, start == self._start
        self.layers.looks = not self._same or bool(self.marked)

    def read(self, context: CacheRows) -> None:
        """Know all rows that a cache holds: at a prune, or where rows were rewritten on purpose.

        Sets :attr:`places`, their contents where they lie: LongTensor ``[B, rows]``.
        """
        self._kind = context.values[0].dtype
        self._heads = int(context.values[0].shape[-2])
        contents = row_contents(context.values[0], self._kind, self._heads)
        self._rows, self.places = contents.flatten(), contents.flatten(1)
        frames = context.stop // context.rows_per_frame
        # Float8 is told by its signs, which may well be those of another row.
        told = self._whole and self._kind.itemsize > 1 and frames > 0
        history = contents.flatten(1)[:, : frames * context.rows_per_frame]
        self._frames = WholeFrames(history, context.rows_per_frame) if told else None

    def known(self, values: Tensor, new: int, part: Samples | None = None) -> Tensor:
        """Which keys of a call have the content of a row: BoolTensor ``[B, keys]`` on the device.

        Args:
            values: V of the call's first attention, ``[B, keys, heads, head_dim]``.
            new: keys that are the chunk's own, at most.
            part: samples that the call is made with, where not with all: what the others have seen stays known.
        """
        contents, latest = row_contents(values, self._kind, self._heads), self._seen.get(new)
        thorough = functools.partial(_found, values, contents, [self._rows, *self._seen.values()])
        if self._same and part is None and latest is not None and latest.numel() == contents.numel():
            # All but the chunk's own lie where they lay in its call before: to find them there costs no sort.
            found, self._thorough = (contents.flatten() == latest).view_as(contents), thorough
        elif self.in_place and (guess := self.in_place.found(contents, self.places, new)) is not None:
            found, self._thorough = guess, thorough
        else:
            found, self._thorough = thorough(), None
        kinds = {queries: seen for queries, seen in self._seen.items() if queries != new}
        others = [self._seen[new]] if part is not None and new in self._seen else []
        seen = torch.cat([*others, contents.flatten()]) if others else contents.flatten()
        self._seen = dict([*kinds.items(), (new, seen)][-KINDS:])
        self._broken = self._torn = None
        # In float8 a mark may be NaN itself, and torch does not ask all of these types.
        if not self._same and values.dtype.itemsize > 1:
            # Rows that are NaN all over cannot be told, so nobody knows whether they are gone; dead ones may be NaN.
            whole = values[..., 0, 1].isfinite()
            self._broken = ~(whole | values[..., 0, 0].isinf()).all()
            if self._frames is not None:
                self._torn = self._frames.torn(contents) & whole.all()
        return found

    def second_look(self) -> Callable[[], Tensor] | None:
        """What :meth:`known` would have found by a sort, if it made none; handed over, for it holds the keys' V."""
        thorough, self._thorough = self._thorough, None
        return thorough

    def asked(self, values: Tensor, new: int, part: Samples | None = None) -> list[Tensor]:
        """All that :meth:`answer` needs of a call's first layer; arguments and shapes as of :meth:`known`."""
        known = self.known(values, new, part)
        self.layers.begin(values)
        flags = (self._torn, self.layers.waiting, self._out_of_place(values, new, part), self._broken, self.astray)
        self._flags = [flag is not None for flag in flags]
        return [known, *[flag.to(known.device).expand_as(known) for flag in flags if flag is not None]]

    def _out_of_place(self, values: Tensor, new: int, part: Samples | None) -> Tensor | None:
        """Where a call has as many keys as the cache has room: BoolTensor ``[B, 1]``, whether they are other memory.

        One that reads the whole cache has each row in its place, but for the chunk's own. None: it has not so many, or
        there are as many rows, or more: then it rolls the cache, and rows may lie elsewhere.
        """
        history, size = self._most or (0, 0)
        if not values.shape[1] == size == self.places.shape[1] or size <= history + new or not self.marked:
            return None
        rows = self.places[slice(None) if part is None else slice(part.first, part.stop)]
        if len(rows) not in (1, len(values)):
            return None  # a cache with room for more samples than are called with
        return (row_contents(values, self._kind, self._heads) != rows.to(values.device)).sum(-1, keepdim=True) > new

    def answer(
        self, alive: Tensor, read: Tensor, new: int, padded: bool = False, part: Samples | None = None
    ) -> None:
        """Once that was read, ``[some, B, keys]`` on the CPU: :meth:`require`, of layers and of frames as well."""
        known, *flags = read
        told = iter(bool(flag.any()) for flag in flags)
        torn, apart, self._beside, broken, astray = (has and next(told) for has in self._flags)
        if broken and not padded:
            raise LatentsError(
                "rows of the KV cache are NaN or inf all over: the model diverged, or another one reads pruned rows.\n"
                "Look at its inputs. Of two denoisers that share a cache in turns, patch none, or write an adapter."
            )
        self.layers.require(apart)
        self.require(alive, known, new, padded, part)
        if astray:
            raise UnsupportedContextError(
                "finished frames lie in the KV cache in another order than before: others would be hidden than meant.\n"
                "Keep them oldest first, or write an adapter that says which is where (CacheRows.frames)."
            )
        if torn and not bool(alive.all()):
            raise UnsupportedContextError(
                "some rows of finished frames are gone from the KV cache and others are not, so tokens are not where "
                "they are looked for.\nKeep or drop whole frames, or write an adapter for this fork."
            )

    def require(
        self, alive: Tensor, known: Tensor, new: int, padded: bool = False, part: Samples | None = None
    ) -> None:
        """Once that was read: raise if something is dead, and there are keys that are rows of nothing.

        Args:
            alive: CPU BoolTensor ``[B, keys]``; what is hidden from the call lives, unless this is :attr:`of_hidden`.
            known, new: as above.
            padded: whether keys that are 0 may lie behind the others. part: as above.

        Raises:
            UnsupportedContextError: more than ``new`` keys are unknown, or a dead one is, or there are more keys than
                rows.
        """
        thorough = self.second_look()
        most = self._require_marks(alive, new, part)
        if bool(alive.all()):
            return
        keys = int(alive.shape[1])
        history, size = most or (keys, keys)
        more = int(self._beside) if padded or keys == size else keys - new - history
        beside = max(_strange(alive, known, new), more)
        if beside > 0 and thorough is not None:
            if self.in_place:
                self.in_place.holds = False
            beside = max(_strange(alive, thorough().cpu(), new), more)
        if beside > 0:
            count = "some" if self._beside else beside
            raise UnsupportedContextError(
                f"{count} of {keys} keys in self attention are no rows of the KV cache: memory that keeps what is left "
                "out?\nSwitch it off (a mean, a bank), or write an adapter that spares it, with keeps_memory = True."
            )

    def _require_marks(self, alive: Tensor, new: int, part: Samples | None) -> tuple[int, int] | None:
        """Raise UnsupportedContextError if the chunk's own rows lie on marked ones; (history, all) rows, if known."""
        if part is None or not part.before:
            self._marked_most, self.marked, self._most = (self.marked, self._most), [], None
        marks, most = self._marked_most
        self.layers.most = most and max(most[0] + new, int(alive.shape[1]))
        marked = sum(marks if part is None else marks[part.first : part.stop])
        whole = most is not None and alive.shape[1] == most[0] + new
        # Where no mark is seen at all they never reached attention: the self-check of the prune says that.
        if whole and 0 < int((~alive).sum()) < marked:
            raise UnsupportedContextError(
                f"the next call wrote over some of {marked} pruned rows: the chunk's own are not the last (a ring "
                "buffer?).\nWrite an adapter for this fork, which says where the rows of finished frames are."
            )
        return most


def _strange(alive: Tensor, known: Tensor, new: int) -> int:
    """Keys that are unknown, more than ``new`` of them, or unknown and dead; of the sample that has most."""
    strange, dead = (int(known.shape[1]) - int(min(kept.sum(1).tolist())) for kept in (known, known | alive))
    return max(strange - new, dead)


def keeps_contents(context: CacheRows) -> bool:
    """Whether a row in attention can be known by its content: float8 without a negative zero loses signs as well."""
    return bool(context.values) and not str(context.values[0].dtype).endswith("fnuz")


def row_contents(values: Tensor, kind: torch.dtype, heads: int) -> Tensor:
    """A number for every row of V ``[B, rows..., heads, head_dim]``: of a few elements, as they are in ``kind``.

    Not of the first element, which marks change. Elements are rounded to the cache's type: some models attend to what
    they write before it is rounded. Where attention repeats each of the cache's ``heads``, one of each is taken.
    """
    values = values[..., :: max(values.shape[-2] // heads, 1), :]
    if kind.itemsize == 1:
        return _signs(values)
    # One element of every other head: heads that keep rows of their own make rows that were never written.
    elements = torch.cat([values[..., 0, 1 : 1 + ELEMENTS], values[..., 1:, 1]], dim=-1).to(kind).float()
    bits = elements.view(torch.int32).long()
    return (bits * _mixers(bits.shape[-1], bits.device)).sum(-1)


@functools.cache
def _mixers(count: int, device: torch.device) -> Tensor:
    """Powers of an odd number, modulo 2^64: LongTensor ``[count]``."""
    powers = [pow(MIXER, power, 1 << 64) for power in range(1, count + 1)]
    return torch.tensor([number - (number >> 63 << 64) for number in powers], device=device)


_mixers(ELEMENTS, torch.device("cpu"))  # made before any mode that watches, or fakes, what is made


def _signs(values: Tensor) -> Tensor:
    """A number for every row of V, of its signs."""
    rows = values[..., 1 : 1 + max(SIGNS // values.shape[-2], 1)].flatten(-2)
    signs = rows[..., :SIGNS].float().signbit().long()
    return (signs << torch.arange(signs.shape[-1], device=signs.device)).sum(-1)


def _found(values: Tensor, contents: Tensor, known: list[Tensor]) -> Tensor:
    """Which keys have a content that is known, or are no memory for another reason."""
    found = _among(contents, torch.cat([rows.to(contents.device) for rows in known]))
    # A row that is NaN or infinite all over is no mark of ours: the model has diverged, which is told elsewhere. One
    # that is 0 all over is no memory: it pads keys.
    some = values[..., 0, : 1 + ELEMENTS].float()
    return found | ~some[..., 1:].isfinite().all(-1) | (some == 0).all(-1)


def _among(contents: Tensor, known: Tensor) -> Tensor:
    """Which of ``contents`` are among ``known`` (one dimension): torch.isin, but without a host sync."""
    ordered = known.sort().values
    place = torch.searchsorted(ordered, contents.contiguous()).clamp(max=ordered.numel() - 1)
    return ordered[place] == contents
