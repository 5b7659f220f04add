"""A fork that puts methods of its own into a model that is recognised: refused by name, before and after the patch.

As TetherCache does: it wraps the generator's forward, which is seen through, and exchanges that of every layer, whose
cache holds another memory from then on.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import pytest
import torch
from test_unknown_forks import DEAD, HOME, Fork, SelfAttention, cache_of, home, plain_attention, rollout
from torch import Tensor, nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks import TokenTrimWarning, UnsupportedContextError, UnsupportedModelError
from tokentrim_hooks.testing import ForcedPolicy

assert home  # the fixture that gives the fork's attention a namespace

POLICY = ForcedPolicy({2: DEAD})
WORDS = r"self attention's forward was replaced by .*tethered"


def tethered(self: Any, x: Tensor, kv_cache: dict[str, Any], current_start: int) -> Tensor:
    """A layer's forward written anew, which calls the very attention that is tapped."""
    q, k, v = (part.unflatten(2, (2, -1)) for part in self.qkv(x).chunk(3, -1))
    end = current_start + x.shape[1]
    kv_cache["k"][:, current_start:end], kv_cache["v"][:, current_start:end] = k, v
    kv_cache["global_end_index"].fill_(end)
    kv_cache["local_end_index"].fill_(end)
    seen = sys.modules[HOME].attention(q, kv_cache["k"][:, :end], kv_cache["v"][:, :end])
    return x + self.o(seen.flatten(2))


def install(generator: Fork) -> None:
    """As ``install_tethercache``: no undo."""
    inner = generator.forward

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    generator.forward = types.MethodType(wrapped, generator)  # type: ignore[method-assign]
    for block in generator.model.blocks:
        block.self_attn.forward = types.MethodType(tethered, block.self_attn)


def marks(cache: list[dict[str, Any]]) -> int:
    return sum(int(layer["v"].isinf().sum()) for layer in cache)


def test_before_the_patch_it_is_refused_by_name() -> None:
    generator = Fork()
    install(generator)
    with pytest.raises(UnsupportedModelError, match=WORDS):
        tokentrim.patch(generator)


def test_so_is_one_that_exchanges_the_class_s_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelfAttention, "forward", tethered)
    with pytest.raises(UnsupportedModelError, match=WORDS):
        tokentrim.patch(Fork())


@pytest.mark.parametrize("chunks", (0, 1), ids=("before a call", "after a prune"))
def test_after_the_patch_the_first_call_refuses_it(chunks: int) -> None:
    generator, cache = Fork(), cache_of()
    with tokentrim.patched(generator, POLICY):
        if chunks:
            rollout(generator, cache)
        install(generator)
        with pytest.raises(UnsupportedContextError, match=rf"(?s){WORDS} after the patch.*write an adapter"):
            rollout(generator, cache_of())
    assert not marks(cache)


def test_after_the_patch_with_warn_the_video_is_the_fork_s_own() -> None:
    generator, cache = Fork(), cache_of()
    with (
        pytest.warns(TokenTrimWarning, match=WORDS),
        tokentrim.patched(generator, POLICY, on_error="warn") as handle,
    ):
        install(generator)
        video = rollout(generator, cache)
    assert torch.equal(video, rollout(generator, cache_of())) and not marks(cache) and not handle.report.triggers


def handed_on(layer: nn.Module) -> None:
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # type: ignore[method-assign]


def handed_on_by_partial(layer: nn.Module) -> None:
    """As accelerate does."""
    inner = layer.forward
    layer.forward = functools.update_wrapper(  # type: ignore[method-assign]
        functools.partial(lambda _, *args, **kwargs: inner(*args, **kwargs), layer), inner
    )


@pytest.mark.parametrize("wrap", (handed_on, handed_on_by_partial))
@pytest.mark.parametrize("late", (False, True), ids=("before the patch", "after it"))
def test_what_only_wraps_a_layer_is_no_fork(wrap: Any, late: bool) -> None:
    """The video is the one that a model gives which nobody has wrapped."""
    videos = []
    for wraps in (False, True):
        generator = Fork()
        for block in generator.model.blocks if wraps and not late else ():
            wrap(block.self_attn)
        with tokentrim.patched(generator, POLICY) as handle:
            for block in generator.model.blocks if wraps and late else ():
                wrap(block.self_attn)
            videos.append(rollout(generator, cache_of()))
        assert handle.report.triggers
    assert torch.equal(*videos)


def test_a_name_in_the_attention_s_module_may_be_exchanged_before_the_patch(home: types.ModuleType) -> None:
    """``install_*`` of another kernel: what the layers call by name is what is tapped."""
    called = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        called.append(k.shape[1])
        return plain_attention(q, k, v)

    home.attention = kernel  # type: ignore[attr-defined]
    generator = Fork()
    with tokentrim.patched(generator, POLICY) as handle:
        rollout(generator, cache_of())
    assert handle.report.triggers and min(called) < max(called)
