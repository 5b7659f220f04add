"""Every kind of model at its smallest, for tests of what happens around a call: the reference model and diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import anyflow_tiny
import framepack_tiny
import helios_tiny
import ltx_tiny
import pytest
import sana_wm_tiny
import skyreels_tiny
import tiny_reference
from torch import Tensor, nn

WINDOWS = {"num_frames": 33, "base_num_frames": 17, "overlap_history": 9}


@dataclass(frozen=True)
class Target:
    """A model: ``make()`` gives a pipeline, ``run(pipeline)`` a video, ``part`` names the denoiser.

    ``beside`` counts the calls of a video that are of no chunk; ``proofs`` those before a first prune.
    """

    name: str
    make: Callable[[], Any]
    run: Callable[..., Tensor]
    part: str = "transformer"
    beside: int = 0
    proofs: int = 1

    def denoiser(self, pipeline: Any) -> nn.Module:
        module: nn.Module = getattr(pipeline, self.part)
        return module

    def depths(self, pipeline: Any) -> dict[str, nn.Module]:
        """Modules in which a call may be interrupted: around it, in its last block, inside self attention."""
        denoiser = self.denoiser(pipeline)
        blocks: Any = denoiser.model if self.part == "generator" else denoiser
        block = (getattr(blocks, "blocks", None) or blocks.transformer_blocks)[-1]
        attention = next(getattr(block, n) for n in ("self_attn", "attn1", "attn") if hasattr(block, n))
        return {"denoiser": denoiser, "block": block, "attention": next(attention.children())}


def _skyreels(pipeline: Any) -> Tensor:
    return skyreels_tiny.run(pipeline, **WINDOWS)


TARGETS = (
    Target("self-forcing", tiny_reference.make, tiny_reference.run, "generator", proofs=2),  # where rows are, too
    Target("skyreels-v2", skyreels_tiny.pipeline, _skyreels),
    Target("framepack", framepack_tiny.pipeline, framepack_tiny.run),
    Target("helios", helios_tiny.pipeline, helios_tiny.run),
    Target("anyflow-far", anyflow_tiny.pipeline, anyflow_tiny.run),
    Target("ltx-long", ltx_tiny.pipeline, ltx_tiny.run),
    Target("sana-wm", sana_wm_tiny.pipeline, sana_wm_tiny.run, beside=1),  # the sink is captured first
)


class Counter:
    """A hook of somebody else that counts its calls since its video began, and acts by the number."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output * (1 + 0.1 * (self.calls % 5))


def counting(target: Target) -> Target:
    """The same model with such a hook in an attention, as step caches have that are set to 0 before each video."""

    def make() -> Any:
        pipeline = target.make()
        target.depths(pipeline)["attention"].register_forward_hook(Counter())
        return pipeline

    def run(pipeline: Any) -> Tensor:
        for hook in target.depths(pipeline)["attention"]._forward_hooks.values():
            if isinstance(hook, Counter):
                hook.calls = 0
        return target.run(pipeline)

    return replace(target, name=target.name + "-counting", make=make, run=run)


COUNTING = tuple(counting(target) for target in TARGETS)
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
