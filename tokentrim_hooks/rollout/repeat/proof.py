"""The proof that a call can be made twice: made again with nothing pruned, it must give what the sampler was given.

A model that skips steps and answers from a cache (MagCache, TeaCache), that retrieves, that keeps a memory bank, or
that draws random numbers gives something else, and so would a regenerated chunk: its difference would not be the
prune's. A GPU's kernels may differ in rounding from call to call; that is no such thing, and is told from it by a
second replay: noise differs again, by as much, and is small; what the model keeps does not, or is not.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks.errors import UnsupportedContextError
from tokentrim_hooks.rollout.repeat.counters import Changes, Counters
from tokentrim_hooks.rollout.repeat.keepers import is_ours
from tokentrim_hooks.rollout.repeat.recall import Course, Recall
from tokentrim_hooks.rollout.repeat.snapshot import Snapshot

_logger = logging.getLogger(__name__)

ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Differences that mean nothing, by the coarsest type in which the model computes; of the output's largest value."""
NOISE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Differences that kernels which are not deterministic may make, after they went through all layers."""
SPREAD = 4
"""Noise differs from the first output by as much as two replays differ from one another, up to this factor."""

SHORT = "The cache is too large to be put back, and this video may go on otherwise than unpatched: make it anew."
"""Said beside a refusal, where repeated calls have written what no copy was made of."""


class NullReplay:
    """A call made again with nothing pruned, and once more where the bits differ: what that shows.

    Where the first replay has moved counts on, they are put back before each of the further ones.

    Args:
        module: the denoiser.
        again: makes the call and returns its x0.
        recall, courses: what is known of its counts, and what they were before each call that ``again`` makes.

    Attributes:
        counts: whether it has shown that the model counts its calls.
    """

    def __init__(
        self, module: object, again: Callable[[], Tensor], recall: Recall, courses: list[Course | None]
    ) -> None:
        self._module, self._again, self._recall, self._courses = module, again, recall, courses
        self._before: Snapshot | None = None
        self._one: Tensor | None = None
        self.counts = False

    def remember(self, prediction: Tensor, *kept: Any) -> None:
        """Before the first call: what the sampler was given, and what the model keeps.

        Args:
            prediction: the sampler's own x0. kept: arguments and output of the call, which may keep something, too.
        """
        self._first = prediction.detach().clone()
        self._counters = Counters(self._module)
        self._before = Snapshot(self._module, *kept)
        self._inputs = dict(_named(kept[:-1]))
        require_winding(self._counters.lasting())

    @contextmanager
    def undone_if_refused(self) -> Iterator[None]:
        """Whatever ends this in an exception, the model is as it was remembered."""
        try:
            yield
        except BaseException as failure:
            if self._before is not None:
                self._before.put_back()
                # Of what counts in place (itertools.count) that has kept the reference only.
                self._counters.put_back()
                if isinstance(failure, UnsupportedContextError) and self._before.is_short():
                    failure.args = (f"{failure} {SHORT}",)  # itself: ranks know the one that they have agreed on
            raise

    @property
    def is_undone(self) -> bool:
        """Whether all that calls have written was small enough to be put back."""
        return self._before is not None and not self._before.is_short()

    def put_back(self) -> None:
        """Another call was made meanwhile, which is none of those that are compared: all is as it was remembered."""
        if self._before is not None:  # else nothing could be remembered, which is told elsewhere
            self._before.put_back()
            self._counters.put_back()

    def same(self) -> bool:
        """Make the call; whether that has shown all, else it is to be made once more. The host is read once.

        Raises:
            UnsupportedContextError: it gave something else, or the model counts its calls where nobody can put it back.
        """
        made = self._again().detach().clone()
        if self._one is not None:
            self._require_noise(self._one, made)
            return True
        first = self._first
        memory = self._before.moved() if self._before is not None else {}
        measured = torch.stack([_apart(first, made), first.abs().amax().float(), *memory.values()]).tolist()
        (self._moved, self._scale), moved = measured[:2], dict(zip(memory, measured[2:], strict=True))
        self._counted = self._counters.put_back()
        if self._counted and not self.counts and self._recall.adopts(self._module, self._counted, self._courses):
            self.counts = True
            if self._before is not None:
                self._before.put_back()  # what it keeps beside its counts, which another call may have read and written
            return False
        if self._moved == 0:
            require_uncounted(self._counted)
        if not self._counted:
            noise = NOISE[coarsest(self._module, first)]
            require_still(sorted(name for name, distance in moved.items() if not distance <= noise))
        self._one = made
        return bool(self._moved == 0)

    def _require_noise(self, one: Tensor, two: Tensor) -> None:
        """The bits differ, here or on another rank: raise UnsupportedContextError if by more than rounding."""
        spread = torch.stack([_apart(self._first, two), _apart(one, two)]).tolist()
        measured = (self._moved, *spread)
        if self._counted or not is_noise(measured, self._scale, coarsest(self._module, self._first)):
            self._require_own_inputs()
            require_uncounted(Changes(settings=self._counted.settings))
            raise UnsupportedContextError(_words(measured, self._scale, self._module))
        require_uncounted(self._counters.put_back())
        _logger.info("kernels differ from call to call by %.1e, which counts as rounding", max(measured) / self._scale)

    def _require_own_inputs(self) -> None:
        before = self._before
        written = [name for name, part in self._inputs.items() if before is not None and before.writes_to(part)]
        require_unwritten(self._module, written)


def require_repeated(module: object, counters: Counters) -> None:
    """Raise UnsupportedContextError if a replay has changed what it was called with, or what the model counts.

    Asked at every replay, for such a thing may be switched on at any time.
    """
    changed = counters.put_back()
    require_unwritten(module, ["(the noisy latents)"] if counters.written() else [])
    require_uncounted(changed)


def require_unwritten(module: object, written: list[str]) -> None:
    """Raise UnsupportedContextError if calls have ``written`` into what they were given, which is all there is."""
    if not written:
        return
    hooks = getattr(module, "_forward_pre_hooks", {}).values()
    names = [str(getattr(hook, "__qualname__", type(hook).__name__)) for hook in hooks if not is_ours(hook)]
    by = f", by hook {names[0]}" if names else ""
    raise UnsupportedContextError(
        f"a call changes its argument {written[0]} in place{by}: made again it is given what is left.\n"
        "Return a new tensor there, or override Adapter.replay."
    )


def require_uncounted(changed: Changes) -> None:
    """Raise UnsupportedContextError if a replay has ``changed`` what the model counts or is set to, put back since.

    A model that counts its calls (TeaCache and its kind) takes the repeated call for the next one.
    """
    if changed.counts:
        raise UnsupportedContextError(
            f"the model counts its calls ({', '.join(changed.counts[:4])}), so that a chunk cannot be regenerated: the "
            "repeated call would count as the next one. Switch off what counts (TeaCache, MagCache), or override "
            "Adapter.replay"
        )
    if changed.settings:
        raise UnsupportedContextError(
            f"a setting ({', '.join(changed.settings[:2])}) is another one after a repeated call, so another model "
            "made it.\nFuse, or switch a backend or mode, between two calls; leave out what alternates in each."
        )


def require_still(changed: list[str]) -> None:
    """Raise UnsupportedContextError if a replay has changed a memory of the model's, of which a later call may read.

    Args:
        changed: its names.
    """
    if changed:
        raise UnsupportedContextError(
            f"the model keeps a memory ({', '.join(changed[:2])}) that a repeated call changes once more.\n"
            "Switch off what keeps something (retrieval, running means), or override Adapter.replay."
        )


def require_winding(lasting: list[str]) -> None:
    """Raise UnsupportedContextError if the model keeps something that cannot be put back, before a call moves it."""
    if lasting:
        raise UnsupportedContextError(
            f"the model keeps an iterator ({', '.join(lasting[:2])}) that may count calls and cannot be put back.\n"
            "Count in a number or in itertools.count, or override Adapter.replay."
        )


def is_noise(measured: tuple[float, ...], scale: float, dtype: torch.dtype) -> bool:
    """Whether the differences first-to-one, first-to-two and one-to-two come from rounding in ``dtype`` alone."""
    one, two, spread = measured
    if max(one, two) <= ROUNDING[dtype] * scale:
        return True
    return max(one, two) <= NOISE[dtype] * scale and min(one, two) <= SPREAD * spread


def coarsest(module: object, *tensors: Tensor) -> torch.dtype:
    """The coarsest floating type that a model computes in, as far as its tensors and torch's settings show."""
    device = tensors[0].device.type
    kinds = {tensor.dtype for tensor in tensors}
    parts = (
        [module] if isinstance(module, nn.Module) else [p for p in vars(module).values() if isinstance(p, nn.Module)]
    )
    kinds |= {parameter.dtype for part in parts for parameter in part.parameters()}
    if torch.is_autocast_enabled(device):
        kinds.add(torch.get_autocast_dtype(device))
    if device == "cuda" and torch.float32 in kinds and torch.get_float32_matmul_precision() != "highest":
        kinds.add(torch.float16)  # TF32 has as many bits
    if any(kind.is_floating_point and kind.itemsize == 1 for kind in kinds):
        kinds.add(torch.bfloat16)  # what fp8 weights are computed in
    return max(kinds & set(NOISE), key=lambda kind: NOISE[kind], default=torch.float32)


