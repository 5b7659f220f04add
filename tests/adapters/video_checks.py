"""The frame of every test of a diffusers adapter: make a video, prune it, compare with -inf, and leave nothing behind.

A family brings its pipeline, ``run(pipe, **options)`` (the latents it makes) and a reference of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import assert_same, fingerprint

Run = Callable[..., Tensor]


class Clock:
    """Counts chunks from 0, from outside: by a method that the pipeline calls once per chunk."""

    def __init__(self, method: str = "scheduler.set_timesteps", given: int = 0) -> None:
        self.chunk = given - 1
        self._owner, _, self._method = method.rpartition(".")

    @contextmanager
    def on(self, pipe: Any) -> Iterator[Clock]:
        """Count while the block runs."""
        owner = getattr(pipe, self._owner) if self._owner else pipe
        original = getattr(owner, self._method)

        def tick(*args: Any, **kwargs: Any) -> Any:
            self.chunk += 1
            return original(*args, **kwargs)

        setattr(owner, self._method, tick)
        try:
            yield self
        finally:
            delattr(owner, self._method)


def observed(pipe: Any, run: Run, **options: Any) -> list[tokentrim.ChunkRecord]:
    """Records of the first sample; observing has changed no bit and drawn no random number."""
    plain, state = run(pipe, **options), torch.random.get_rng_state()
    with tokentrim.patched(pipe, tokentrim.ObservePolicy()) as handle:
        assert torch.equal(run(pipe, **options), plain)
        assert torch.equal(torch.random.get_rng_state(), state)
        return [record for record in handle.report if record.sample == 0]


def assert_judged(pipe: Any, run: Run, drift: Tensor, rel: float = 1e-5, **options: Any) -> None:
    """Chunk 2's severity and unstable set are those of ``drift`` ``[N]``, which the test computed by hand."""
    with tokentrim.patched(pipe, tokentrim.ObservePolicy(fraction=0.25)) as handle:
        run(pipe, **options)
    record = handle.report.records[2]
    worst = drift.topk(4)
    assert record.severity == pytest.approx(float(worst.values.mean()), rel=rel)
    assert set(record.tokens) == set(worst.indices.tolist())


def blocky(difference: Tensor) -> Tensor:
    """Drift of the 4 x 4 tokens of 2 x 2 pixels from the difference of two chunks' means ``[C, H, W]``: ``[16]``."""
    tiles = difference.unflatten(2, (4, 2)).unflatten(1, (4, 2))
    return tiles.square().sum((0, 2, 4)).sqrt().flatten()


def assert_exact(
    pipe: Any,
    run: Run,
    policy: tokentrim.Policy,
    expected: Tensor,
    triggers: int = 1,
    least: float = 1e-3,
    **options: Any,
) -> Tensor:
    """The pruned video is the reference with -inf, one call dearer per trigger, and not the unpruned one."""
    plain = run(pipe, **options)
    with tokentrim.patched(pipe, policy) as handle:
        pruned = run(pipe, **options)
    records = [record for record in handle.report if record.pruned]
    assert len(records) == handle.report.triggers == triggers
    assert all(record.extra_calls == 1 for record in records)
    torch.testing.assert_close(pruned, expected, atol=1e-5, rtol=1e-5)
    assert (pruned - plain).abs().max() > least
    return pruned


@contextmanager
def spoilt_input(module: torch.nn.Module, spoil: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Iterator[None]:
    """Let ``spoil(kwargs)`` say which keyword arguments of the module's calls shall be others."""

    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **spoil(kwargs)}

    hook = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def assert_leaves_nothing_behind(
    pipe: Any, run: Run, policy: tokentrim.Policy, stop_after: int, chunks: Sequence[int]
) -> None:
    """Videos in one patch, one of them interrupted, are as alone; unpatched, the pipeline is what it was."""
    plain, before = run(pipe), fingerprint(pipe)
    run(pipe)
    own = before.changed(fingerprint(pipe))
    with tokentrim.patched(pipe, policy):
        whole = run(pipe)
    with tokentrim.patched(pipe, policy) as handle:
        assert torch.equal(run(pipe), whole)
        with pytest.raises(ZeroDivisionError):
            run(pipe, callback_on_step_end=_stop_after(stop_after))
        assert torch.equal(run(pipe), whole)
        assert [record.chunk for record in handle.report] == list(chunks)
    assert torch.equal(run(pipe), plain)
    assert_same(before, fingerprint(pipe), ignore=own)


def _stop_after(steps: int) -> Callable[..., dict[str, Any]]:
    calls: list[float] = []

    def callback(_pipe: Any, _step: int, _timestep: Any, _given: Any) -> dict[str, Any]:
        calls.append(1 / (steps - len(calls)))
        return {}

    return callback


def assert_refuses_a_cache_and_parallelism(pipe: Any, run: Run, attention: Any) -> None:
    """A diffusers cache that is switched on after the patch; parallelism of an attention module before it."""
    from diffusers import MagCacheConfig

    with tokentrim.patched(pipe):
        pipe.transformer._cache_config = MagCacheConfig(calibrate=True)
        with pytest.raises(tokentrim.UnsupportedContextError, match="disable_cache"):
            run(pipe)
    pipe.transformer._cache_config = None
    attention.processor._parallel_config = object()
    with pytest.raises(tokentrim.UnsupportedModelError, match="context parallelism"):
        tokentrim.patch(pipe)
