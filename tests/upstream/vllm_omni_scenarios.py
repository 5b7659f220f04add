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
"""Of single requests and sessions alike: what is pruned, when, and the seed of the video."""


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


def forced(net: Any, policy: Any, pages: Any = None) -> dict[str, Any]:
    """A video with a patch: latents, records, and the video after that."""
    from tokentrim_vllm_omni.adapter import VllmOmniLingBot

    import tokentrim_hooks as tokentrim

    with tokentrim.patched(net, policy, adapter=VllmOmniLingBot) as handle:
        video = tiny.video(net, SEED, pages=pages)
        records = [(record.chunk, record.tokens, record.dead, record.phases) for record in handle.report]
    return {"video": video, "records": records, "undone": tiny.video(net, SEED, pages=pages)}


def masked(net: Any, pages: Any = None, tokens: Any = DEAD, calls: Any = None) -> Tensor:
    """The unpatched runner with -inf at the dead keys."""
    from tokentrim_hooks.testing.checks import run_with_dead_keys

    def run() -> Tensor:
        return tiny.video(net, SEED, pages=pages)

    return run_with_dead_keys(run, [net], CHUNK, tokens, tiny.TOKENS, tiny.SINKS, calls)


@contextmanager
def in_sight() -> Iterator[None]:
    """A session's attention by torch's kernel, where the kit and the -inf reference look."""
    with (
        mock.patch.object(tiny.transformer, "paged_write_attn", tiny.write_and_attend),
        mock.patch.object(tiny.paged_attention, "_reference_paged_attention", tiny.paged_by_sdpa),
    ):
        yield


def sessions(net: Any) -> dict[str, Any]:
    """Realtime sessions, by vLLM-Omni's own operator and plain code for pages; references by torch's kernel."""
    from tokentrim_vllm_omni import pages as of_pages

    import tokentrim_hooks as tokentrim
    from tokentrim_hooks.testing.policies import ForcedPolicy

    pool, policy = tiny.pool(net), ForcedPolicy({CHUNK: DEAD})
    found: dict[str, Any] = {"plain": tiny.video(net, SEED, pages=pool), "forced": forced(net, policy, pool)}
    found["observed"] = forced(net, tokentrim.ObservePolicy(), pool)
    gathered = mock.Mock(side_effect=of_pages.Pages._over, autospec=True)
    with mock.patch.object(of_pages.Pages, "_over", lambda *args, **given: gathered(*args, **given)):
        found["frames"], found["gathered for frames"] = forced(net, Blindfold(), pool), gathered.call_count
        found["commit"] = forced(net, tokentrim.CommitWindow(frames=0), pool)
    with in_sight():
        found["seen"] = tiny.video(net, SEED, pages=pool)
        found["masked"] = masked(net, pool)
        found["frames masked"] = masked(net, pool, range(tiny.TOKENS), range(5 * CHUNK, 5 * CHUNK + 5))
    found["finite"] = all(bool(rows.isfinite().all()) for rows in pool._v_pools)
    return found | together(net, policy)


def together(net: Any, policy: Any) -> dict[str, Any]:
    """Two sessions of one pool, block by block in turns, each pruned as it is alone."""
    from tokentrim_vllm_omni.adapter import VllmOmniLingBot

    import tokentrim_hooks as tokentrim

    pool = tiny.pool(net)
    with tokentrim.patched(net, policy, adapter=VllmOmniLingBot) as handle:
        alone = [tiny.video(net, seed, pages=pool) for seed in (SEED, SEED + 1)]
        before, videos = len(handle.report), [tiny.Video(net, seed, pool) for seed in (SEED, SEED + 1)]
        blocks = [[video.block() for video in videos] for _ in range(tiny.CHUNKS)]
        pruned = [record.chunk for record in list(handle.report)[before:] if record.pruned]
    made = [torch.cat(of_one, dim=2).transpose(1, 2) for of_one in zip(*blocks, strict=True)]
    return {"alone": alone, "together": made, "pruned together": pruned}


def Blindfold() -> Any:
    """A policy that hides all frames but the sink from the calls of one chunk."""
    import tokentrim_hooks as tokentrim

    class OneChunk(tokentrim.Policy):
        def hide(self, chunk: Any, context: Any) -> Tensor | None:
            hidden = torch.zeros(1, context.frames, context.tokens, dtype=torch.bool)
            hidden[:, [not anchor for anchor in context.anchors]] = chunk.index == CHUNK
            return hidden

    return OneChunk()


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


def refusals(net: Any) -> dict[str, str]:
    """What is said of a cache that has been used for another call, and of pages that are no frames."""
    from types import SimpleNamespace

    from tokentrim_vllm_omni.pages import Window

    import tokentrim_hooks as tokentrim

    context = SimpleNamespace(block_size=16, history_block_ids=[])
    caches = {"used": SimpleNamespace(layer_idx=0), "pages": SimpleNamespace(forward_ctx=context)}
    said = {}
    for name, layer in caches.items():
        try:
            Window.of(layer, range(2), tiny.TOKENS, tiny.SINKS)
        except tokentrim.UnsupportedContextError as refused:
            said[name] = str(refused)
    return said


def kit(paged: bool) -> dict[str, str]:
    """What the conformance kit finds; of sessions with ``paged``."""
    from tokentrim_vllm_omni.adapter import VllmOmniLingBot

    from tokentrim_hooks.testing import AdapterConformance, failures

    class Kit(AdapterConformance):
        adapter: ClassVar[Any] = VllmOmniLingBot
        chunks, chunk_to_prune, anchor_frames = 6 if paged else 8, 3, tiny.SINKS
        tokens = DEAD

        def make_model(self) -> Any:
            net = tiny.model()
            net._tokentrim_seen = True  # the plugin's watch stays; the kit patches by itself
            return net

        def run(self, model: Any, seed: int) -> Tensor:
            torch.manual_seed(seed)
            return tiny.video(model, seed, self.chunks, tiny.pool(model) if paged else None)

    with in_sight():
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
    found |= {"refusals": refusals(net), "sessions": sessions(net), "kit": kit(False), "kit of sessions": kit(True)}
    torch.save(found, folder / "found")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
