"""Train the reference model by teacher forcing on procedural scenes: ``python -m tokentrim_hooks.reference.train``.

Every step draws new scenes and a noise level a chunk; each chunk is denoised given the true chunks before it, in one
pass over clean and noisy tokens with a block-causal mask. Three rounds: all noise levels; only the sampler's four;
these with a noisier context. The same seed on the same machine class gives the same quality. Needs torch 2.9 or newer
(Muon).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tokentrim_hooks.extras import require
from tokentrim_hooks.reference.model import DATA_STD, CausalVideoModel
from tokentrim_hooks.reference.pipeline import STEPS, WEIGHTS
from tokentrim_hooks.reference.scenes import scenes

CHUNK = 3
"""Frames of a chunk."""


@dataclass(frozen=True)
class Round:
    """One cosine schedule: its peak rate, whether Muon trains the blocks, whether only the sampler's levels occur.

    ``context_noise`` is the standard deviation of the noise on the true context: a rollout's context is never true, and
    later chunks must not trust it to the last digit.
    """

    rate: float
    muon: bool
    sampler_levels: bool
    context_noise: float


ROUNDS = (
    Round(2e-3, muon=False, sampler_levels=False, context_noise=0.05),
    Round(3e-3, muon=True, sampler_levels=True, context_noise=0.05),
    Round(3e-3, muon=True, sampler_levels=True, context_noise=0.1),
)


@dataclass(frozen=True)
class Settings:
    """What training depends on, beside ROUNDS; each round has ``steps`` steps."""

    steps: int = 450
    batch: int = 4
    frames: int = 24
    seed: int = 0
    warmup: int = 30


def initialised() -> CausalVideoModel:
    """A new model: Xavier weights, and zero where a residual branch or the output begins (adaLN-zero)."""
    model = CausalVideoModel()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for last in (model.head, model.head_modulation, model.time_projection[-1]):
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    return model


def all_levels(batch: int, chunks: int) -> Tensor:
    """Noise level ``[B, chunks * CHUNK]`` in 0..1: logit-normal towards noise, and a quarter pure noise."""
    level = torch.sigmoid(1.2 * torch.randn(batch, chunks) + 0.8)
    level = torch.where(torch.rand(batch, chunks) < 0.25, torch.ones(()), level)
    return level.repeat_interleave(CHUNK, 1)


def sampler_levels(batch: int, chunks: int) -> Tensor:
    """Noise level ``[B, chunks * CHUNK]``: the sampler's four steps, pure noise most often, for it decides most."""
    steps = torch.tensor(STEPS) / 1000
    chosen = torch.multinomial(torch.tensor([0.4, 0.2, 0.2, 0.2]), batch * chunks, replacement=True)
    return steps[chosen].view(batch, chunks).repeat_interleave(CHUNK, 1)


def loss_of(model: CausalVideoModel, video: Tensor, level: Tensor, context_noise: float) -> Tensor:
    """Squared error of the flow, in units of what the network itself has to add; ``video`` is ``[B, C, F, H, W]``."""
    s = level[:, None, :, None, None]
    noise = torch.randn_like(video)
    context = video + context_noise * torch.randn_like(video)
    with torch.autocast("cpu", torch.bfloat16):
        flow = model((1 - s) * video + s * noise, 1000 * level, clean_x=context)
    unit = DATA_STD / ((1 - s) ** 2 * DATA_STD**2 + s**2).sqrt()
    loss: Tensor = ((flow.float() - (noise - video)) / unit).square().mean()
    return loss


def train(settings: Settings, out: Path, first: int = 0) -> float:
    """Run rounds ``first``, ``first + 1``, ... and write the weights to ``out``; returns the mean late loss.

    A round begins from the float16 file that the last one wrote, so going on from a file is the same as not stopping.
    """
    torch.set_flush_denormal(True)  # tiny gradients early on would slow a CPU down several times
    loss = math.nan
    for number in range(first, len(ROUNDS)):
        torch.manual_seed(settings.seed + number)
        loss = _train_round(loaded(out) if number else initialised(), settings, out, number)
    return loss


def loaded(path: Path) -> CausalVideoModel:
    """The model from a weights file."""
    model = CausalVideoModel()
    weights = require("safetensors.torch", "demo").load_file(path)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model


def _train_round(model: CausalVideoModel, settings: Settings, out: Path, number: int) -> float:
    this = ROUNDS[number]
    levels = sampler_levels if this.sampler_levels else all_levels
    average = copy.deepcopy(model)
    optimisers = _optimisers(model, this)
    progress = require("tqdm", "demo").tqdm(range(settings.steps), unit="step", mininterval=10)
    late: list[float] = []
    for step in progress:
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = this.rate * _schedule(step, settings)
        seed = settings.seed * 1_000_000 + 1000 + number * settings.steps + step
        video = scenes(seed, settings.batch, settings.frames).video.transpose(1, 2)
        level = levels(settings.batch, settings.frames // CHUNK)
        loss = loss_of(model, video, level, this.context_noise)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        _average(average, model, min(0.99, (step + 1) / (step + 10)))
        late = [*late[-49:], loss.item()]
        progress.set_postfix(loss=f"{sum(late) / len(late):.4f}")
        if step % 50 == 49:
            save(average, out, settings, number * settings.steps + step + 1, sum(late) / len(late))
    save(average, out, settings, (number + 1) * settings.steps, sum(late) / len(late))
    return sum(late) / len(late)


def _optimisers(model: CausalVideoModel, this: Round) -> list[torch.optim.Optimizer]:
    """AdamW; with Muon for the matrices inside the blocks where the round says so. One rate fits both."""
    inside = [p for p in model.blocks.parameters() if this.muon and p.ndim == 2 and min(p.shape) > 6]
    known = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in known]
    adam = torch.optim.AdamW(rest, lr=this.rate, betas=(0.9, 0.95), weight_decay=0.01)
    if not inside:
        return [adam]
    return [adam, torch.optim.Muon(inside, lr=this.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def _schedule(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    rise = min(1.0, (step + 1) / settings.warmup)
    return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, keep: float) -> None:
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)


def save(model: nn.Module, out: Path, settings: Settings, steps: int, loss: float) -> None:
    """Write the weights in float16 with what they were made from."""
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    made = {"seed": settings.seed, "steps": steps, "batch": settings.batch, "loss": f"{loss:.4f}"}
    metadata = {key: str(value) for key, value in {**made, "torch": torch.__version__}.items()}
    require("safetensors.torch", "demo").save_file(weights, out, metadata=metadata)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the reference model (about 25 minutes on two CPU cores).")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="steps a round")
    parser.add_argument("--from-round", type=int, default=0, help="go on from the weights in --out")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--out", type=Path, default=Path(WEIGHTS), help="safetensors file (default: the packaged one)")
    options = parser.parse_args()
    began = time.perf_counter()
    loss = train(Settings(steps=options.steps, seed=options.seed), options.out, options.from_round)
    minutes = (time.perf_counter() - began) / 60
    print(f"trained for {minutes:.1f} min, loss {loss:.4f}, written to {options.out}")


if __name__ == "__main__":
    main()
