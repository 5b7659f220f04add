"""Generate a long video with SkyReels-V2 diffusion forcing (diffusers) and TokenTrim.

    python examples/skyreels_v2.py --prompt "A lighthouse in a storm" --num-frames 257 --out run

needs a GPU and downloads the weights. ``--tiny`` runs the same code on a CPU with random weights (the picture is
noise), from a checkout of this repository.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import tokentrim_hooks as tokentrim


def arguments() -> argparse.Namespace:
    """Command line; the defaults are SkyReels-V2's and the paper's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers")
    parser.add_argument("--prompt", default="A lighthouse in a storm, waves breaking on the rocks, cinematic")
    parser.add_argument("--num-frames", type=int, default=257)
    parser.add_argument("--overlap-history", type=int, default=17)
    parser.add_argument("--ar-step", type=int, default=0, help="0: synchronous; 5: causal blocks, one after the other")
    parser.add_argument("--causal-block-size", type=int, default=None, help="5 is recommended with --ar-step 5")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=0.1, help="share of tokens that a prune removes")
    parser.add_argument("--sensitivity", type=float, default=2.0, help="lambda: how many sigmas make a chunk unstable")
    parser.add_argument("--observe", action="store_true", help="measure only; the video is bit-identical")
    parser.add_argument("--tiny", action="store_true", help="random weights, CPU")
    parser.add_argument("--out", type=Path, default=Path("run"))
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and its arguments."""
    if options.tiny:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "adapters"))
        import skyreels_tiny

        return skyreels_tiny.pipeline(), skyreels_tiny.settings()
    from diffusers import AutoencoderKLWan, SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler

    vae = AutoencoderKLWan.from_pretrained(options.model, subfolder="vae", torch_dtype=torch.float32)
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(options.model, vae=vae, torch_dtype=torch.bfloat16)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=8.0)
    settings = {
        "prompt": options.prompt,
        "height": 544,
        "width": 960,
        "num_frames": options.num_frames,
        "overlap_history": options.overlap_history,
        "addnoise_condition": 20,
        "num_inference_steps": options.steps,
        "guidance_scale": 6.0,
        "ar_step": options.ar_step,
        "causal_block_size": options.causal_block_size,
    }
    return pipe.to("cuda"), settings


def save(video: Any, options: argparse.Namespace) -> None:
    """Write the video; latents in place of pictures where there is no VAE."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        torch.save(video, options.out / "video.pt")
        return
    from diffusers.utils import export_to_video

    export_to_video(video[0], str(options.out / "video.mp4"), fps=24, quality=8)


def main() -> None:
    """Load, patch, generate, save."""
    options = arguments()
    pipe, settings = load(options)
    policy: tokentrim.Policy = tokentrim.DriftPolicy(options.fraction, options.sensitivity)
    if options.observe:
        policy = tokentrim.ObservePolicy(options.fraction, options.sensitivity)

    with tokentrim.patched(pipe, policy) as handle:
        video = pipe(**settings, generator=torch.Generator().manual_seed(options.seed)).frames
        print(handle.report.summary())
        handle.report.save(options.out)
    save(video, options)


if __name__ == "__main__":
    main()
