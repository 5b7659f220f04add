"""Which denoisers can be called with some samples of a batch, and what it takes to prove it.

A replay is paid for by the sample where the arguments, and the caches among them, have samples in their first dimension
and no sample sees another. Whether that is so is proved when it is first made use of: the chunk is regenerated both
ways, the whole batch first, then some samples, and both must have predicted, and written, the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tokentrim_hooks.inspection import compiled_part, shares_storage, weakly
from tokentrim_hooks.pruning.context import CacheRows, Context
from tokentrim_hooks.pruning.samples import Samples, runs_of
from tokentrim_hooks.rollout.repeat.cut import CutCall, NotSeparableError
from tokentrim_hooks.rollout.repeat.keepers import items_of, keepers_of
from tokentrim_hooks.rollout.repeat.proof import ROUNDING

_logger = logging.getLogger(__name__)

Key = tuple[int, tuple[str, ...]]
"""Samples in the batch, and where arguments are cut."""


class Parts:
    """What is known of the denoisers of one patched model."""

    def __init__(self) -> None:
        self._known: list[tuple[Callable[[], object], Key, str]] = []
        self._said: set[str] = set()

    def finding(self, module: object, key: Key) -> str | None:
        """Why calls of this kind are made with the whole batch; empty where they need not, None while unknown."""
        return next((why for known, other, why in self._known if known() is module and other == key), None)

    def learn(self, module: object, key: Key, why: str) -> None:
        """Remember what a proof has shown, and say it."""
        self._known = [entry for entry in self._known if entry[0]() is not None]
        self._known.append((weakly(module), key, why))
        if why:
            self.say(why)
        else:
            _logger.info("a replay calls the denoiser with the samples that are regenerated, of batches of %d", key[0])

    def say(self, why: str) -> None:
        """Say once why a whole batch is regenerated."""
        if why not in self._said:
            self._said.add(why)
            _logger.info("chunks are regenerated with the whole batch, flagged or not: %s", why)


def separated(
    module: object, latents: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], context: Context, flags: list[bool]
) -> tuple[list[Samples], Key]:
    """The runs of samples that are flagged, and what kind of call it is.

    Args:
        module: the denoiser. latents: of the call. args, kwargs: of the call, with the whole batch.
        context: of the call. flags: of each sample, whether it is regenerated.

    Raises:
        NotSeparableError: its samples cannot be told apart.
    """
    if part := compiled_part(module):
        raise NotSeparableError(f"{part} is compiled, and would be once more for fewer samples")
    branches = _branches(latents, [*args, *kwargs.values()])
    runs = runs_of(flags, branches)
    cut = CutCall(runs[0], args, kwargs)
    if not any(shares_storage(tensor, latents) for tensor in cut.tensors):
        raise NotSeparableError("no argument holds the noisy latents sample by sample")
    given = {tensor.untyped_storage().data_ptr() for tensor in cut.tensors}
    for rows in (*context.values, *context.keys) if isinstance(context, CacheRows) else ():
        if rows.shape[0] != len(flags) or rows.untyped_storage().data_ptr() not in given:
            raise NotSeparableError("its KV cache is no argument of the call, or has samples in another dimension")
    if kept := next(_kept_of_batch(module, runs[0]), ""):
        raise NotSeparableError(f"{kept} is a tensor of the batch that the model itself keeps")
    return runs, (len(flags), tuple(cut.places))


def _branches(latents: Tensor, arguments: list[Any]) -> int:
    """How many branches of guidance share the batch of the call whose latents these are."""
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.ndim]
    size = max((int(leaf.shape[0]) for leaf in leaves if shares_storage(leaf, latents)), default=0)
    return max(size // latents.shape[0], 1) if size % latents.shape[0] == 0 else 1


def _kept_of_batch(module: object, samples: Samples) -> Iterator[str]:
    """Names of what hangs on the modules and may have samples in its first dimension: it is not cut."""
    parts = [part for part in keepers_of(module) if not isinstance(part, (type, list))]
    for part in parts:
        buffers = part._buffers.values() if isinstance(part, nn.Module) else ()
        for name, value in [*items_of(part).items(), *((str(n), b) for n, b in enumerate(buffers))]:
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                known = not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter) or tensor.ndim < 3
                if not known and samples.fold(tensor):
                    yield f"{type(part).__name__}.{name}"


class Trial:
    """A chunk regenerated both ways: what each predicted, and what each left in the cache.

    Args:
        context: where the rows of the chunk lie now; asked again after each.
        frames: of the chunk. flags: of each sample, whether it is regenerated.
    """

    def __init__(self, context: Callable[[], Context], frames: int, flags: Sequence[bool]) -> None:
        self._context, self._frames, self._flags = context, frames, list(flags)
        self._bounds = self._bounds_now()

    def whole_made(self, output: Any) -> None:
        """The whole batch was made; ``output`` has those that are not flagged as they were.

        Raises:
            NotSeparableError: rows have moved with it.
        """
        self._whole, self._after_whole = output, self._prints()
        if self._bounds_now() != self._bounds:
            raise NotSeparableError("the call moves rows of the cache, which all samples share")

    def finding(self, parts: Any) -> str:
        """The flagged samples were made alone as well: what differs, in words; empty if nothing does."""
        spared, after_parts = torch.tensor([not flag for flag in self._flags]), self._prints()
        apart = [_apart(one, other) for one, other in zip(tree_leaves(parts), tree_leaves(self._whole), strict=True)]
        apart += [
            _apart(one[~spared], other[~spared]) for one, other in zip(after_parts, self._after_whole, strict=True)
        ]
        for one, other in zip(self._after_whole, after_parts, strict=True):
            if not torch.equal(one[spared], other[spared]):
                return "a call with some samples writes into the rows of others"
        # Kernels round otherwise for other batch sizes. Not ">": a distance that is no number is none that is small.
        far = [distance for distance, kind in apart if not distance <= ROUNDING[kind]]
        return f"samples made alone differ by {max(far):.1e} from what they are in the whole batch" if far else ""

    def _bounds_now(self) -> object:
        context = self._context()
        return (context.start, context.stop, context.current) if isinstance(context, CacheRows) else None

    def _prints(self) -> list[Tensor]:
        """Two numbers for each sample of K and V in the chunk's own rows, layer by layer: ``[B, 2]``, on the host."""
        context = self._context()
        if not isinstance(context, CacheRows):
            return []
        first, stop = context.own_rows(self._frames)
        return [_print(rows, first, stop, context.rows_per_frame) for rows in (*context.values, *context.keys)]


def _print(rows: Tensor, first: int, stop: int, per_frame: int) -> Tensor:
    own = rows[:, first:stop] if rows.ndim == 4 else rows[:, first // per_frame : -(-stop // per_frame)]
    flat = torch.nn.functional.pad(own.flatten(1).float(), (0, 1))  # so that there is a mean of no rows
    ramp = torch.linspace(-1, 1, flat.shape[1], device=flat.device)
    prints = torch.stack([flat.abs().mean(1), (flat * ramp).mean(1)], dim=1).cpu()
    return prints.to(rows.dtype if rows.dtype in ROUNDING else torch.bfloat16)


def _apart(one: Any, other: Any) -> tuple[float, torch.dtype]:
    """How far two tensors lie apart, of the largest value, and the type that they are in; what is none is alike."""
    if not isinstance(one, Tensor) or one.dtype not in ROUNDING or not one.numel():
        return 0.0, torch.float32
    wide = torch.promote_types(one.dtype, torch.float32)
    distance, scale = torch.stack([(one.to(wide) - other.to(wide)).abs().amax(), other.to(wide).abs().amax()]).tolist()
    return distance / max(scale, 1e-30), one.dtype
