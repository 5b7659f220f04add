"""For adapters of models whose context is a transformers ``Cache`` (``past_key_values``).

transformers itself ships no autoregressive video model, so nothing is registered here: whoever has built one over a
transformers decoder subclasses :class:`TransformersCacheAdapter` and writes ``probe`` and ``parse``.

Marks lie in V of ``cache.layers[i]``; lengths and positions stay what they were, so position ids and mask sizes that
transformers derives from the cache are right without further ado. Dynamic and static layers work, and layers quantised
to fp8. Sliding layers (rows that do not begin at a frame), integer quantisation and linear attention are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks import Adapter, CacheRows, Patches, UnsupportedContextError, home_of

NAMES: dict[str, Any] = {"q": "query", "k": "key", "v": "value", "mask": "attention_mask", "heads_first": True}
"""Parameters of all attention functions of transformers; q, k, v are ``[B, heads, length, head_dim]``."""
SUPPORTED = ("eager", "sdpa")


class TransformersCacheAdapter(Adapter):
    """Base class: taps the decoder that :meth:`decoder` names. Subclasses call :func:`cache_rows` in ``context``."""

    context_kind = "transformers Cache"
    takes = frozenset({"judge", "hide"})

    def decoder(self, model: Any) -> nn.Module:
        """The transformers model inside ``model`` whose calls take ``past_key_values``."""
        raise NotImplementedError("say which module is the transformers decoder")

    def attach(self, model: Any, patches: Patches) -> None:
        """Tap the attention function that the decoder's configuration names."""
        tap_attention(self.decoder(model), patches)


def tap_attention(decoder: nn.Module, patches: Patches) -> None:
    """Tap the decoder's attention function, for calls from its self-attention layers only.

    Raises:
        UnsupportedContextError: an implementation whose mask is no ``[B, heads, queries, keys]`` tensor.
    """
    kind = str(decoder.config._attn_implementation)  # type: ignore[union-attr]
    if kind not in SUPPORTED:
        raise UnsupportedContextError(f"attention is {kind!r}; load the model with attn_implementation='sdpa'")
    layers = [layer for layer in decoder.modules() if hasattr(layer, "layer_idx") and hasattr(layer, "head_dim")]
    if not layers:
        raise UnsupportedContextError(
            "the decoder has no attention layers with layer_idx and head_dim; "
            "correct decoder()"
        )
    for home in dict.fromkeys(map(home_of, layers)):
        own = [layer for layer in layers if home_of(layer) is home]
        if kind == "eager":
            patches.tap(home, "eager_attention_forward", within=own, **NAMES)
            continue
        interface = home.ALL_ATTENTION_FUNCTIONS
        local = interface._local_mapping
        patches.tap(local if kind in local else interface._global_mapping, kind, within=own, **NAMES)


def cache_rows(cache: Any, rows_per_frame: int, *, current: int = 0, anchors: int = 0, prefix: int = 0) -> CacheRows:
    """Rows of a transformers ``Cache`` as a context of the core.

    Args:
        cache: ``past_key_values`` of the call.
        rows_per_frame: rows of one latent frame.
        current: rows at the end that belong to the chunk being generated.
        anchors: rows behind the prefix that are sinks.
        prefix: rows in front that are no frames (text); a multiple of ``rows_per_frame``.

    Raises:
        UnsupportedContextError: a layer that cannot hold marks, or whose rows are not those of the other layers.
    """
    layers = [layer for layer in _layers(cache) if getattr(layer, "is_initialized", True)]
    values = [_values(layer) for layer in layers]
    length = int(layers[0].get_seq_length()) if layers else 0
    stop = max(length - current, prefix)
    return CacheRows(values, prefix, stop, rows_per_frame, min(anchors, stop - prefix))


def _layers(cache: Any) -> Iterable[Any]:
    return getattr(cache, "self_attention_cache", cache).layers  # type: ignore[no-any-return]


def _values(layer: Any) -> Tensor:
    """V of a layer as ``[B, rows, heads, head_dim]``, a view."""
    kind = type(layer).__name__
    if getattr(layer, "is_sliding", False):
        raise UnsupportedContextError(
            f"{kind}: rows of a sliding layer are not those of other layers and begin amid a frame; use full attention "
            "layers, or hide dead tokens with an attention mask of your own"
        )
    quantised = getattr(layer, "_quantized_values", None)
    if isinstance(quantised, tuple) and hasattr(layer, "fp8_dtype"):
        return quantised[0].transpose(1, 2)  # type: ignore[no-any-return]
    values = getattr(layer, "values", None)
    if quantised is not None or not isinstance(values, Tensor) or values.ndim != 4:
        raise UnsupportedContextError(f"{kind} holds no K/V rows that can carry a mark; use an unquantised cache")
    return values.transpose(1, 2)
