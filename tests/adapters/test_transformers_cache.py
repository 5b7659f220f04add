"""An autoregressive latent-video denoiser over a real transformers decoder, patched by way of its ``Cache``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokentrim_hooks_adapters.transformers_cache import TransformersCacheAdapter, cache_rows
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokentrim_hooks as tokentrim
from tokentrim_hooks import Adapter, CacheRows, Call, Match, NoMatch
from tokentrim_hooks.patching.patches import Patches
from tokentrim_hooks.testing.policies import ForcedPolicy

torch.set_num_threads(1)
CHUNKS, FRAMES, HEIGHT, WIDTH, TOKENS = 5, 2, 6, 8, 12
NEW = FRAMES * TOKENS
DEAD, AT = (1, 4, 9), 3


def decoder(attention: str = "sdpa", **options: Any) -> LlamaModel:
    """2 layers, 4 heads that share 2 of K and V; every parameter random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CHUNKS * NEW, **options,
    )  # fmt: skip
    config._attn_implementation = attention
    model = LlamaModel(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1)
    return model.eval().requires_grad_(False)


class LatentVideo(nn.Module):
    """The author's model: a chunk of latents in, x0 out; the decoder sees earlier chunks through its cache."""

    def __init__(self, attention: str = "sdpa", cache: str = "dynamic") -> None:
        super().__init__()
        self.decoder, self.kind = decoder(attention), cache
        self.embed, self.head = nn.Linear(16, 32), nn.Linear(32, 16)
        self.requires_grad_(False)

    def new_cache(self) -> Any:
        """An empty cache of the kind under test."""
        config = self.decoder.config
        if self.kind == "static":
            return StaticCache(config=config, max_cache_len=CHUNKS * NEW)
        return QuantizedCache("fp8", config) if self.kind == "fp8" else DynamicCache(config=config)

    def forward(self, latents: Tensor, timestep: Tensor, past_key_values: Any, start: int, commit: bool) -> Tensor:
        """latents ``[B, F, 4, H, W]``; unless ``commit``, the rows of this call are taken off the cache again."""
        b, f, c, h, w = latents.shape
        tokens = latents.view(b, f, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, f * TOKENS, 16)
        hidden = self.decoder(
            inputs_embeds=self.embed(tokens) + timestep.view(-1, 1, 1),
            past_key_values=past_key_values,
            attention_mask=self.block_mask(past_key_values, start),
        ).last_hidden_state
        if not commit:
            self.take_back(past_key_values)
        out = self.head(hidden).view(b, f, h // 2, w // 2, c, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        return out.reshape(latents.shape)

    def block_mask(self, cache: Any, start: int) -> Tensor:
        """All keys up to the end of the chunk are seen; rows of a static cache behind them are not."""
        stop = start * TOKENS + NEW
        keys = CHUNKS * NEW if self.kind == "static" else stop
        mask = torch.zeros(1, 1, NEW, keys)
        mask[..., stop:] = torch.finfo(torch.float32).min
        return mask

    def take_back(self, cache: Any) -> None:
        """Undo the append of one call."""
        for layer in cache.layers:
            if self.kind == "dynamic":
                layer.crop(-NEW)
                continue
            layer.cumulative_length -= NEW
            if self.kind == "fp8":
                for name in ("_quantized_keys", "_quantized_values"):
                    rows, scale = getattr(layer, name)
                    setattr(layer, name, (rows[:, :, :-NEW], scale))


@torch.no_grad()
def generate(model: LatentVideo, seed: int = 0, batch: int = 1) -> Tensor:
    """3 denoising steps per chunk, then the finished chunk is written into the cache."""
    torch.manual_seed(seed)
    cache, video = model.new_cache(), []
    for chunk in range(CHUNKS):
        x = torch.randn(batch, FRAMES, 4, HEIGHT, WIDTH)
        for sigma in (1.0, 0.7, 0.4):
            x0 = model(x, torch.full((batch,), sigma), cache, chunk * FRAMES, commit=False)
            x = (1 - sigma / 2) * x0 + sigma / 2 * torch.randn_like(x)
        model(x0, torch.zeros(batch), cache, chunk * FRAMES, commit=True)
        video.append(x0)
    return torch.cat(video, dim=1)


class LatentVideoAdapter(TransformersCacheAdapter):
    """What the author writes: under 20 lines."""

    name = "latent-video"

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        return Match(model, (2, 2)) if isinstance(model, LatentVideo) else NoMatch("no LatentVideo")

    def decoder(self, model: LatentVideo) -> nn.Module:
        return model.decoder

    def parse(self, arguments: Mapping[str, Any]) -> Call:
        commit, timestep = arguments["commit"], arguments["timestep"]
        return Call(arguments["latents"], arguments["start"], 0, timestep, commit, arguments)

    def context(self, call: Call) -> CacheRows:
        return cache_rows(call.arguments["past_key_values"], TOKENS, anchors=TOKENS)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    info = tokentrim.AdapterInfo("latent-video", "this test", LatentVideoAdapter)
    monkeypatch.setattr("tokentrim_hooks.handle.choice.usable_adapters", lambda: [info])


@torch.no_grad()
def reference(model: LatentVideo, seed: int = 0, mask: float = float("-inf")) -> Tensor:
    """The unpatched model, whose own mask says -inf at the dead keys: frames 1 to 5, behind the anchor frame 0."""
    twin = copy.deepcopy(model)
    native = twin.block_mask
    dead = [frame * TOKENS + token for frame in range(1, AT * FRAMES) for token in DEAD]

    def masked(cache: Any, start: int) -> Tensor:
        values = native(cache, start)
        if start >= AT * FRAMES:
            values[..., dead] = mask
        return values

    twin.block_mask = masked  # type: ignore[method-assign]
    return generate(twin, seed)


KINDS = [("sdpa", "dynamic"), ("eager", "dynamic"), ("sdpa", "static"), ("eager", "static"), ("sdpa", "fp8")]


@pytest.mark.parametrize(("attention", "cache"), KINDS)
def test_pruning_equals_the_mask(attention: str, cache: str) -> None:
    """Against a 4-D mask of -inf, to 1e-5; the trace, the dead rows, and what is left afterwards."""
    model = LatentVideo(attention, cache)
    plain, expected = generate(model), reference(model)
    native = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    with tokentrim.patch(model, ForcedPolicy({AT: DEAD})) as handle:
        actual = generate(model)
        again = generate(model)
    assert float((expected - plain).abs().max()) > 1e-3
    assert float((actual - expected).abs().max()) <= 1e-5
    assert torch.equal(actual, again)
    first, second = (list(handle.report)[n * CHUNKS : (n + 1) * CHUNKS] for n in (0, 1))
    assert [record.phases for record in first + second] == [{"first": 1, "refine": 2, "commit": 1}] * 10
    assert [record.dead for record in first] == [0, 0, 0, 5 * len(DEAD), 0]
    assert [record.video for record in second] == [1] * CHUNKS
    assert torch.equal(plain, generate(model))
    assert native == ALL_ATTENTION_FUNCTIONS._global_mapping


@dataclass(frozen=True)
class Hides(tokentrim.Policy):
    """Hides some tokens of every frame behind the anchor from calls of some phases."""

    phases: tuple[str, ...] = ()

    def hide(self, chunk: Any, context: Any) -> Any:
        mask = torch.zeros(context.frames, context.tokens, dtype=torch.bool)
        mask[1:, DEAD] = chunk.phase in self.phases
        return mask


@torch.no_grad()
def hidden_by_mask(model: LatentVideo, phases: tuple[str, ...]) -> Tensor:
    """The unpatched model, whose own mask says -inf at these keys in calls of these phases."""
    twin, calls = copy.deepcopy(model), {"number": -1}
    native = twin.block_mask

    def masked(cache: Any, start: int) -> Tensor:
        calls["number"] += 1
        values = native(cache, start)
        if ("first", "refine", "refine", "commit")[calls["number"] % 4] in phases:
            values[..., [frame * TOKENS + token for frame in range(1, start) for token in DEAD]] = float("-inf")
        return values

    twin.block_mask = masked  # type: ignore[method-assign]
    return generate(twin)


@pytest.mark.parametrize("phases", [("first",), ("refine",), ("commit",), ("first", "refine", "commit")])
@pytest.mark.parametrize(("attention", "cache"), KINDS[:-1])
def test_hiding_equals_the_mask(attention: str, cache: str, phases: tuple[str, ...]) -> None:
    """A dynamic cache makes its tensors anew in every call: the marks come off the copies that it keeps."""
    model = LatentVideo(attention, cache)
    plain, expected = generate(model), hidden_by_mask(model, phases)
    with tokentrim.patch(model, Hides(phases)) as handle:
        actual = generate(model)
    assert float((expected - plain).abs().max()) > 1e-4
    assert float((actual - expected).abs().max()) <= 1e-5
    assert any(act["hook"] == "hide" for record in handle.report for act in record.acts)
    assert torch.equal(plain, generate(model))


def test_fp8_can_be_pruned_but_not_hidden_from() -> None:
    model = LatentVideo("sdpa", "fp8")
    plain = generate(model)
    with tokentrim.patch(model, Hides(("first",))), pytest.raises(tokentrim.UnsupportedContextError, match="float8"):
        generate(model)
    assert torch.equal(plain, generate(model))


@pytest.mark.parametrize(("attention", "cache"), KINDS)
def test_observing_changes_no_bit(attention: str, cache: str) -> None:
    model = LatentVideo(attention, cache)
    plain, state = generate(model), torch.get_rng_state()
    with tokentrim.patch(model, tokentrim.ObservePolicy()):
        assert torch.equal(plain, generate(model))
    assert torch.equal(state, torch.get_rng_state())


def test_samples_are_pruned_apart() -> None:
    """Only sample 1 is flagged."""
    model = LatentVideo()
    plain = generate(model, batch=2)
    with tokentrim.patch(model, ForcedPolicy({AT: DEAD}, samples=(1,))):
        pruned = generate(model, batch=2)
    assert float((plain[0] - pruned[0]).abs().max()) < 1e-5
    assert float((plain[1] - pruned[1]).abs().max()) > 1e-3


def test_another_decoder_of_the_process_is_left_alone() -> None:
    """The attention function is shared by all models of the process; only calls of the patched one are pruned."""
    model, other = LatentVideo(), LatentVideo()
    plain = generate(other)
    with tokentrim.patch(model, ForcedPolicy({AT: DEAD})):
        pruned = generate(model)
        assert torch.equal(plain, generate(other))
    assert not torch.equal(plain, pruned)


def test_layers_that_cannot_hold_marks_are_refused() -> None:
    """Sliding layers and integer quantisation, each with what to do."""
    sliding = DynamicCache()
    sliding.layers = [_sliding()]
    with pytest.raises(tokentrim.UnsupportedContextError, match="sliding"):
        cache_rows(sliding, TOKENS)
    integers = DynamicCache(config=decoder().config)
    integers.layers[0]._quantized_values = object()
    integers.layers[0].is_initialized = True
    with pytest.raises(tokentrim.UnsupportedContextError, match="unquantised"):
        cache_rows(integers, TOKENS)
    model = decoder()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(tokentrim.UnsupportedContextError, match="sdpa"):
        LatentVideoAdapter().attach(_holding(model), Patches())


def _sliding() -> Any:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    layer = DynamicSlidingWindowLayer(sliding_window=8)
    layer.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
    return layer


def _holding(model: LlamaModel) -> Any:
    holder = LatentVideo()
    holder.decoder = model
    return holder


def test_an_empty_cache_has_no_rows() -> None:
    """Before the first commit there is nothing to prune; text in front and the current chunk are left out."""
    assert cache_rows(DynamicCache(), TOKENS) == CacheRows([], 0, 0, TOKENS, 0)
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5 * TOKENS, 8), torch.zeros(1, 2, 5 * TOKENS, 8), 0)
    rows = cache_rows(cache, TOKENS, current=TOKENS, anchors=TOKENS, prefix=TOKENS)
    assert (rows.start, rows.stop, rows.anchors) == (TOKENS, 4 * TOKENS, TOKENS)
    assert rows.values[0].shape == (1, 5 * TOKENS, 2, 8)
    assert issubclass(LatentVideoAdapter, Adapter)
