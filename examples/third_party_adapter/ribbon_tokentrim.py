"""Adapter that lets tokentrim-hooks patch Ribbon: where the denoiser, its memory and its attention are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokentrim_hooks import Adapter, CacheRows, Call, Match, NoMatch, Patches, home_of, hookimpl, lacks

PARAMETERS = ("latents", "level", "memory", "start", "remember")


class Ribbon(Adapter):
    """Chunks of two frames, three steps and a call with ``remember=True`` that appends the chunk to the memory."""

    name = "ribbon"
    models = ("Ribbon",)
    context_kind = "growing memory of keys and values"

    @classmethod
    def probe(cls, model: object) -> Match | NoMatch:
        """Ribbon's network takes a memory and a flag to write it; its blocks know their layer."""
        net = getattr(model, "net", model)
        if not isinstance(net, nn.Module):
            return NoMatch("neither a module nor a pipeline with a .net module")
        reason = lacks(net, PARAMETERS, "the network's forward")
        return NoMatch(reason) if reason else Match(net, (net.patch_size, net.patch_size))

    def attach(self, model: Any, patches: Patches) -> None:
        """All blocks attend through the function ``attend`` of the module that defines them."""
        net = getattr(model, "net", model)
        for home in dict.fromkeys(map(home_of, net.blocks)):
            patches.tap(home, "attend")
        self.patch_size = net.patch_size

    def parse(self, arguments: Mapping[str, Any]) -> Call:
        """Every call says by itself where it is and whether it writes."""
        return Call(
            arguments["latents"],
            start=arguments["start"],
            stream=arguments["memory"],
            timestep=arguments["level"],
            commits=arguments["remember"],
            arguments=arguments,
        )

    def context(self, call: Call) -> CacheRows:
        """The memory holds finished frames only, oldest first."""
        values = call.arguments["memory"].values
        rows_per_frame = call.latents.shape[-2] * call.latents.shape[-1] // self.patch_size**2
        return CacheRows(values, 0, values[0].shape[1] if values else 0, rows_per_frame)

    def identity(self, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Every video has a memory of its own."""
        return (arguments["memory"],)

    def carry(self, call: Call, before: Tensor, after: Tensor) -> Tensor:
        """The sampler adds fresh noise to the predicted chunk: keep the noise, move the chunk."""
        return call.latents + (after - before)


@hookimpl
def tokentrim_adapters() -> list[type[Adapter]]:
    """The adapter of this package."""
    return [Ribbon]
