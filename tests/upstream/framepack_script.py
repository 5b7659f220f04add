"""Runs the original FramePack (the checkout named in argv) with tiny random weights, and prints what was seen as JSON.

A process of its own: importing the repository replaces the forward of torch's LayerNorm for good. The transformer and
``sample_hunyuan`` are the real ones; the loop over sections is written after the two demo scripts, which mix it with
their user interface.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOKENS, W, STEPS = [0, 5], 3, 4
TEXT = 2 + 4


def import_repository(folder: str) -> tuple[Any, Callable[..., Any]]:
    """The transformer class and the sampler; packages for pictures and video files are not needed for either."""
    from diffusers import HunyuanVideoTransformer3DModel  # noqa: F401 - looks for torchvision, so before the stand-ins

    for name in ("cv2", "torchvision"):
        sys.modules[name] = types.ModuleType(name)
    sys.path.insert(0, folder)
    from diffusers_helper.models.hunyuan_video_packed import HunyuanVideoTransformer3DModelPacked
    from diffusers_helper.pipelines.k_diffusion_hunyuan import sample_hunyuan

    return HunyuanVideoTransformer3DModelPacked, sample_hunyuan


def build(kind: Any) -> Any:
    """One double and one single stream block; attention matters to the output."""
    torch.manual_seed(0)
    model = kind(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.to_v.weight.normal_(std=0.5)
    return model.eval().requires_grad_(False)


def noise(*size: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Loop:
    """The loop over sections of ``demo_gradio_f1.py`` and ``demo_gradio.py``."""

    def __init__(self, model: Any, sample: Callable[..., Any], width: int = 64, seed: int = 5) -> None:
        self.model, self.sample, self.width, self.seed, self.section = model, sample, width, seed, -1

    def run(self, inverted: bool, sections: int = 4, tea: bool = False, cfg: float = 1.0) -> torch.Tensor:
        """The video's latents."""
        start, embedding = noise(1, 16, 1, 8, self.width // 8, seed=1), noise(1, 2, 8, seed=2)
        history, rnd = torch.zeros(1, 16, 19, 8, self.width // 8), torch.Generator("cpu").manual_seed(self.seed)
        history = history if inverted else torch.cat([history, start], 2)
        made = 0 if inverted else 1
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
        for self.section in range(sections):
            self.model.initialize_teacache(enable_teacache=tea, num_steps=STEPS, rel_l1_thresh=1e6)
            context = (_behind if inverted else _before)(history, start, sections - 1 - self.section)
            latents = self.sample(
                transformer=self.model,
                width=self.width,
                height=64,
                frames=W * 4 - 3,
                real_guidance_scale=cfg,
                num_inference_steps=STEPS,
                generator=rnd,
                prompt_embeds=noise(1, 6, 16),
                prompt_embeds_mask=mask,
                prompt_poolers=noise(1, 8),
                negative_prompt_embeds=noise(1, 6, 16, seed=4),
                negative_prompt_embeds_mask=mask,
                negative_prompt_poolers=noise(1, 8, seed=4),
                device="cpu",
                dtype=torch.float32,
                image_embeddings=embedding,
                **context,
            )
            made += latents.shape[2]
            history = torch.cat([latents, history] if inverted else [history, latents], 2)
        return history[:, :, :made] if inverted else history[:, :, -made:]


def _before(history: torch.Tensor, start: torch.Tensor, _left: int) -> dict[str, torch.Tensor]:
    first, four_at, twice_at, once_at, here = torch.arange(20 + W).unsqueeze(0).split([1, 16, 2, 1, W], 1)
    four, twice, once = history[:, :, -19:].split([16, 2, 1], 2)
    return _context(start, once, twice, four, first, once_at, twice_at, four_at, here)


def _behind(history: torch.Tensor, start: torch.Tensor, left: int) -> dict[str, torch.Tensor]:
    indices = torch.arange(20 + W + left * W).unsqueeze(0).split([1, left * W, W, 1, 2, 16], 1)
    first, _, here, once_at, twice_at, four_at = indices
    once, twice, four = history[:, :, :19].split([1, 2, 16], 2)
    return _context(start, once, twice, four, first, once_at, twice_at, four_at, here)


def _context(start: Any, once: Any, twice: Any, four: Any, *at: torch.Tensor) -> dict[str, torch.Tensor]:
    first, once_at, twice_at, four_at, here = at
    return {
        "latent_indices": here,
        "clean_latents": torch.cat([start, once], 2),
        "clean_latent_indices": torch.cat([first, once_at], 1),
        "clean_latents_2x": twice,
        "clean_latent_2x_indices": twice_at,
        "clean_latents_4x": four,
        "clean_latent_4x_indices": four_at,
    }


def dead_at(loop: Loop, inverted: bool) -> Callable[[int], torch.Tensor | None]:
    """Dead keys by counting: what sections 0 and 1 made is dead from section 2 on."""
    from dispatch_tools import dead_keys

    limit = 2 * W if inverted else 1 + 2 * W

    def hide(keys: int) -> torch.Tensor | None:
        if loop.section < 2 or keys != 8 + 2 * 16 + W * 16 + TEXT:
            return None
        made = [s * W + f for s in range(loop.section - 1, -1, -1) for f in range(W)]
        line = (made + [None] * 19)[:19] if inverted else ([None] * 19 + list(range(1 + W * loop.section)))[-19:]
        once, twice, four = (line[:1], line[1:3], line[3:]) if inverted else (line[18:], line[16:18], line[:16])

        def dead(frame: int) -> set[int]:
            return set(TOKENS) if frame < limit else set()

        coarse = dead_keys([(four, 4), (twice, 2)], (4, 4), dead, "any")
        return torch.tensor(coarse + [False] * 16 + dead_keys([(once, 1)], (4, 4), dead, "any") + [False] * (48 + TEXT))

    return hide


def poisoned(loop: Loop, inverted: bool, **options: Any) -> torch.Tensor:
    """A video of three sections with garbage in the flagged tokens of the last one's history."""
    from dispatch_tools import poison

    def spoil(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if loop.section != 2:
            return args, kwargs
        four = range(3) if inverted else range(12, 16)
        return args, {
            **kwargs,
            "clean_latents_4x": poison(kwargs["clean_latents_4x"], TOKENS, four),
            "clean_latents_2x": poison(kwargs["clean_latents_2x"], TOKENS, range(2)),
            "clean_latents": poison(kwargs["clean_latents"], TOKENS, [1]),
        }

    hook = loop.model.register_forward_pre_hook(spoil, with_kwargs=True)
    try:
        return loop.run(inverted, sections=3, **options)
    finally:
        hook.remove()


def look(loop: Loop, inverted: bool, **options: Any) -> dict[str, Any]:
    """Everything that is compared for one direction and one set of options."""
    from dispatch_tools import watched

    import tokentrim_hooks as tokentrim
    from tokentrim_hooks.testing import ForcedPolicy
    from tokentrim_hooks.testing.laws.hooks import HidesTokens

    new = slice(0, 3) if inverted else slice(7, 10)
    forced, observed = ForcedPolicy({2: TOKENS}), tokentrim.ObservePolicy()
    plain, state = loop.run(inverted, **options), torch.random.get_rng_state()
    with tokentrim.patched(loop.model, observed) as handle:
        neutral = torch.equal(loop.run(inverted, **options), plain)
        neutral = neutral and torch.equal(torch.random.get_rng_state(), state)
        records = [(r.start, r.phases, r.severity is None) for r in handle.report]
    with watched(dead_at(loop, inverted)):
        expected = loop.run(inverted, **options)
    with tokentrim.patched(loop.model, forced) as handle, watched() as kernel:
        pruned = loop.run(inverted, **options)
        triggers = handle.report.triggers
    # Hidden from every call of the section and of later ones, the same tokens are as dead as if they had been pruned.
    with tokentrim.patched(loop.model, HidesTokens(chunk=2, tokens=tuple(TOKENS), begun=[])):
        hidden = loop.run(inverted, **options)
    leak = {}
    for name, policy in (("forced", forced), ("observed", observed)):
        with tokentrim.patched(loop.model, policy):
            clean = loop.run(inverted, sections=3, **options)
            leak[name] = float((poisoned(loop, inverted, **options) - clean)[:, :, new].abs().max())
    return {
        "neutral": neutral,
        "attentions": len(kernel.lengths),
        "records": records,
        "effect": float((pruned - plain).abs().max()),
        "error": float((pruned - expected).abs().max()),
        "hidden": float((hidden - expected).abs().max()),
        "triggers": triggers,
        "keys": kernel.keys(94),
        "leak": leak,
        "restored": torch.equal(loop.run(inverted, **options), plain),
    }


def late_teacache(loop: Loop) -> str:
    """What is said when TeaCache was not started anew with the section that is pruned."""
    import tokentrim_hooks as tokentrim
    from tokentrim_hooks.testing import ForcedPolicy

    original = loop.model.initialize_teacache
    calls: list[int] = []

    def once(*args: Any, **kwargs: Any) -> None:
        if not calls:
            original(True, num_steps=100)
        calls.append(1)

    loop.model.initialize_teacache = once
    try:
        with tokentrim.patched(loop.model, ForcedPolicy({2: TOKENS})):
            loop.run(False)
    except tokentrim.UnsupportedContextError as refusal:
        return str(refusal)
    finally:
        del loop.model.initialize_teacache
    return ""


def main() -> None:
    """``framepack_script.py CHECKOUT``."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
    kind, sample = import_repository(sys.argv[1])
    loop = Loop(build(kind), sample)
    found: dict[str, Any] = {"late": late_teacache(loop)}
    for name, options in (("plain", {}), ("guided", {"cfg": 2.0}), ("teacache", {"tea": True})):
        for inverted in (False, True):
            found[f"{name} {'inverted' if inverted else 'forward'}"] = look(loop, inverted, **options)
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
