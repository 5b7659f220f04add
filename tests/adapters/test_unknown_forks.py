"""Forks of Self-Forcing that nobody has looked at: recognised by structure and proved, or refused with the reason."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokentrim_hooks as tokentrim
from tokentrim_hooks import TokenTrimWarning, UnsupportedContextError, UnsupportedModelError, defaults_of
from tokentrim_hooks.testing import ForcedPolicy

HOME = "unknown_fork"
"""Name of the Python module that the fork's attention lives in."""
TOKENS, WIDTH, HEADS, CHANNELS, SIZE = 4, 16, 2, 4, (4, 4)
DEAD = [1, 2]


class SelfAttention(nn.Module):
    """Attention over a cache that is never full; ``sees`` is the attention function that it calls."""

    sink_size, local_attn_size = 0, -1

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, kv_cache: dict[str, Any], current_start: int) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)) for part in self.qkv(x).chunk(3, -1))
        end = current_start + x.shape[1]
        kv_cache["k"][:, current_start:end], kv_cache["v"][:, current_start:end] = k, v
        kv_cache["global_end_index"].fill_(end)
        kv_cache["local_end_index"].fill_(end)
        keys, values = kv_cache["k"][:, :end].to(q.dtype), kv_cache["v"][:, :end].to(q.dtype)
        return x + self.o(self.attend(q, keys, values).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sys.modules[HOME].attention(q, k, v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Model(nn.Module):
    patch_size = (1, 2, 2)

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.inwards, self.outwards = nn.Linear(4 * CHANNELS, WIDTH), nn.Linear(WIDTH, 4 * CHANNELS)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.self_attn = attention()

    def forward(self, latents: Tensor, kv_cache: Any, current_start: int) -> Tensor:
        cells = nn.functional.pixel_unshuffle(latents.flatten(0, 1), 2).flatten(2).transpose(1, 2)
        x = self.inwards(cells).reshape(latents.shape[0], -1, WIDTH)
        for block, layer in zip(self.blocks, kv_cache, strict=True):
            x = block.self_attn(x, layer, current_start)
        grid = self.outwards(x).reshape(-1, TOKENS, 4 * CHANNELS).transpose(1, 2).unflatten(2, (2, 2))
        return nn.functional.pixel_shuffle(grid, 2).reshape(latents.shape)


class Fork(nn.Module):
    """A generator wrapper with Self-Forcing's signature."""

    attention: type[nn.Module] = SelfAttention

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Model(self.attention).requires_grad_(False)

    def forward(
        self, noisy_image_or_video: Tensor, conditional_dict: Any, timestep: Tensor, kv_cache: Any = None,
        crossattn_cache: Any = None, current_start: int | None = None, cache_start: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x0 = self.model(noisy_image_or_video, kv_cache, current_start or 0)
        return noisy_image_or_video - x0, x0


def cache_of(dtype: torch.dtype = torch.float32, **more: Any) -> list[dict[str, Any]]:
    def layer() -> dict[str, Any]:
        shape = (1, 8 * TOKENS, HEADS, WIDTH // HEADS)
        indices = {"global_end_index": torch.tensor([0]), "local_end_index": torch.tensor([0])}
        return {"k": torch.zeros(shape, dtype=dtype), "v": torch.zeros(shape, dtype=dtype), **indices, **more}

    return [layer(), layer()]


def rollout(generator: nn.Module, cache: Any) -> Tensor:
    """Four chunks of two frames: two denoising steps, then a commit."""
    torch.manual_seed(1)
    chunks = []
    for start in range(0, 8, 2):
        x0 = torch.randn(1, 2, CHANNELS, *SIZE)
        for step in (1000, 500):
            _, x0 = generator(x0 + 0.1, {}, torch.full((1, 2), step), cache, None, start * TOKENS)
        generator(x0, {}, torch.zeros(1, 2), cache, None, start * TOKENS)
        chunks.append(x0)
    return torch.cat(chunks, dim=1)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = types.ModuleType(HOME)
    module.attention = plain_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, HOME, module)
    monkeypatch.setattr(SelfAttention, "__module__", HOME)
    yield module


def test_fork_without_news_is_recognised_and_proves_itself() -> None:
    fork = Fork()
    plain = rollout(fork, cache_of())
    with tokentrim.patch(fork, ForcedPolicy({2: DEAD})) as handle:
        pruned = rollout(fork, cache_of())
    assert handle.adapter.name == "self-forcing"
    assert [record.pruned for record in handle.report] == [False, False, True, False]
    assert float((pruned - plain).abs().max()) > 1e-4


def test_unknown_parameter_is_refused() -> None:
    class Steered(Fork):
        def forward(self, *args: Any, kv_bias: float = 1.0, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Explicit(Fork):
        def forward(  # type: ignore[override]
            self, noisy_image_or_video: Tensor, conditional_dict: Any, timestep: Tensor, kv_cache: Any,
            crossattn_cache: Any, current_start: int, kv_bias: float = 1.0,
        ) -> Any:  # fmt: skip
            return super().forward(
                noisy_image_or_video, conditional_dict, timestep, kv_cache, crossattn_cache, current_start
            )

    with pytest.raises(UnsupportedModelError, match="self-forcing: the generator's forward takes kv_bias"):
        tokentrim.patch(Explicit())
    with pytest.raises(UnsupportedModelError, match="self-forcing: the generator's forward lacks noisy_image_or_video"):
        tokentrim.patch(Steered())


class Featured(Fork):
    """One-Forcing's and Self-Forcing-Plus's further parameters, all optional."""

    def forward(  # type: ignore[override]
        self, noisy_image_or_video: Tensor, conditional_dict: Any, timestep: Tensor, kv_cache: Any = None,
        crossattn_cache: Any = None, current_start: int | None = None, cache_start: int | None = None,
        clip_fea: Tensor | None = None, y: Tensor | None = None, discriminator_features: bool = False,
        return_features: bool = False, features_only: bool = False, feature_layers: tuple[int, ...] = (),
    ) -> Any:  # fmt: skip
        return super().forward(
            noisy_image_or_video, conditional_dict, timestep, kv_cache, crossattn_cache, current_start
        )


def test_switches_of_forks_may_stay_at_their_defaults() -> None:
    """Then the fork is its base, to the bit, pruned or not."""
    videos = []
    for fork in (Fork(), Featured()):
        with tokentrim.patch(fork, ForcedPolicy({2: DEAD})) as handle:
            videos.append(rollout(fork, cache_of()))
        assert handle.adapter.name == "self-forcing" and [r.pruned for r in handle.report][2]
    assert torch.equal(*videos)


GIVEN = {"clip_fea": torch.ones(1), "y": torch.ones(1), "return_features": True, "feature_layers": (1,)}


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_a_switch_that_a_call_gives_is_refused(name: str) -> None:
    fork, start = Featured(), (torch.zeros(1, 2, CHANNELS, *SIZE), {}, torch.full((1, 2), 500.0))
    with tokentrim.patched(fork):
        fork(*start, cache_of(), None, 0, **{name: defaults_of(fork)[name]})
        with pytest.raises(UnsupportedContextError, match=rf"called with {name}=.*\.\nLeave it at its default"):
            fork(*start, cache_of(), None, 0, **{name: GIVEN[name]})


class Dragged(Fork):
    """DragStream's parameter, which nobody has listed: off by default."""

    def forward(  # type: ignore[override]
        self, noisy_image_or_video: Tensor, conditional_dict: Any, timestep: Tensor, kv_cache: Any = None,
        crossattn_cache: Any = None, current_start: int | None = None, model_config: Any = None,
    ) -> Any:  # fmt: skip
        return super().forward(noisy_image_or_video, conditional_dict, timestep, kv_cache, current_start=current_start)


def test_what_is_off_by_default_may_stay_so() -> None:
    videos, start = [], (torch.zeros(1, 2, CHANNELS, *SIZE), {}, torch.full((1, 2), 500.0))
    for fork in (Fork(), Dragged()):
        with tokentrim.patch(fork, ForcedPolicy({2: DEAD})):
            videos.append(rollout(fork, cache_of()))
    assert torch.equal(*videos)
    with tokentrim.patched(fork), pytest.raises(UnsupportedContextError, match=r"model_config=.*\nLeave it at its"):
        fork(*start, cache_of(), None, 0, model_config={})


@pytest.mark.parametrize(("name", "default"), [("cache_write_idx", None), ("retrieved", None), ("kv_bias", False)])
def test_what_is_named_for_the_context_is_refused_whatever_its_default(name: str, default: Any) -> None:
    class Remembering(Fork):
        pass

    given = inspect.signature(Fork.forward)
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Fork.forward(self, *args, **kwargs)

    forward.__signature__ = given.replace(parameters=[*given.parameters.values(), extra])  # type: ignore[attr-defined]
    Remembering.forward = forward  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match=f"self-forcing: the generator's forward takes {name}"):
        tokentrim.patch(Remembering())


def test_a_switch_that_must_be_given_is_refused() -> None:
    class Required(Fork):
        def forward(  # type: ignore[override]
            self, noisy_image_or_video: Tensor, conditional_dict: Any, timestep: Tensor, y: Tensor,
            kv_cache: Any = None, crossattn_cache: Any = None, current_start: int | None = None,
        ) -> Any:  # fmt: skip
            return super().forward(noisy_image_or_video, conditional_dict, timestep, kv_cache)

    with pytest.raises(UnsupportedModelError, match="self-forcing: the generator's forward takes y, which"):
        tokentrim.patch(Required())


def test_a_refusal_shows_the_nearest_adapter_and_what_differs() -> None:
    """The one that lacks least comes first; all reasons are in ``detect``."""

    class Biased(Fork):
        def forward(  # type: ignore[override]
            self, noisy_image_or_video: Tensor, conditional_dict: Any, timestep: Tensor, kv_cache: Any,
            crossattn_cache: Any, current_start: int, kv_bias: float = 1.0,
        ) -> Any:  # fmt: skip
            return super().forward(noisy_image_or_video, conditional_dict, timestep, kv_cache)

    with pytest.raises(UnsupportedModelError) as caught:
        tokentrim.patch(Biased())
    happened, todo = str(caught.value).splitlines()
    assert "tokentrim.detect(model)" in todo and len(tokentrim.detect(Biased())) > 10
    says = "; nearest adapter, self-forcing: the generator's forward takes kv_bias, which Self-Forcing's does not."
    assert happened.endswith(says)


@pytest.mark.parametrize("more", [{"ring_head": 0}, {"quantized": False, "scales": None}])
def test_unknown_cache_entries_are_refused_before_anything_is_marked(more: dict[str, Any]) -> None:
    fork, cache = Fork(), cache_of(**more)
    with tokentrim.patched(fork, ForcedPolicy({2: DEAD})), pytest.raises(UnsupportedContextError, match=min(more)):
        rollout(fork, cache)
    assert all(bool(layer["v"].isfinite().all()) for layer in cache)


class LongFork(Fork):
    """A generator wrapper with LongLive's signature."""

    def forward(  # type: ignore[override]
        self, noisy_image_or_video: Tensor, conditional_dict: Any, timestep: Tensor, kv_cache: Any = None,
        crossattn_cache: Any = None, current_start: int | None = None, cache_start: int | None = None,
        sink_recache_after_switch: bool = False,
    ) -> Any:  # fmt: skip
        return super().forward(
            noisy_image_or_video, conditional_dict, timestep, kv_cache, crossattn_cache, current_start
        )


@pytest.mark.parametrize(("method", "words"), [("eviction", ""), ("cluster", "compression_method='cluster' is not")])
def test_other_ways_of_making_memory_than_memrope_has_are_refused(method: str, words: str) -> None:
    """Its adapter says that memory is kept right, so nobody accounts for keys; it cannot for ways unknown to it."""

    class Compressing(SelfAttention):
        compression_method, ema_adaptive = method, False

    fork = type("MemoryFork", (LongFork,), {"attention": type("Compressing", (Compressing,), {"__module__": HOME})})()
    assert [found.adapter for found in tokentrim.detect(fork) if found.matches] == ["memrope"]
    with pytest.raises(UnsupportedContextError, match=words) if words else contextlib.nullcontext():
        tokentrim.patch(fork).unpatch()


class LazyTensor:
    """A cache's own kind of rows."""


@pytest.mark.parametrize("kind", (Fork, LongFork))
@pytest.mark.parametrize(
    ("layer", "odd"),
    [
        ({"heads": [], "sink": 1}, "differs in: global_end_index, heads"),
        ({**cache_of()[0], "v": LazyTensor()}, "holds LazyTensor where a tensor"),
        ([cache_of()[0]], "no list of dicts"),
    ],
    ids=("per head", "an object", "lists"),
)
def test_other_caches_are_refused_at_the_first_call(kind: type[Fork], layer: Any, odd: str) -> None:
    """Also where nothing is pruned, and also through LongLive's adapter."""
    fork = kind()
    with tokentrim.patched(fork) as handle, pytest.raises(UnsupportedContextError, match=odd):
        fork(torch.zeros(1, 2, CHANNELS, *SIZE), {}, torch.full((1, 2), 500.0), [layer, layer], None, 0)
    assert handle.adapter.name == ("longlive" if kind is LongFork else "self-forcing")


def test_missing_cache_entries_are_refused() -> None:
    fork, cache = Fork(), cache_of()
    for layer in cache:
        del layer["local_end_index"]
    with tokentrim.patched(fork), pytest.raises(UnsupportedContextError, match="local_end_index"):
        rollout(fork, cache)


def test_quantised_cache_is_refused_at_the_first_prune() -> None:
    fork, cache = Fork(), cache_of(torch.int8)
    with (
        tokentrim.patched(fork, ForcedPolicy({2: DEAD})),
        pytest.raises(UnsupportedContextError, match=r"torch\.int8.*unquantised"),
    ):
        rollout(fork, cache)


def test_on_error_warn_loses_no_video() -> None:
    fork = Fork()
    plain = rollout(fork, cache_of())
    with (
        pytest.warns(TokenTrimWarning, match="ring_head"),
        tokentrim.patched(fork, ForcedPolicy({2: DEAD}), on_error="warn"),
    ):
        assert torch.equal(rollout(fork, cache_of(ring_head=0)), plain)


def test_attention_that_goes_another_way_fails_the_self_check() -> None:
    """The structure fits, but the layers do not call the function that is tapped: noticed, undone, said."""
    fork = Fork()
    for block in fork.model.blocks:
        block.self_attn.attend = plain_attention
    plain = rollout(fork, cache_of())
    with (
        pytest.warns(TokenTrimWarning, match="0 of 2 attention calls tapped"),
        tokentrim.patched(fork, ForcedPolicy({2: DEAD})) as handle,
    ):
        assert torch.equal(rollout(fork, cache_of()), plain)
    assert "self-check failed" in " ".join(handle.report.records[2].notes)


@pytest.mark.parametrize(
    ("mark", "relative"),
    [("incremental_update", "Reward-Forcing"), ("fuse_projections", "Krea"), ("block_relativistic_rope", "Infinity")],
)
def test_each_bent_rule_has_one_adapter(home: types.ModuleType, mark: str, relative: str) -> None:
    """What betrays a relative takes the model away from Self-Forcing's adapter, and gives it to exactly one other."""
    fork = Fork()
    if mark == "block_relativistic_rope":
        home.block_relativistic_rope = print  # type: ignore[attr-defined]
    else:
        for block in fork.model.blocks:
            setattr(block.self_attn, mark, lambda *_: None)
    found = {item.adapter: item for item in tokentrim.detect(fork)}
    assert relative in found["self-forcing"].reason
    assert len([item for item in found.values() if item.matches]) == 1


# ------------------------------------------------------------------------------------------ looked at, and refused


class MatrixGame3(nn.Module):
    def forward(self, x, t, context, seq_len, x_memory=None, plucker_emb=None, memory_latent_idx=None): ...


class MatrixGame3InFastVideo(nn.Module):
    def forward(self, hidden_states, x_memory=None, c2ws_plucker_emb=None, memory_latent_idx=None, **kwargs): ...


class DreamXWorld(nn.Module):
    def forward(self, x=None, t=None, y_camera=None, kv_cache=None, cache_update_policy="commit_detached"): ...


class WorldPlayWan(nn.Module):
    def forward(self, hidden_states, timestep, kv_cache=None, is_cache=False, viewmats=None, Ks=None): ...


class WorldPlayHunyuan(nn.Module):
    def forward(self, bi_inference=True, ar_txt_inference=False, ar_vision_inference=False, **kwargs): ...


@pytest.mark.parametrize("holder", ["", "model", "transformer", "stages"])
@pytest.mark.parametrize(
    "kind, name",
    [(MatrixGame3, "Matrix-Game 3"), (WorldPlayWan, "HY-WorldPlay"), (WorldPlayHunyuan, "HY-WorldPlay"),
     (MatrixGame3InFastVideo, "Matrix-Game 3"), (DreamXWorld, "DreamX-World")],
)  # fmt: skip
def test_models_that_were_looked_at_are_refused_by_name(kind, name, holder):
    model = types.SimpleNamespace(**{holder: kind()}) if holder else kind()
    if holder == "stages":
        model.stages = [types.SimpleNamespace(), types.SimpleNamespace(transformer=model.stages)]
    with pytest.raises(tokentrim.UnsupportedModelError, match=f"this is {name}"):
        tokentrim.patch(model)
