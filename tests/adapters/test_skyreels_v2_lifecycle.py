"""SkyReels-V2 adapter on the real diffusers pipelines, tiny random weights: runs, undo, refusals."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, SkyReelsV2Pipeline, UniPCMultistepScheduler
from diffusers.models.transformers import transformer_skyreels_v2 as upstream

import tokentrim_hooks as tokentrim
from tests.adapters import skyreels_tiny as tiny
from tests.adapters.skyreels_reference import (
    BLOCKS,
    LONELY,
    SHORT,
    SYNC,
    Forced,
)
from tokentrim_hooks import DriftPolicy, ObservePolicy, UnsupportedContextError, UnsupportedProbeError
from tokentrim_hooks.testing import count_syncs


@pytest.mark.parametrize("settings", [SYNC, BLOCKS, SHORT], ids=["synchronous", "causal-blocks", "short"])
def test_a_second_run_starts_afresh(settings):
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, Forced(2)) as handle:
        first = tiny.run(pipe, **settings)
        second = tiny.run(pipe, **settings)
        records = handle.report.records
    half = len(records) // 2
    assert torch.equal(first, second)
    assert [r.video for r in records] == [0] * half + [1] * half
    assert [(r.chunk, r.start, r.severity) for r in records[:half]] == [
        (r.chunk, r.start, r.severity) for r in records[half:]
    ]


def fingerprint(pipe: Any) -> list[Any]:
    modules = [(name, id(module), sorted(vars(module))) for name, module in pipe.transformer.named_modules()]
    hooks = [
        len(getattr(module, kind))
        for module in pipe.transformer.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    ]
    own = {name: id(value) for name, value in vars(pipe).items() if name not in ("_current_timestep", "_progress_bar")}
    return [modules, hooks, sorted(own), id(upstream.dispatch_attention_fn), id(type(pipe).prepare_latents)]


class Stop(Exception):
    """Raised by a user's callback."""


def test_unpatch_restores_everything_also_after_an_exception():
    pipe = tiny.pipeline()
    bare = tiny.run(pipe, **SYNC)
    before = fingerprint(pipe)

    def stop(_pipe, step, _t, tensors):
        calls.append(step)
        if len(calls) == 5:
            raise Stop
        return tensors

    calls: list[int] = []
    handle = tokentrim.patch(pipe, Forced(1))
    assert fingerprint(pipe) != before
    with pytest.raises(Stop):
        tiny.run(pipe, **SYNC, callback_on_step_end=stop)
    again = tiny.run(pipe, **SYNC)
    assert [r.video for r in handle.report][-3:] == [1, 1, 1]
    handle.unpatch()
    assert fingerprint(pipe) == before
    assert torch.equal(tiny.run(pipe, **SYNC), bare)
    with tokentrim.patch(pipe, Forced(1)):
        assert torch.equal(tiny.run(pipe, **SYNC), again)


def test_a_second_pipeline_of_the_same_code_is_untouched():
    one, other = tiny.pipeline(), tiny.pipeline()
    bare = tiny.run(other, **SYNC)
    with tokentrim.patch(one, Forced(1)) as handle:
        tiny.run(one, **SYNC)
        count = len(handle.report)
        assert torch.equal(tiny.run(other, **SYNC), bare)
        assert len(handle.report) == count


def test_calls_from_outside_the_loop_are_not_a_rollout():
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, ObservePolicy()) as handle:
        tiny.run(pipe, **SYNC)
        count = len(handle.report)
        hidden = torch.randn(1, tiny.CHANNELS, 5, 8, 8)
        pipe.transformer(hidden, torch.zeros(1, 5), tiny.prompt()["prompt_embeds"], enable_diffusion_forcing=True)
        assert len(handle.report) == count


def test_host_reads():
    """One read per chunk that has a predecessor, none for the first; the schedule is on the host already."""
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, ObservePolicy()), count_syncs() as log:
        tiny.run(pipe, **SYNC, guidance_scale=4.0)
    assert [sync.kind for sync in log.ours] == ["cpu"] * 2, str(log)


CACHE = PyramidAttentionBroadcastConfig(
    temporal_attention_block_skip_range=2,
    temporal_attention_block_identifiers=("blocks",),
    current_timestep_callback=lambda: 500,
)


