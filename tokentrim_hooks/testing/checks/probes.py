"""Compares what an adapter says of a call with what the model does: its predictions, and where a pixel goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokentrim_hooks.adapter import Adapter, Call, Phase, Seen
from tokentrim_hooks.errors import UnsupportedProbeError
from tokentrim_hooks.inspection import bind
from tokentrim_hooks.patching.patches import Method
from tokentrim_hooks.pruning.context import CacheRows, Context
from tokentrim_hooks.testing.attention import Denoiser, changed_calls, fingerprints_of
from tokentrim_hooks.testing.checks.basics import Injected, not_checked

CLOSE = 1e-3
"""Greatest difference between x0 and what is delivered, relative to the largest value: samplers round."""


class Predictions:
    """Listens to a patched model's adapter: the last denoising step's x0 of every chunk, by its start frame."""

    def __init__(self, adapter: Adapter[Any]) -> None:
        self.last: dict[int, Tensor] = {}
        self.calls, self.in_flight = 0, False
        self._phase: Phase | None = None
        self._asked = adapter.phase, adapter.prediction, adapter.in_flight
        listened: Any = adapter
        listened.phase, listened.prediction, listened.in_flight = self._hear_phase, self._hear_x0, self._hear_flight

    def _hear_phase(self, call: Call, seen: Seen) -> Phase:
        self._phase = self._asked[0](call, seen)
        return self._phase

    def _hear_x0(self, call: Call, output: Any) -> Tensor:
        x0, self.calls = self._asked[1](call, output), self.calls + 1
        if self._phase in (None, Phase.FIRST, Phase.REFINE) and not call.commits:
            self.last[call.start] = x0.detach().clone()
        return x0

    def _hear_flight(self, call: Call, output: Any) -> Tensor | None:
        flying = self._asked[2](call, output)
        self.in_flight = self.in_flight or flying is not None
        return flying

    def require_comparable(self, calls: int) -> None:
        """Skip where the last prediction of a chunk need not be what the sampler makes of it."""
        if calls > self.calls:
            raise not_checked("the model is guided: what it delivers is made of two predictions")
        if self.in_flight:
            raise not_checked("several chunks are in flight: the newest is finished after the next has begun")


class HeldRows:
    """Listens to a patched model's adapter: rows of history in the cache at each chunk, by its start frame.

    ``coarse``: in the sequence, and a key may stand for several tokens.
    """

    def __init__(self, adapter: Adapter[Any]) -> None:
        self.at: dict[int, int] = {}
        self.coarse = False
        self._asked = adapter.context
        listened: Any = adapter
        listened.context = self._hear

    def _hear(self, call: Call) -> Context:
        context = self._asked(call)
        if isinstance(context, CacheRows):
            own = context.current[1] - context.current[0]
            self.at[call.start] = max(context.stop - context.start - own, 0)
        else:
            self.coarse = self.coarse or any(math.prod(segment.scale) > 1 for segment in context.segments)
        return context


def check_delivered(predictions: dict[int, Tensor], video: Tensor) -> None:
    """Assert that every chunk's last x0 is ``video`` at its frames."""
    assert predictions, "the adapter was asked for no prediction"
    for start, x0 in predictions.items():
        turned = video if video.shape[2] == x0.shape[2] else video.transpose(1, 2)
        assert x0.shape[2:] != turned.transpose(3, 4).shape[2:] or x0.shape[3] == x0.shape[4], (
            "x0 and latents have height and width exchanged: the core wants [batch, frames, channels, height, width]"
        )
        if x0.shape[0] != turned.shape[0] or x0.shape[2:] != turned.shape[2:]:
            raise not_checked("run() returns no latents of the shape of x0; override delivered()")
        # A video that is made from its end on counts frames from there: -3 is the third last.
        there = turned[:, start : (start + x0.shape[1]) or None]
        assert there.shape == x0.shape, f"the chunk at latent frame {start} is not in the video"
        off = float((there - x0).abs().max() / turned.abs().max())
        assert off <= CLOSE, (
            f"x0 of the last step of the chunk at latent frame {start} is {off:.1e} away from what the sampler "
            "delivers there: prediction(), or start, is wrong"
        )


