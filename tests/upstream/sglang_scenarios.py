"""What happens on one rank of SGLang; run as ``python sglang_scenarios.py folder rank size``, which leaves a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import sglang_tiny as tiny
import torch
from torch import Tensor

DEAD, CHUNK, CHUNKS, SEED = (0, 5, 11, 20), 4, 6, 9
WEIGHTS = "weights.pt"


def ours(name: str) -> bool:
    """Whether a module of that name, or below it, was imported."""
    return any(module.partition(".")[0] == name for module in sys.modules)


def plugin(stage: Any) -> dict[str, Any]:
    """SGLang discovers the plugin, applies its hook, and makes a video; then the patch comes off."""
    from sglang.multimodal_gen.runtime.platforms import plugins

    plugins.apply_plugin_hooks()
    found: dict[str, Any] = {"early": ours("tokentrim_hooks"), "hooked": sorted(plugins.HookRegistry._patched)}
    found["video"] = stage.video(SEED, CHUNKS)
    import tokentrim_hooks as tokentrim
    from tokentrim_hooks.handle.handle import handle_of

    handle = handle_of(stage.transformer)
    found["pruned"] = [record.chunk for record in handle.report if record.pruned]
    handle.unpatch()
    found["undone"], found["patched"] = stage.video(SEED, CHUNKS), tokentrim.is_patched(stage.transformer)
    return found


def forced(stage: Any, policy: Any) -> dict[str, Any]:
    """A video with a patch: latents, records, the cache's dead rows, and the video after that."""
    from tokentrim_sglang.adapter import SGLang

    import tokentrim_hooks as tokentrim

    with tokentrim.patched(stage.transformer, policy, adapter=SGLang) as handle:
        video = stage.video(SEED, CHUNKS)
        rows = [(~torch.isfinite(layer.v)).flatten(2).any(-1).nonzero().tolist() for layer in stage.causal_kv_cache]
        records = [(record.chunk, record.tokens, record.dead, record.phases) for record in handle.report]
    return {"video": video, "rows": rows, "records": records, "undone": stage.video(SEED, CHUNKS)}


def refusals(stage: Any) -> dict[str, str]:
    """What is said of caches whose rows follow other rules."""
    from sglang.multimodal_gen.runtime.layers.kvcache.qvg_packed_cache import QVGPackedCausalKVCache
    from tokentrim_sglang.cache import refusal

    layer = stage.causal_kv_cache[0]
    packed = QVGPackedCausalKVCache.__new__(QVGPackedCausalKVCache)  # its memory needs a GPU
    said = {"plain": refusal(layer), "packed": refusal(packed)}
    layer.allow_growth = True
    said["grows"] = refusal(layer)
    layer.allow_growth, layer.pinned_start, layer.pinned_len = False, 2 * tiny.TOKENS, tiny.TOKENS
    said["pinned"] = refusal(layer)
    layer.reset_pinned_sink()
    return said


def masked(stage: Any) -> Tensor:
    """The unpatched stage with -inf at the dead keys."""
    from tokentrim_hooks.testing.checks import run_with_dead_keys

    def run() -> Tensor:
        return stage.video(SEED, CHUNKS)

    return run_with_dead_keys(run, [stage.transformer], CHUNK, DEAD, tiny.TOKENS, tiny.SINKS)


def kit() -> dict[str, str]:
    """What the conformance kit finds: of the transformer, with a stage of its own for each video."""
    from tokentrim_sglang.adapter import SGLang

    from tokentrim_hooks.testing import AdapterConformance, failures

    class Kit(AdapterConformance):
        adapter: ClassVar[Any] = SGLang
        chunks, chunk_to_prune, anchor_frames = 8, 3, tiny.SINKS
        tokens = DEAD

        def make_model(self) -> Any:
            net = tiny.transformer()
            net._tokentrim_seen = True  # the plugin's hook stays; the kit patches by itself
            return net

        def run(self, model: Any, seed: int) -> Tensor:
            return tiny.Stage(net=model).video(seed, self.chunks).transpose(1, 2)

    return failures(Kit)


def main(folder: Path, rank: int, size: int) -> None:
    """One process makes the weights and all comparisons; ranks of a group make the forced video only."""
    torch.set_num_threads(1)
    tiny.start(rank, size, f"file://{folder / f'meeting{size}'}")
    found: dict[str, Any] = {}
    if size == 1:
        stage = tiny.Stage()
        weights = {name: parameter.detach().clone() for name, parameter in stage.transformer.named_parameters()}
        torch.save(weights, folder / WEIGHTS)
        found["plain"] = stage.video(SEED, CHUNKS)
        found["plugin"] = plugin(stage)
    else:
        stage = tiny.Stage(weights=torch.load(folder / WEIGHTS))
    import tokentrim_hooks as tokentrim
    from tokentrim_hooks.testing.policies import ForcedPolicy

    stage.transformer._tokentrim_seen = True  # the plugin's hook stays; what follows patches by itself
    found["forced"] = forced(stage, ForcedPolicy({CHUNK: DEAD}))
    if size == 1:
        found |= {"observed": forced(stage, tokentrim.ObservePolicy()), "masked": masked(stage)}
        found["refusals"], found["kit"] = refusals(stage), kit()
    torch.save(found, folder / f"found.{size}.{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
