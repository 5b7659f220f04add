"""How each trained model does on held-out scenes: ``python -m tokentrim_hooks.reference.held_out fading``.

The figures go into the JSON file beside the weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from tokentrim_hooks.reference.kinds import FOLDER, KINDS, figures_file, load_model
from tokentrim_hooks.reference.pipeline import ReferencePipeline
from tokentrim_hooks.reference.quality import contrast_ratio, window
from tokentrim_hooks.reference.quality_sprites import sprites_alive
from tokentrim_hooks.reference.scenes import CHUNK, Scene, scenes

SEED = 123
"""Of the held-out scenes and of the noise."""


def rollout(pipeline: ReferencePipeline, scene: Scene, seed: int = SEED) -> Tensor:
    """Generate all frames behind the given first chunk; returns [B, F, 3, 32, 32] in about [-1, 1].

    Leaves the global random state alone.
    """
    truth = scene.video
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        noise = torch.randn_like(truth[:, CHUNK:])
        latents: Tensor = pipeline.inference(noise, initial_latent=truth[:, :CHUNK].clone(), return_latents=True)[1]
    return latents


def by_chunk(video: Tensor, scene: Scene) -> dict[str, list[float]]:
    """Curves over the generated chunks, means over the scenes; ratios are to the truth's.

    ``squared error``, ``still`` (the error of repeating the last given frame), ``sprites alive``, ``saturation`` and
    ``contrast`` of the whole picture, ``background contrast``, ``sharpness`` (change between neighbouring pixels).
    """
    curves: dict[str, list[float]] = {}
    for start in range(CHUNK, video.shape[1], CHUNK):
        frames = slice(start, start + CHUNK)
        part, truth = video[:, frames], scene.video[:, frames]
        values = {
            "squared error": (part - truth).square().mean(),
            "still": (scene.video[:, CHUNK - 1 : CHUNK] - truth).square().mean(),
            "sprites alive": sprites_alive(part, window(scene, frames)).mean(),
            "saturation": _saturation(part) / _saturation(truth),
            "contrast": _contrast(part) / _contrast(truth),
            "background contrast": contrast_ratio(part, window(scene, frames)).nanmean(),
            "sharpness": _sharpness(part) / _sharpness(truth),
        }
        for name, value in values.items():
            curves.setdefault(name, []).append(round(float(value), 4))
    return curves


def _saturation(video: Tensor) -> Tensor:
    return (video.amax(2) - video.amin(2)).mean()


def _contrast(video: Tensor) -> Tensor:
    return video.std((2, 3, 4)).mean()


def _sharpness(video: Tensor) -> Tensor:
    return video.diff(dim=3).abs().mean() + video.diff(dim=4).abs().mean()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the weights (default: the packaged ones)")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    scene = scenes(SEED, options.scenes, CHUNK * (1 + options.chunks))
    video = rollout(ReferencePipeline.frozen(load_model(options.kind, folder=options.folder)), scene)
    file = figures_file(options.kind, options.folder)
    figures = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"kind": options.kind}
    figures["guidance"] = KINDS[options.kind].guidance
    figures["held out"] = {"scenes": options.scenes, "seed": SEED, **by_chunk(video, scene)}
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for name in figures["held out"].keys() - {"scenes", "seed"}:
        print(name, *figures["held out"][name])


if __name__ == "__main__":
    main()
