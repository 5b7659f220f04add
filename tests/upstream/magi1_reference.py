"""An independent reference for MAGI-1: the real, unpatched sampler whose kernel masks dead keys with -inf.

Nothing of tokentrim is used, and none of upstream's row arithmetic. Which chunk the latents of a forward pass are is
found by comparing them with the sampler's video; which chunk and position a key belongs to by the bits of its V row,
remembered as it left the value projection. Queries belong to the chunk of the last key that they see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from magi1_tiny import TOKENS, WIDTH, Repository, flash_attention
from masked_reference import fingerprints, masked_attention
from torch import Tensor

CHUNK_ROWS = TOKENS * WIDTH


@dataclass(frozen=True)
class Prune:
    """``tokens`` of all chunks before ``chunk`` are dead to ``chunk`` and to those after it."""

    chunk: int
    tokens: Sequence[int]

    def kills(self, asker: int, chunk: int, token: int) -> bool:
        """Whether a query of chunk ``asker`` must not see ``token`` of ``chunk``."""
        return asker >= self.chunk > chunk and token in self.tokens


@dataclass
class MagiReference:
    """``with MagiReference(repository, dit, prunes): repository.sample(dit, setup)``.

    With ``drop=True`` dead keys are taken out instead of masked, to compare bit for bit. ``masked`` lists (asking
    chunk, keys, dead keys) of every kernel call that had dead keys.
    """

    repository: Repository
    dit: Any
    prunes: Sequence[Prune]
    drop: bool = False
    masked: list[tuple[int, int, int]] = field(default_factory=list)
    _known: dict[int, tuple[int, int]] = field(default_factory=dict)
    _chunks: list[int] = field(default_factory=list)
    _sampler: Any = None

    def __enter__(self) -> MagiReference:
        self._undo = ExitStack()
        put = mock.patch.object
        sampler, model = self.repository.generate.SampleTransport, type(self.dit)
        self._undo.enter_context(put(sampler, "forward_velocity", self._following(sampler.forward_velocity)))
        self._undo.enter_context(put(model, "forward", self._locating(model.forward)))
        self._undo.enter_context(put(self.repository.layers, "flash_attn_func", self._attention))
        for layer in self.dit.videodit_blocks.layers:
            handle = layer.self_attention.linear_qkv.v.register_forward_hook(self._remember)
            self._undo.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _following(self, original: Any) -> Any:
        def forward_velocity(sampler: Any, *args: Any, **kwargs: Any) -> Tensor:
            self._sampler = sampler
            return original(sampler, *args, **kwargs)

        return forward_velocity

    def _locating(self, original: Any) -> Any:
        def forward(dit: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            parts = [part for sample in x for part in sample.split(WIDTH, dim=1)]
            self._chunks = [self._locate(part) for part in parts]
            return original(dit, x, *args, **kwargs)

        return forward

    def _locate(self, part: Tensor) -> int:
        """The place in the video of latents ``[C, F, H, W]``."""
        video = self._sampler.xs[0][0].clone()
        given = self._sampler.transport_inputs[0].prefix_video
        if given is not None:
            video[:, : given.shape[2]] = given[0]
        places = [i for i, own in enumerate(video.split(WIDTH, dim=1)) if torch.equal(own, part)]
        assert len(places) == 1
        return places[0]

    def _remember(self, _module: Any, _args: Any, output: Tensor) -> None:
        """Note the origin of V rows ``[rows, samples, ...]``."""
        for sample, codes in enumerate(fingerprints(output.transpose(0, 1)[..., None]).tolist()):
            for row, code in enumerate(codes):
                chunk = self._chunks[sample + row // CHUNK_ROWS]
                self._known[code] = (chunk, row % CHUNK_ROWS % TOKENS)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        origins = [[self._known[code] for code in codes] for codes in fingerprints(v).tolist()]
        dead = torch.tensor([[self._is_dead(row[-1][0], *origin) for origin in row] for row in origins])
        if not dead.any():
            return flash_attention(q, k, v)
        assert len(origins) == 1
        self.masked.append((origins[0][-1][0], dead.shape[1], int(dead.sum())))
        if self.drop:
            return flash_attention(q, k[:, ~dead[0]], v[:, ~dead[0]])
        groups = q.shape[2] // k.shape[2]
        return masked_attention(q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), dead)

    def _is_dead(self, asker: int, chunk: int, token: int) -> bool:
        return any(prune.kills(asker, chunk, token) for prune in self.prunes)


class spying:
    """Collects the dispatcher's calls, below any patch: ``x``, ``timestep``, ``options``, ``memory``, ``output``."""

    def __init__(self, model: type, start: Callable[[], Any] = lambda: None) -> None:
        self.model, self.start = model, start
        self.calls = Calls()

    def __enter__(self) -> Calls:
        original, calls, start = self.model.forward_dispatcher, self.calls, self.start

        def forward_dispatcher(
            dit: Any, x: Tensor, timestep: Any, y: Any, mask: Any, kv_range: Any, inference_params: Any, **kwargs: Any
        ) -> Tensor:
            start()
            call = SimpleNamespace(x=x.clone(), timestep=timestep, options=dict(kwargs), memory=inference_params)
            output = original(dit, x, timestep, y, mask, kv_range, inference_params, **kwargs)
            call.output = output.clone()
            calls.append(call)
            for listener in calls.listeners:
                listener()
            return output

        self._patch = mock.patch.object(self.model, "forward_dispatcher", forward_dispatcher)
        self._patch.start()
        return calls

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


class Calls(list[Any]):
    """Calls so far, and who wants to know of each."""

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Callable[[], Any]] = []