def reason(model: Any) -> str:
    (found,) = [found for found in tokentrim.detect(model) if found.adapter == "skyreels-v2"]
    assert not found.matches
    return found.reason


def test_the_transformer_alone_is_refused_with_the_way_out():
    assert "patch the pipeline" in reason(tiny.transformer())


def test_the_plain_pipeline_is_not_diffusion_forcing():
    pipe = SkyReelsV2Pipeline(None, None, tiny.transformer(), None, tiny.pipeline().scheduler)
    assert "no diffusion forcing" in reason(pipe)


def test_foreign_objects_are_refused():
    assert "transformer" in reason(object())


def test_the_three_pipelines_are_recognised():
    for kind in tiny.KINDS:
        (found,) = [found for found in tokentrim.detect(tiny.pipeline(kind)) if found.matches]
        assert found.adapter == "skyreels-v2"


def test_a_diffusers_cache_is_refused_before_and_after_the_patch():
    pipe = tiny.pipeline()
    pipe.transformer.enable_cache(CACHE)
    assert "disable_cache" in reason(pipe)
    pipe.transformer.disable_cache()
    with tokentrim.patch(pipe, ObservePolicy()):
        tiny.run(pipe, **SHORT)
        pipe.transformer.enable_cache(CACHE)
        with pytest.raises(UnsupportedContextError, match="disable_cache"):
            tiny.run(pipe, **SHORT)
        pipe.transformer.disable_cache()
        tiny.run(pipe, **SHORT)


def test_parallelism_is_refused_before_and_after_the_patch():
    pipe = tiny.pipeline()
    pipe.transformer._parallel_config = object()
    assert "parallel" in reason(pipe)
    pipe.transformer._parallel_config = None
    with tokentrim.patch(pipe, ObservePolicy()):
        pipe.transformer.blocks[0].attn1.processor._parallel_config = object()
        with pytest.raises(UnsupportedContextError, match="parallel"):
            tiny.run(pipe, **SHORT)


def test_whole_chunk_replay_is_refused():
    """UniPC remembers earlier predictions: a chunk cannot be replayed by carrying latents forward."""
    pipe = tiny.pipeline()
    with pytest.raises(UnsupportedProbeError, match="first-step"):
        tokentrim.patch(pipe, ObservePolicy(), probe="candidate")


def test_a_scheduler_that_does_not_predict_flow_is_refused():
    pipe = tiny.pipeline()
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="epsilon")
    assert "epsilon" in reason(pipe)


def test_a_schedule_that_cannot_be_followed_obeys_on_error(monkeypatch):
    """Our bookkeeping fails in the pipeline's own method: the failure waits for the guarded transformer call."""
    pipe = tiny.pipeline()
    bare, original = tiny.run(pipe, **SYNC), type(pipe).generate_timestep_matrix

    def without_steps(
        self, num_latent_frames, step_template, base_num_latent_frames, ar_step=5, num_pre_ready=0, causal_block_size=1
    ):
        planned = original(
            self, num_latent_frames, step_template, base_num_latent_frames, ar_step, num_pre_ready, causal_block_size
        )
        return planned[0], None, *planned[2:]

    monkeypatch.setattr(type(pipe), "generate_timestep_matrix", without_steps)
    with tokentrim.patch(pipe, Forced(1)), pytest.raises(UnsupportedContextError, match="schedule"):
        tiny.run(pipe, **SYNC)
    with (
        tokentrim.patch(pipe, Forced(1), on_error="warn"),
        pytest.warns(tokentrim.TokenTrimWarning, match="schedule"),
    ):
        assert torch.equal(tiny.run(pipe, **SYNC), bare)


def test_the_papers_policy_runs_to_the_end():
    pipe = tiny.pipeline()
    with tokentrim.patch(pipe, DriftPolicy(fraction=0.2, sensitivity=0.0, warmup=1)) as handle:
        video = tiny.run(pipe, **LONELY)
        assert handle.report.triggers > 0
    assert bool(torch.isfinite(video).all())


def test_example(tmp_path, monkeypatch):
    script = Path(__file__).parents[2] / "examples" / "skyreels_v2.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert len((tmp_path / "chunks.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "video.pt").exists()