# ------------------------------------------------------------------------------------------------- pixels


class _FirstValues(TorchFunctionMode):
    """Ends the run at the first attention kernel inside the call, and keeps its V."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.inside = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside and getattr(func, "__name__", "") == "scaled_dot_product_attention":
            self.rows = fingerprints_of(args[2] if len(args) > 2 else kwargs["value"])
            raise Injected
        return func(*args, **kwargs)


Rows = dict[tuple[int, int], list[int]]
"""V rows of the first layer (of all samples, one behind the other) that a pixel (y, x) changes."""


def rows_of_pixels(
    run: Callable[[], object], denoiser: Denoiser, adapter: Adapter[Any]
) -> tuple[Rows, tuple[int, int]]:
    """Run up to the first attention for each pixel of the first latent, with that pixel changed.

    Returns:
        Which rows each pixel changes, and the latents' (height, width).
    """
    before, size = _first_values(run, denoiser, adapter, None)
    if not before:
        raise not_checked("the model does not call scaled_dot_product_attention")
    found: Rows = {}
    for pixel in _cross(min(size[0], 8), min(size[1], 8)):
        after, _ = _first_values(run, denoiser, adapter, pixel)
        found[pixel] = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    return found, size


def _cross(height: int, width: int) -> list[tuple[int, int]]:
    """Pixels of the first row, of the first column and of the diagonal: enough to tell tokens' size and order."""
    diagonal = {(i, i) for i in range(min(height, width))}
    return sorted({(y, 0) for y in range(height)} | {(0, x) for x in range(width)} | diagonal)


def _first_values(
    run: Callable[[], object], denoiser: Denoiser, adapter: Adapter[Any], pixel: tuple[int, int] | None
) -> tuple[list[int], tuple[int, int]]:
    """V rows of the first attention, the pixel changed; and the latents' size."""
    watch, size = _FirstValues(), (0, 0)

    def change(called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal size
        watch.inside = True
        # Of a module rollout has asked the adapter already what this call is; around a method nobody has, yet.
        call = next((call for call in calls if call is not None), None)
        if call is None and isinstance(denoiser, Method):
            call = parse(bind(called, args, kwargs))
        if call is None:
            return None
        size = (int(call.latents.shape[-2]), int(call.latents.shape[-1]))
        return None if pixel is None else _moved(adapter, call, args, kwargs, pixel)

    calls: list[Call | None] = []
    listened: Any = adapter
    parse = adapter.parse

    def note(arguments: Any) -> Any:
        calls.append(parse(arguments))
        return calls[-1]

    listened.parse = note
    try:
        with changed_calls(denoiser, change), watch:
            run()
    except Injected:
        pass
    finally:
        del listened.parse
    return watch.rows, size


def _moved(
    adapter: Adapter[Any], call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], pixel: tuple[int, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    latents = call.latents.clone()
    latents[0, 0, :, pixel[0], pixel[1]] += 1
    try:
        return adapter.with_latents(call, args, kwargs, latents)
    except UnsupportedProbeError:
        raise not_checked("the latents are a part of an argument, and the adapter has no with_latents") from None


def check_tokens(rows: Rows, size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Assert that pixels of one token change one and the same row, and tokens follow each other row by row."""
    if any(len(changed) != 1 for changed in rows.values()):
        raise not_checked("a pixel changes no row of the first layer, or several: its tokens cannot be told apart")
    width = -(-size[1] // patch_size[1])
    token = {(y, x): y // patch_size[0] * width + x // patch_size[1] for y, x in rows}
    row = {pixel: changed[0] for pixel, changed in rows.items()}
    steps = {(token[pixel], row[pixel] - row[0, 0]) for pixel in rows}
    stride = min((r // t for t, r in steps if t), default=1)
    wrong = {pixel: (token[pixel], row[pixel]) for pixel in rows if row[pixel] - row[0, 0] != token[pixel] * stride}
    assert not wrong and stride > 0, (
        f"with patch_size {patch_size} these pixels are in other tokens than the model puts them in, "
        f"pixel: (token, row): {dict(list(wrong.items())[:4])}"
    )
