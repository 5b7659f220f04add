"""Train a reference model on procedural scenes: ``python -m tokentrim_hooks.reference.train fading --out FOLDER``.

Every step denoises two noisy copies of each clip, every chunk given the chunks before it, in one pass with a
block-causal mask. The other kinds are trained as low-rank differences to the base in FOLDER. A checkpoint is written
every ten minutes; ``--resume`` goes on from it as if nothing had happened. Needs torch 2.9 or newer (Muon).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokentrim_hooks.extras import require
from tokentrim_hooks.reference import objectives
from tokentrim_hooks.reference.kinds import BASE, KINDS, load_base, weights_file
from tokentrim_hooks.reference.low_rank import adapt, differences
from tokentrim_hooks.reference.model import CausalVideoModel
from tokentrim_hooks.reference.recipes import RECIPES, Phase, Recipe

MINUTES = 10.0
"""Between checkpoints."""
FIRST_SEED = 2_000_000
"""Of the training scenes; smaller ones are held out or were in the training of the warm start."""


class Training:
    """A model on its way: everything that a checkpoint holds.

    Attributes:
        model: what is trained, in place.
        average: exponential moving average of its weights; that is what is saved.
        step, seconds, losses: how far it is; the last hundred losses.
    """

    def __init__(self, model: CausalVideoModel, recipe: Recipe, seed: int = 0) -> None:
        self.model, self.recipe, self.seed = model, recipe, seed
        self.average = copy.deepcopy(model)
        self.optimisers = _optimisers(model, recipe)
        self.rng = torch.Generator().manual_seed(seed)
        self.step, self.seconds, self.losses = 0, 0.0, list[float]()
        self._own: tuple[tuple[int, int], Tensor] | None = None

    def advance(self) -> None:
        """One optimiser step."""
        began = time.perf_counter()
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = self.recipe.rate * _schedule(self.step, self.recipe)
            optimiser.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        _average(self.average, self.model, min(0.995, (self.step + 1) / (self.step + 10)))
        self.losses = [*self.losses[-99:], loss.item()]
        self.step += 1
        self.seconds += time.perf_counter() - began

    def compile(self) -> None:
        """Compile the blocks: they share their code, so this is one compilation for all of them."""
        for block in self.model.blocks:
            block.compile(dynamic=False)

    def _phase(self) -> Phase:
        done = self.step / self.recipe.steps
        for phase in self.recipe.phases:
            done -= phase.share
            if done < 0:
                return phase
        return self.recipe.phases[-1]

    def _loss(self) -> Tensor:
        phase, rng = self._phase(), self.rng
        seed = FIRST_SEED + 10_000_000 * self.seed + self.step - self.step % phase.passes
        clip = objectives.draw_clip(seed, phase, self.recipe)
        key = (seed, phase.frames)
        own = self._own[1] if self._own and self._own[0] == key else clip.video
        strength = self.recipe.context_noise * torch.rand(phase.batch, 1, 1, 1, 1, generator=rng)
        context = own + strength * torch.randn(own.shape, generator=rng)
        size = self.model.num_frame_per_block
        levels = [objectives.sampler_levels(phase.batch, phase.frames, size, rng) for _ in range(objectives.COPIES)]
        level = torch.cat(levels, dim=1)
        truth = clip.video.repeat(1, 1, objectives.COPIES, 1, 1)
        noisy, noise = objectives.noised(truth, level, rng)
        flow = objectives.flow_of(self.model, noisy, level, context, clip.index)
        self._own = key, objectives.own_prediction(noisy - level[:, None, :, None, None] * flow, level, clip)
        return objectives.flow_error(flow, noise - truth, level, clip.given)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on as if nothing had happened."""
        return {
            "step": self.step, "seconds": self.seconds, "losses": self.losses, "own": self._own,
            "model": self.model.state_dict(), "average": self.average.state_dict(), "rng": self.rng.get_state(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, made with the same model size and recipe."""
        self.step, self.seconds, self.losses, self._own = (state[name] for name in ("step", "seconds", "losses", "own"))
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.rng.set_state(state["rng"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, or their differences to the base, in float16."""
        found = differences(self.average) if self.recipe.rank else self.average.state_dict()
        return {name: tensor.half().contiguous() for name, tensor in found.items()}


def initialised(**size: int) -> CausalVideoModel:
    """A new model: Xavier weights, and zero where a residual branch or the output begins (adaLN-zero)."""
    model = CausalVideoModel(**size)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for last in (model.head, model.head_modulation, model.time_projection[-1]):
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    return model


def _optimisers(model: CausalVideoModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest; AdamW alone for differences."""
    if recipe.rank:
        trained = [p for p in model.parameters() if p.requires_grad]
        return [torch.optim.AdamW(trained, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)]
    inside = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]
    known = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in known]
    adam = torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.01)
    return [adam, torch.optim.Muon(inside, lr=recipe.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to 1 %."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, keep: float) -> None:
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)


def prepared(kind: str, recipe: Recipe, seed: int, folder: Path, start: Path | None) -> Training:
    """Training of ``kind`` before its first step: from ``start``, from the base in ``folder``, or from nothing."""
    made = KINDS[kind]
    torch.manual_seed(seed)
    model = initialised(
        local_attn_size=made.local_attn_size, sink_size=made.sink_size, num_frame_per_block=made.num_frame_per_block
    )
    file = start if kind == BASE else weights_file(BASE, folder)
    if file:
        load_base(model, file)
    if recipe.rank:
        adapt(model, recipe.rank, torch.Generator().manual_seed(seed))
    return Training(model, recipe, seed)


def run(training: Training, kind: str, folder: Path, made_from: dict[str, Any]) -> None:
    """Train to the end, with a checkpoint every ten minutes; weights and figures go into ``folder``."""
    file = weights_file(kind, folder)
    folder.mkdir(parents=True, exist_ok=True)
    progress = require("tqdm", "demo").trange(training.step, training.recipe.steps, unit="step", mininterval=30)
    saved = time.monotonic()
    for _ in progress:
        training.advance()
        progress.set_postfix(loss=f"{_mean(training.losses):.4f}", refresh=False)
        if time.monotonic() - saved > 60 * MINUTES:
            save(training, file, made_from)
            saved = time.monotonic()
    save(training, file, made_from)


def save(training: Training, file: Path, made_from: dict[str, Any]) -> None:
    """Write weights, figures (JSON) and checkpoint; the checkpoint is replaced in one move, a kill leaves the old."""
    require("safetensors.torch", "demo").save_file(training.weights(), file)
    figures = {
        "kind": file.stem, "steps": training.step, "minutes": round(training.seconds / 60, 1),
        "loss": round(_mean(training.losses), 4), "seed": training.seed, "torch": torch.__version__,
        "recipe": asdict(training.recipe), "made from": made_from,
    }  # fmt: skip
    file.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    new = file.with_suffix(".checkpoint.new")
    torch.save(training.state(), new)
    new.replace(file.with_suffix(".checkpoint"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _made_from(kind: str, folder: Path, start: Path | None, note: str) -> dict[str, Any]:
    file = start if kind == BASE else weights_file(BASE, folder)
    if file is None:
        return {"note": note}
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "note": note}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a reference model.")
    parser.add_argument("kind", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights; holds the base's for a variant")
    parser.add_argument("--from", dest="start", type=Path, help="weights to start the base from")
    parser.add_argument("--note", default="", help="what these were made with, for the figures")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--compile", action="store_true", help="15 %% faster after two minutes; needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # tiny gradients early on would slow a CPU down several times
    recipe = RECIPES[options.kind]
    recipe = replace(recipe, steps=options.steps or recipe.steps)
    training = prepared(options.kind, recipe, options.seed, options.out, options.start)
    if options.resume:
        file = weights_file(options.kind, options.out).with_suffix(".checkpoint")
        training.restore(torch.load(file, weights_only=True))
    if options.compile:
        training.compile()
    run(training, options.kind, options.out, _made_from(options.kind, options.out, options.start, options.note))


if __name__ == "__main__":
    main()