class RandomStreamKept:
    """Whatever is drawn meanwhile from the generators that are everybody's, they go on as if nothing had been.

    No generator function as ``torch.random.fork_rng`` is: one in which Ctrl-C comes as it begins puts its states back
    when its traceback is forgotten, which may be amid another video.

    Args:
        device: where the model draws, beside the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = None if device.type in ("cpu", "meta") else getattr(torch, device.type)

    def __enter__(self) -> None:
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        self._there = None if self._own is None else self._own.get_rng_state(*self._place)

    def __exit__(self, *failure: object) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            self._own.set_rng_state(self._there, *self._place)

    @property
    def _place(self) -> tuple[torch.device, ...]:
        """Which device of its kind; of Apple's there is one."""
        return () if self._device.type == "mps" else (self._device,)


def _named(things: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors among the arguments of calls and in dicts there, by name. Not those in lists, which are a cache's."""
    for thing in things:
        for name, part in thing.items() if isinstance(thing, dict) else enumerate(thing):
            if isinstance(part, Tensor):
                yield f"{path}{name}", part
            elif isinstance(part, dict):
                yield from _named([part], f"{path}{name}.")


def _apart(one: Tensor, other: Tensor) -> Tensor:
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide) - other.to(wide)).abs().amax().float()


def _words(measured: tuple[float, ...], scale: float, module: object) -> str:
    moved, spread = max(measured[:2]), measured[2]
    how = "never alike" if spread else "each time alike"
    parts = module.modules() if isinstance(module, nn.Module) else ()
    if any(isinstance(part, nn.Dropout) and part.training and part.p for part in parts):
        way = "Switch the model to eval(), for its dropout is on"
    else:
        way = "Switch off what keeps something or draws (MagCache, TeaCache, retrieval, memory, dropout)"
    return (
        f"made again with nothing pruned, the call's output moved by {moved:.2g} of {scale:.2g}, {how}.\n"
        f"{way}, or override Adapter.replay."
    )
