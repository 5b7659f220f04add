"""What happens in vLLM-Omni; run as ``python vllm_omni_scenarios.py folder``, which leaves a file there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import vllm_omni_tiny as tiny
from torch import Tensor

DEAD, CHUNK, SEED = (0, 5, 11, 20), 4, 9


def ours(name: str) -> bool:
    """Whether a module of that name, or below it, was imported."""
    return any(module.partition(".")[0] == name for module in sys.modules)


def plugin(net: Any) -> dict[str, Any]:
    """vLLM-Omni's own loader finds and runs the plugin, a video is made, and the patch comes off."""
    from vllm_omni.plugins import load_omni_plugins_by_group

    found: dict[str, Any] = {"loaded": sorted(load_omni_plugins_by_group("vllm_omni.general_plugins"))}
    for _ in range(2):  # vLLM-Omni says that plugins may be loaded twice
        load_omni_plugins_by_group("vllm_omni.general_plugins")["tokentrim"]()
    found["early"] = ours("tokentrim_hooks")
    found["video"] = tiny.video(net, SEED)
    import tokentrim_hooks as tokentrim
    from tokentrim_hooks.handle.handle import handle_of

    handle = handle_of(net)
    found["pruned"] = [record.chunk for record in handle.report if record.pruned]
    handle.unpatch()
    found["undone"], found["patched"] = tiny.video(net, SEED), tokentrim.is_patched(net)
    return found


def forced(net: Any, policy: Any) -> dict[str, Any]:
    """A video with a patch: latents, records, and the video after that."""
    from tokentrim_vllm_omni.adapter import VllmOmniLingBot

    import tokentrim_hooks as tokentrim

    with tokentrim.patched(net, policy, adapter=VllmOmniLingBot) as handle:
        video = tiny.video(net, SEED)
        records = [(record.chunk, record.tokens, record.dead, record.phases) for record in handle.report]
    return {"video": video, "records": records, "undone": tiny.video(net, SEED)}


def masked(net: Any) -> Tensor:
    """The unpatched runner with -inf at the dead keys."""
    from tokentrim_hooks.testing.checks import run_with_dead_keys

    return run_with_dead_keys(lambda: tiny.video(net, SEED), [net], CHUNK, DEAD, tiny.TOKENS, tiny.SINKS)


@contextmanager
def as_on_cuda() -> Iterator[list[int]]:
    """Self attention takes the way for CUDA, whose kernel is vLLM-Omni's own reference of it; yields its calls."""
    from vllm_omni.experimental.ar_diffusion.kv_cache import paged_attention

    calls: list[int] = []

    def paged(query: Tensor, keys: Tensor, values: Tensor, **given: Any) -> Tensor:
        calls.append(int(given["max_seq_len"]))
        rows = [given[name] for name in ("block_table", "query_start_loc", "seq_lens", "softmax_scale")]
        return paged_attention._reference_paged_attention(query[0], keys, values, *rows, causal=False)[None]

    forward = tiny.transformer.LingBotSelfAttention.forward

    def believing(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        with mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True), create=True):
            return forward(layer, *args, **kwargs)

    with (
        mock.patch.object(tiny.transformer, "ar_diffusion_paged_attention", paged),
        mock.patch.object(tiny.transformer.LingBotSelfAttention, "forward", believing),
    ):
        yield calls


def refusal(net: Any) -> str:
    """What is said of a session's pages."""
    from types import SimpleNamespace

    from tokentrim_vllm_omni.adapter import VllmOmniLingBot

    import tokentrim_hooks as tokentrim

    try:
        VllmOmniLingBot().parse({"cache": SimpleNamespace(self_attention=[SimpleNamespace(layer_idx=0)])})
    except tokentrim.UnsupportedContextError as refused:
        return str(refused)
    return ""


def kit() -> dict[str, str]:
    """What the conformance kit finds."""
    from tokentrim_vllm_omni.adapter import VllmOmniLingBot

    from tokentrim_hooks.testing import AdapterConformance, failures

    class Kit(AdapterConformance):
        adapter: ClassVar[Any] = VllmOmniLingBot
        chunks, chunk_to_prune, anchor_frames = 8, 3, tiny.SINKS
        tokens = DEAD

        def make_model(self) -> Any:
            net = tiny.model()
            net._tokentrim_seen = True  # the plugin's watch stays; the kit patches by itself
            return net

        def run(self, model: Any, seed: int) -> Tensor:
            torch.manual_seed(seed)
            return tiny.video(model, seed, self.chunks)

    return failures(Kit)


def main(folder: Path) -> None:
    """All of it, in one process."""
    torch.set_num_threads(1)
    tiny.start()
    net = tiny.model()
    found: dict[str, Any] = {"plain": tiny.video(net, SEED), "plugin": plugin(net)}
    import tokentrim_hooks as tokentrim
    from tokentrim_hooks.testing.policies import ForcedPolicy

    policy = ForcedPolicy({CHUNK: DEAD})
    found |= {"forced": forced(net, policy), "observed": forced(net, tokentrim.ObservePolicy()), "masked": masked(net)}
    with as_on_cuda() as calls:
        found["plain on CUDA"], found["on CUDA"] = tiny.video(net, SEED), forced(net, policy)
        found["kernel"] = len(calls)
    found["refusal"], found["kit"] = refusal(net), kit()
    torch.save(found, folder / "found")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
