"""Text encoded once and handed to several videos, as servers and batches of seeds do: it tells no videos apart.

The very same tensors come with the next video, also behind one that was broken off; each is as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import helios_tiny
import ltx_tiny
import pytest
import sana_wm_tiny
import tiny_reference
import torch
from interruptions import nothing_is_open

import tokentrim_hooks as tokentrim
from tokentrim_hooks.testing import ForcedPolicy

POLICY = ForcedPolicy({2: [0, 3]})
Run = Callable[[Any, int], torch.Tensor]


def keep(owner: Any, name: str) -> None:
    """Have a method answer with the very same object where it is asked the same again."""
    kept: dict[str, Any] = {}
    method = getattr(owner, name)

    def answer(*args: Any, **kwargs: Any) -> Any:
        asked = repr((args, kwargs))
        if asked not in kept:
            kept[asked] = method(*args, **kwargs)
        return kept[asked]

    setattr(owner, name, answer)


def given_text(tiny: Any, **options: Any) -> Run:
    """A run whose embeddings, negative ones too, are made once and given by hand."""
    made = tiny.settings(**options)
    text = {name: made[name] for name in made if "embeds" in name or "mask" in name}
    return lambda pipeline, seed: tiny.run(pipeline, seed=seed, **options, **text)


def reference() -> Any:
    pipeline = tiny_reference.make()
    keep(pipeline.text_encoder, "forward")
    return pipeline


def encoding(tiny: Any, name: str) -> Callable[[], Any]:
    """A pipeline that encodes each prompt once in its life."""

    def make() -> Any:
        pipeline = tiny.pipeline()
        keep(pipeline, name)
        return pipeline

    return make


KEPT: dict[str, tuple[Callable[[], Any], Run, str]] = {
    "self-forcing": (reference, lambda p, seed: tiny_reference.run(p, seed=seed), "generator"),
    "helios guided": (helios_tiny.pipeline, given_text(helios_tiny, cfg=3.0, chunks=3), "transformer"),
    "ltx-long guided": (
        encoding(ltx_tiny, "encode_prompt"),
        lambda p, seed: ltx_tiny.run(p, seed=seed, cfg=3.0, windows=3),
        "transformer",
    ),
    "sana-wm": (
        encoding(sana_wm_tiny, "_encode_prompt"),
        lambda p, seed: sana_wm_tiny.run(p, seed=seed, chunks=4),
        "transformer",
    ),
}


def told(report: Any, video: int) -> list[tuple[Any, ...]]:
    """What happened in a video, chunk by chunk."""
    return [(r.chunk, r.start, r.severity, r.pruned, r.dead) for r in report if r.video == video]


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[], Any], Run, str]]:
    yield KEPT[request.param]


def break_off(run: Run, pipeline: Any, denoiser: torch.nn.Module, at: int) -> None:
    """Ctrl-C at call number ``at`` of a video."""
    calls: list[int] = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    hook = denoiser.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, 5)
    hook.remove()


def test_each_video_is_as_if_it_were_alone(kept: tuple[Callable[[], Any], Run, str]) -> None:
    """One behind a video of another seed, and one behind a video that ended in its first chunk."""
    make, run, part = kept
    pipeline = make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        right, wanted = run(pipeline, 6), told(handle.report, 0)
    assert any(record[3] for record in wanted)
    pipeline = make()
    with tokentrim.patched(pipeline, POLICY) as handle:
        run(pipeline, 5)
        assert torch.equal(run(pipeline, 6), right)
        break_off(run, pipeline, getattr(pipeline, part), at=2)
        nothing_is_open()
        assert torch.equal(run(pipeline, 6), right)
    videos = sorted({record.video for record in handle.report})
    assert told(handle.report, videos[1]) == told(handle.report, videos[-1]) == wanted
