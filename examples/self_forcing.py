"""Generate a long video with Self-Forcing and TokenTrim, from a checkout of github.com/guandeh17/Self-Forcing.

    python examples/self_forcing.py --checkout ../Self-Forcing --checkpoint_path checkpoints/self_forcing_dmd.pt \\
        --prompt "A lighthouse in a storm" --out run

Needs a GPU, the checkout with its requirements, and the weights that its README names. The checkout's own pipeline
runs, unchanged; ``--observe`` measures only, and ``--unpatched`` leaves TokenTrim out, for comparison.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokentrim_hooks as tokentrim

TRAINED_FRAMES = 21
"""Latent frames that the model was trained on; a longer video needs a rolling window of so many."""
LATENT = (16, 60, 104)
"""Channels, height and width of a latent frame: 832x480 pixels."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Command line; names as in the checkout's own inference.py where it has them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of the Self-Forcing checkout")
    parser.add_argument("--config_path", default="configs/self_forcing_dmd.yaml", help="relative to the checkout")
    parser.add_argument("--checkpoint_path", default="checkpoints/self_forcing_dmd.pt", help="relative to the checkout")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--num_output_frames", type=int, default=120, help="latent frames, a multiple of 3; 120 = 30 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=("generator_ema", "generator"), default="generator_ema")
    parser.add_argument("--fraction", type=float, default=0.1, help="share of tokens that a prune removes")
    parser.add_argument("--sensitivity", type=float, default=2.0, help="lambda: how many sigmas make a chunk unstable")
    parser.add_argument("--probe", choices=("first-step", "candidate"), default="first-step")
    parser.add_argument("--observe", action="store_true", help="measure only; the video is bit-identical")
    parser.add_argument("--unpatched", action="store_true", help="without TokenTrim")
    parser.add_argument("--out", type=Path, default=Path("run"))
    return parser.parse_args(given)


def load(options: argparse.Namespace) -> Any:
    """The checkout's pipeline with its weights, on the GPU in bfloat16."""
    enter(options.checkout)
    from omegaconf import OmegaConf
    from pipeline import CausalInferencePipeline

    config = OmegaConf.merge(OmegaConf.load("configs/default_config.yaml"), OmegaConf.load(options.config_path))
    if options.num_output_frames > TRAINED_FRAMES:
        OmegaConf.update(config, "model_kwargs.local_attn_size", TRAINED_FRAMES, force_add=True)
    pipe = CausalInferencePipeline(config, device=torch.device("cuda"))
    weights = torch.load(options.checkpoint_path, map_location="cpu", weights_only=True)[options.weights]
    pipe.generator.load_state_dict(weights)
    return pipe.to(device="cuda", dtype=torch.bfloat16)


def enter(checkout: Path) -> None:
    """Make the checkout importable and the current folder: it finds its configs and models relative to that."""
    if not (checkout / "pipeline" / "causal_inference.py").is_file():
        raise SystemExit(
            f"{checkout} is not a checkout of Self-Forcing: it has no pipeline/causal_inference.py.\n"
            "Give the folder that git cloned."
        )
    os.chdir(checkout)
    sys.path.insert(0, os.getcwd())


def policy(options: argparse.Namespace) -> tokentrim.Policy:
    """The paper's policy, or one that only measures."""
    kind = tokentrim.ObservePolicy if options.observe else tokentrim.DriftPolicy
    return kind(fraction=options.fraction, sensitivity=options.sensitivity)


@torch.no_grad()
def generate(pipe: Any, options: argparse.Namespace, noise: Tensor) -> Tensor:
    """The video ``[1, frames, 3, height, width]`` in [0, 1]; TokenTrim's report goes to ``--out``."""
    torch.manual_seed(options.seed)
    if options.unpatched:
        return pipe.inference(noise=noise, text_prompts=[options.prompt])
    with tokentrim.patched(pipe, policy(options), probe=options.probe) as handle:
        video = pipe.inference(noise=noise, text_prompts=[options.prompt])
        print(handle.report.summary())
        handle.report.save(options.out)
    return video


def main() -> None:
    """Load, generate, save."""
    options = arguments()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = load(options)
    rng = torch.Generator().manual_seed(options.seed)
    noise = torch.randn(1, options.num_output_frames, *LATENT, generator=rng).to("cuda", torch.bfloat16)
    video = generate(pipe, options, noise)
    from diffusers.utils import export_to_video

    frames = video[0].float().permute(0, 2, 3, 1).cpu().numpy()
    export_to_video(list(frames), str(options.out / "video.mp4"), fps=16)


if __name__ == "__main__":
    main()
