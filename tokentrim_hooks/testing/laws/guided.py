"""The part of the conformance kit that tries ``guide``: what a look ahead sees, and that it touches nothing.

The same is done a second time on the unpatched model, with a deep copy of the denoiser and of all its arguments. Mixed
into :class:`tokentrim_hooks.testing.AdapterConformance`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks.policy.base import Policy
from tokentrim_hooks.policy.views import Noisy
from tokentrim_hooks.testing import checks
from tokentrim_hooks.testing.laws.hooks import calls_of, declared

STEP = 0.1
"""How far latents move, as a share of their own length."""


class GuideConformance:
    """Tests of policies that guide."""

    def test_a_guided_call_is_made_from_the_latents_that_a_policy_moves(self: Any) -> None:
        """Moved along the gradient of x0 before one chunk's first call, the video is that of the same done by hand."""
        declared(self, "guide")
        call = calls_of(self, self.chunk_to_prune, 9)["first"][0]
        expected, model = self._descended(call, 9), self.make_model()
        plain = self.run(model, 9)
        assert not torch.equal(expected, plain), "the reference itself moved nothing"
        with self.patch(model, Descends(chunk=self.chunk_to_prune)) as handle:
            checks.assert_close(self.run(model, 9), expected, self.tolerance)
        acts = [act["calls"] for record in handle.report for act in record.acts if act["hook"] == "guide"]
        assert acts and set(acts) == {1}, "not one call was guided"
        assert torch.equal(self.run(model, 9), plain), "unpatched, the model gives other results than before"

    def test_a_look_ahead_touches_nothing(self: Any) -> None:
        """What the denoiser is handed, caches above all, is the same to the bit before a look ahead and behind it, in
        every call; so are the video and the stream of random numbers. From call to call of a chunk the noise falls.
        """
        declared(self, "guide")
        plain, state = self.run(self.make_model(), 9), torch.get_rng_state()
        model, looks = self.make_model(), Looks(handed=[], looking=[False], count=[])
        denoiser = _module_of(self, model)
        with self.patch(model, looks):
            hook = denoiser.register_forward_pre_hook(looks.keep, with_kwargs=True)
            try:
                assert torch.equal(self.run(model, 9), plain), "a look ahead changes the output"
            finally:
                hook.remove()
        assert torch.equal(torch.get_rng_state(), state), "a look ahead draws random numbers"
        assert len(looks.count) > self.chunks, "no call was looked ahead of"
        levels = [[level for of, level in looks.levels if of == chunk] for chunk in range(self.chunks)]
        assert all(0 <= level <= 1 for _, level in looks.levels), f"noise_level() is not in 0..1: {levels}"
        assert all(line == sorted({*line}, reverse=True) for line in levels), (
            f"noise levels of each chunk's calls, which must fall, by noise_level(): {levels}"
        )

    def _descended(self: Any, call: int, seed: int) -> Tensor:
        """Run unpatched, the latents of one denoiser call moved; override where x0 is not the last output."""
        kit: Any = self
        model, count = kit.make_model(), checks.Counter()

        def move(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            count.up()
            if count.count - 1 != call:
                return None
            hook.remove()
            twin, given_args, given_kwargs = copy.deepcopy((module, args, kwargs))
            own, latents = _latents_of(args, kwargs), _latents_of(given_args, given_kwargs)
            with torch.enable_grad():
                latents.requires_grad_()
                output = twin(*given_args, **given_kwargs)
                slope = slope_of(output if isinstance(output, Tensor) else output[-1], latents)
            swap = {id(own): moved(own, slope)}
            return tuple(swap.get(id(a), a) for a in args), {k: swap.get(id(a), a) for k, a in kwargs.items()}

        hook = _module_of(kit, model).register_forward_pre_hook(move, with_kwargs=True)
        video: Tensor = kit.run(model, seed)
        return video


def slope_of(x0: Tensor, latents: Tensor) -> Tensor:
    """Gradient of the square of x0."""
    slope: Tensor = torch.autograd.grad(x0.square().sum(), latents)[0]
    return slope


def moved(latents: Tensor, slope: Tensor) -> Tensor:
    """Latents moved against a gradient."""
    own = latents.detach()
    share: Tensor = own.norm() / slope.norm().clamp(min=1e-12)
    return own - STEP * share * slope


@dataclass(frozen=True, kw_only=True)
class Descends(Policy):
    """Moves the latents of one chunk's first call against the gradient of the square of x0."""

    chunk: int

    def guide(self, chunk: Noisy) -> Tensor | None:
        """The moved latents, or no answer."""
        if chunk.index != self.chunk or chunk.phase != "first":
            return None
        with torch.enable_grad():
            latents = chunk.latents.detach().clone().requires_grad_()
            slope = slope_of(chunk.predict(latents), latents)
        return moved(latents, slope)


@dataclass(frozen=True, kw_only=True)
class Looks(Policy):
    """Looks ahead before every call, compares what the denoiser was handed last, and answers nothing."""

    handed: list[Any]
    looking: list[bool]
    count: list[int]
    levels: list[tuple[int, float]] = field(default_factory=list)

    def keep(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the denoiser: keep what it is handed, look aheads aside."""
        if not self.looking[0]:
            self.handed[:] = [args, kwargs]

    def guide(self, chunk: Noisy) -> Tensor | None:
        """No answer."""
        before = list(_leaves(self.handed))
        self.looking[0] = True
        try:
            with torch.enable_grad():
                latents = chunk.latents.detach().clone().requires_grad_()
                x0 = chunk.predict(latents)
                assert x0.requires_grad, "what a look ahead predicts has no gradient"
                assert torch.isfinite(slope_of(x0, latents)).all(), "the gradient of a look ahead is not finite"
        finally:
            self.looking[0] = False
        after = [bits for _, bits in _leaves(self.handed)]
        same = len(before) == len(after) and all(_same(old, new) for (_, old), new in zip(before, after, strict=True))
        assert same, "a look ahead has changed what the denoiser was handed: a cache, or what hangs on one"
        kept = [leaf for leaf, _ in before if isinstance(leaf, Tensor)]
        assert not any(leaf.requires_grad for leaf in kept), "a look ahead has left gradients on what was handed"
        self.count.append(chunk.index)
        self.levels.append((chunk.index, chunk.level()))
        return None


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Tensors and plain values in lists, tuples and dicts, with a copy of what they hold now."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, Tensor):
        yield value, value.detach().clone()
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield value, value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one == other) if not isinstance(one, Tensor) and not isinstance(other, Tensor) else False


def _module_of(kit: Any, model: Any) -> nn.Module:
    denoiser = kit.denoisers(model)[0]
    if not isinstance(denoiser, nn.Module):
        raise checks.not_checked("the denoiser is a method: nothing can be hooked before its calls")
    return denoiser


def _latents_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The noisy latents among a call's arguments: the only tensor of five dimensions."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 5]
    if len(found) != 1:
        raise checks.not_checked(f"{len(found)} arguments have five dimensions, so the latents are not known: override")
    return found[0]
